"""Setting examples aside, so that what is learnt is not what is measured."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lighten.data.examples import Example
from lighten.data.storage import chosen
from lighten.errors import UserError
from lighten.wording import counted

# Fewer held-out examples than this give no verdict (evaluation.verdict says why).
FEWEST = 20
# So small a data set gives two rows at most where a share is asked for: all of it is trained on.
SMALL_ROWS = 10
# Most prompts that can be held out, as a share, where much of the data asks one question: with all
# others held out training would see that one alone.
MOST_PROMPTS = 0.75


class Split(NamedTuple):
    """A data set in two parts.

    Attributes:
        train: What to train on, in file order.
        held_out: What is set aside, in file order; may be empty.
        note: How this differs from what was asked for and why; None where it does not.
    """

    train: Sequence[Example]
    held_out: Sequence[Example]
    note: str | None = None


def split(examples: Sequence[Example], size: float, seed: int = 0) -> Split:
    """Set examples aside so that no prompt stands on both sides (trap 47).

    Prompts are ranked by a hash, so adding rows to a file moves few others. Of a share at least
    `FEWEST` rows are set aside, or a fifth of the data where that is less; a data set too small for
    two of them is left whole. A number of rows is taken as it is.

    Args:
        examples: All of them.
        size: Below 1 the share to set aside (above 0), else their number.
        seed: Another seed gives another split.

    Raises:
        UserError: Less than two rows would be left to train on.
    """
    rows = len(examples)
    target = requested = round(size * rows) if size < 1 else int(size)
    setting = f"val_size {size:g}"
    if size < 1 and rows > SMALL_ROWS:
        target = max(requested, min(FEWEST, rows // 5))
    if size < 1 and target < 2:
        return Split(
            examples, chosen(examples, ()),
            f"nothing is held out: {counted(rows, 'row')} {'is' if rows == 1 else 'are'} too few "
            f"for {setting}, so nothing will say what training has changed; give an eval_dataset, "
            "or a number as val_size",
        )  # fmt: skip
    if requested > rows - 2:
        raise UserError(
            f"{setting} holds out {requested:,} of the {counted(rows, 'row')} of "
            f"{examples[0].file}, which leaves {counted(max(0, rows - requested), 'row')} to train "
            "on; give a smaller number, or a share such as 0.1"
        )
    keys = [example.prompt_key for example in examples]
    times = Counter(keys)
    ranked = sorted(times, key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).digest())
    aside = _aside(ranked, times, target, rows)
    inside = [place for place, key in enumerate(keys) if key not in aside]
    outside = [place for place, key in enumerate(keys) if key in aside]
    note = _note(setting, requested, target, len(outside), times)
    return Split(chosen(examples, inside), chosen(examples, outside), note)


def _aside(ranked: Sequence[str], times: Counter[str], target: int, rows: int) -> set[str]:
    """Prompts whose rows together come nearest to the number wanted."""
    most = max(int(MOST_PROMPTS * len(ranked)), round(len(ranked) * target / rows))
    aside: set[str] = set()
    count = 0
    for key in ranked:
        if count == target or len(aside) == most:
            break
        if count + times[key] <= target:
            aside.add(key)
            count += times[key]
    remaining = [key for key in ranked if key not in aside]
    if count < target and len(aside) < most and len(remaining) > 1:
        least = min(remaining, key=lambda key: times[key])
        with_least = count + times[least]
        # Too many are better than none, but not at the price of most of what is learnt.
        if 2 * with_least <= rows and (count == 0 or with_least - target < target - count):
            aside.add(least)
    return aside


def _note(setting: str, requested: int, target: int, count: int, times: Counter[str]) -> str | None:
    """How a split differs from what was asked for."""
    rows = times.total()
    if abs(count - target) > target / 10:
        largest = max(times.values())
        shared = "all rows ask the same" if len(times) == 1 else (
            f"rows that ask the same stay together, and {largest:,} of {rows:,} ask one thing"
        )  # fmt: skip
        subject = "nothing is" if not count else f"{count:,} {'is' if count == 1 else 'are'}"
        return f"{subject} held out, where {setting} asks for {target:,} of {rows:,} rows: {shared}"
    if target > requested:
        # Where there are too few all the same, that is said beside the figures.
        why = f"fewer than {FEWEST} tell nothing" if count >= FEWEST else "a fifth of the data"
        return (
            f"{count:,} of {rows:,} rows are held out instead of the {requested:,} of {setting}: "
            f"{why}"
        )
    if count > rows - count:
        return f"more rows are held out ({count:,}) than trained on ({rows - count:,}): {setting}"
    return None


def shared_prompts(train: Iterable[Example], held_out: Iterable[Example]) -> frozenset[str]:
    """Keys of the prompts that stand on both sides."""
    held_out_keys = {example.prompt_key for example in held_out}
    return frozenset(key for example in train if (key := example.prompt_key) in held_out_keys)
