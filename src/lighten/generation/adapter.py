"""An adapter as it is served unmerged, read from a folder in PEFT's format."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from lighten.adapters import files
from lighten.errors import UserError
from lighten.generation.segments import Factors
from lighten.peft_config import FACTOR, more_than_low_rank, read_config
from lighten.wording import with_article

# PEFT saves the base's own weight beside the factors of a head.
_SAVED = re.compile(r"^base_model\.model\.(?P<path>.+)\.base_layer\.weight$")
_PROBED = 8  # inputs of it that are compared with the base's


class LoadedAdapter:
    """An adapter in memory. A folder loaded anew is another object: no cache takes it for the old.

    Attributes:
        name: What it is called.
        size_bytes: Memory of its factors.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.size_bytes = 0


def read_factors(
    folder: Path, served: Iterable[str]
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """The low-rank factors of an adapter, by path of the layer.

    Args:
        folder: In PEFT's format.
        served: Paths of the layers that take updates.

    Returns:
        The factors, and weights of the base that were saved beside those of its head: what
        `require_same` is for.

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
    saved: dict[str, Tensor] = {}
    for key, weight in weights.items():
        if (of_base := _SAVED.match(key)) is not None and of_base["path"] in layers:
            saved[of_base["path"]] = weight
            continue
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
    return factors, saved


def require_same(
    folder: Path, path: str, saved: Tensor, weight_at: Callable[[Tensor], Tensor]
) -> None:
    """A weight that was saved with an adapter is the base's.

    Args:
        folder: The adapter's.
        path: Of the layer.
        saved: [O, I].
        weight_at: Gives the base's of n inputs, [n] → [n, O].

    Raises:
        UserError: It is another one, as where tokens were added.
    """
    places = torch.linspace(0, saved.shape[1] - 1, _PROBED).long()
    weight = weight_at(places).float()
    theirs = saved[:, places].T.float()
    # In 8 bits of each number: one of the two may be rounded to bfloat16.
    if weight.shape != theirs.shape or not torch.allclose(weight, theirs, rtol=2**-7, atol=1e-6):
        raise _unserved(folder, f"a {path} of its own, other than this base's")


def _unserved(folder: Path, content: str) -> UserError:
    return UserError(
        f"{folder} holds {content}, which cannot be served beside other adapters; merge it with "
        "`lighten export RUN --as merged` and serve the merged model"
    )
