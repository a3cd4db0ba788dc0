"""Setting examples aside, so that what is learnt is not what is measured."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from lighten.data.examples import Example
from lighten.data.storage import chosen


def split(
    examples: Sequence[Example], size: float, seed: int = 0
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Set examples aside so that no prompt stands on both sides (trap 47).

    Prompts are ranked by a hash, so adding rows to a file moves few others.

    Args:
        examples: All of them.
        size: Below 1 the share to set aside, else their number.
        seed: Another seed gives another split.

    Returns:
        The training examples and those set aside, each in file order. At least one prompt stays
        for training.
    """
    keys = [example.prompt_key for example in examples]
    ranked = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).digest())
    wanted = round(size * len(examples)) if size < 1 else int(size)
    times = Counter(keys)
    aside: set[str] = set()
    count = 0
    for key in ranked[:-1]:
        if count >= wanted:
            break
        aside.add(key)
        count += times[key]
    inside = [place for place, key in enumerate(keys) if key not in aside]
    outside = [place for place, key in enumerate(keys) if key in aside]
    return chosen(examples, inside), chosen(examples, outside)
