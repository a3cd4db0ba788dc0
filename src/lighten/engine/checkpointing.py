"""Memory savers of the training pass, each equal in result to the run without it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import ExitStack
from contextvars import copy_context
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lighten.adapters.decoder import decoder_layers
from lighten.adapters.layers import routings
from lighten.errors import UserError

# What architectures call the parts of a layer.
PARTS = {
    "attention": ("self_attn", "attn", "attention"),
    "mlp": ("mlp", "block_sparse_moe", "feed_forward"),
}


def checkpoint_layers(
    model: PreTrainedModel,
    *,
    every: int = 1,
    part: str = "layer",
    options: Mapping[str, Any] | None = None,
) -> int:
    """Recompute transformer layers in the backward pass instead of keeping their activations.

    transformers' own switch works only in train mode, which would turn the base's dropout on
    too; here the frozen base stays in eval mode. Never reentrant: with frozen inputs the
    reentrant form gives no gradients (traps 34 and 35).

    Args:
        model: The base, with its cohort or without.
        every: The first layer, and then every so many-th; the others keep their activations.
            Frozen layers below the first that learns keep nothing and are not counted.
        part: `layer`, or only its `attention` or its `mlp`.
        options: More arguments of `torch.utils.checkpoint.checkpoint`.

    Returns:
        How many layers were wrapped.

    Raises:
        UserError: The architecture has no layers, or no such part, that can be recomputed.
    """
    layers = decoder_layers(model)
    if not layers:
        raise UserError(
            f"gradient_checkpointing: {type(model).__name__} does not say which of its layers can "
            "be recomputed; set it to false"
        )
    chosen = layers[_first_that_learns(model, layers) :: every]
    if part != "layer":
        chosen = [_part(layer, part, model) for layer in chosen]
    for module in chosen:
        module.forward = _recomputed(module, dict(options or {}))
    return len(chosen)


def _first_that_learns(model: PreTrainedModel, layers: list[nn.Module]) -> int:
    """Place of the first layer that keeps anything for the backward pass.

    Only the last layers may learn. It is the first of all where anything outside of the layers
    learns, an embedding perhaps, or where the model's own parameters do not say what learns: those
    of a cohort are not the model's.
    """
    learn = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    outside = any(p.requires_grad and id(p) not in inside for p in model.parameters())
    return 0 if outside or not any(learn) else learn.index(True)


def _part(layer: nn.Module, part: str, model: PreTrainedModel) -> nn.Module:
    for name in PARTS[part]:
        if isinstance(module := getattr(layer, name, None), nn.Module):
            return module
    raise UserError(
        f"gradient_checkpointing_part: the layers of {type(model).__name__} have no {part} of "
        "their own; use layer"
    )


def _recomputed(layer: nn.Module, options: dict[str, Any]) -> Any:
    forward = layer.forward
    options = {**options, "use_reentrant": False}
    followed = routings(layer)

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        # On a GPU autograd recomputes in a thread of its own, which follows no route and packs no
        # rows: what holds in this thread now is taken along.
        context = copy_context()
        routes = [routing.as_now() for routing in followed]

        def as_now(*inputs: Any, **named: Any) -> Any:
            with ExitStack() as stack:
                for route in routes:
                    stack.enter_context(route())
                return context.run(forward, *inputs, **named)

        return checkpoint(as_now, *args, **options, **kwargs)

    return run
