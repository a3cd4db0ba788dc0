"""An adapter as it is served unmerged, read from a folder in PEFT's format."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lighten.adapters import files
from lighten.errors import UserError
from lighten.generation.segments import Factors
from lighten.peft_config import FACTOR, more_than_low_rank, read_config
from lighten.wording import with_article


class LoadedAdapter:
    """An adapter in memory. A folder loaded anew is another object: no cache takes it for the old.

    Attributes:
        name: What it is called.
        size_bytes: Memory of its factors.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.size_bytes = 0


def read_factors(folder: Path, served: Iterable[str]) -> dict[str, Factors]:
    """The low-rank factors of an adapter, by path of the layer.

    Args:
        folder: In PEFT's format.
        served: Paths of the layers that take updates.

    Raises:
        UserError: It holds anything that is not a low-rank update of one of these layers, or is
            of another base.
    """
    config = read_config(folder)
    if (extra := more_than_low_rank(config)) is not None:
        raise _unserved(folder, with_article(extra))
    if config.get("bias") not in (None, "none"):
        raise _unserved(folder, f"trained biases (bias: {config['bias']})")
    weights = files.read_weights(folder)
    spec = files.spec_from_peft(folder.name, config, folder, weights)
    if spec.modules_to_save:
        raise _unserved(folder, f"modules trained whole ({', '.join(spec.modules_to_save)})")
    layers = set(served)
    if not weights:
        raise UserError(f"{folder} holds no weights; save the adapter again")
    halves: dict[str, dict[str, str]] = {}
    for key in weights:
        match = FACTOR.match(key)
        if match is None or match["path"] not in layers:
            raise _unserved(
                folder, f"the tensor {key}, which is no factor of a linear layer of this base"
            )
        halves.setdefault(match["path"], {})[match["factor"]] = key
    factors = {}
    for path, keys in halves.items():
        if set(keys) != {"A", "B"}:
            raise UserError(f"{folder}: one of the two factors of {path} is missing")
        A, B = (weights[keys[factor]] for factor in "AB")
        if not all(bool(half.float().isfinite().all()) for half in (A, B)):
            raise UserError(
                f"{folder} holds numbers that are not finite for {path}; the training diverged, "
                "take an earlier checkpoint"
            )
        spec.require_rank(path, len(A), folder)
        factors[path] = Factors(A, B, spec.scale_at(path))
    return factors


def _unserved(folder: Path, content: str) -> UserError:
    return UserError(
        f"{folder} holds {content}, which cannot be served beside other adapters; merge it with "
        "`lighten export RUN --as merged` and serve the merged model"
    )
