"""Our engine over a base that was loaded, where it takes the base and all its adapters."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from lighten import models
from lighten.adapters.frozen import out_in_features, weight_of
from lighten.errors import UserError
from lighten.generation.adapter import read_factors, require_same
from lighten.generation.engine import Engine, require_taken
from lighten.generation.linears import linear_paths
from lighten.machine.heap import drop_mapped_weights

# Of a prompt with its answer where the model says nothing: room is made as it is used.
MOST_TOKENS = 2**24


def open_engine(
    base: models.Base, adapters: Mapping[str, Path], *, slots: int = 1, prefix_caching: bool = False
) -> Engine:
    """An engine that answers with a base and its adapters.

    Args:
        base: Without adapters; its linear layers are replaced once it is taken, not before.
        adapters: Folders in PEFT's format by name.
        slots: Answers under way at once.
        prefix_caching: Whether a prompt that goes on from an earlier one reads the rest alone.

    Raises:
        UserError: It does not take the base or an adapter, for the reason that this says.
    """
    model = base.model
    if base.feed is not None:
        raise UserError("the base's layers are read from disk as they are needed")
    require_taken(model)
    paths = linear_paths(model)
    for folder in adapters.values():
        factors, saved = read_factors(folder, paths)
        for path, weight in saved.items():
            layer = model.get_submodule(path)
            require_same(folder, path, weight, functools.partial(_weight_at, layer))
        for path, pair in factors.items():
            if (len(pair.B), pair.A.shape[1]) != out_in_features(model.get_submodule(path)):
                raise UserError(f"{folder} does not fit this base; it was trained on another model")
    positions = models.limits_of(model).positions
    engine = Engine(
        model, max_sequences=slots, max_tokens=positions or MOST_TOKENS,
        prefix_caching=prefix_caching,
    )  # fmt: skip
    drop_mapped_weights()  # linear layers have another layout now
    for name, folder in adapters.items():
        engine.load_adapter(name, folder)
    return engine


def _weight_at(layer: nn.Module, places: Tensor) -> Tensor:
    """A layer's weights of some of its inputs: [n] → [n, O]."""
    weight = weight_of(layer).detach()
    return weight.T[places.to(weight.device)].cpu()
