"""Memory savers of the training pass, each equal in result to the run without it."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lighten.errors import UserError


def checkpoint_layers(model: PreTrainedModel) -> int:
    """Recompute each transformer layer in the backward pass instead of keeping its activations.

    transformers' own switch works only in train mode, which would turn the base's dropout on
    too; here the frozen base stays in eval mode. Never reentrant: with frozen inputs the
    reentrant form gives no gradients (traps 34 and 35).

    Returns:
        How many layers were wrapped.

    Raises:
        UserError: The architecture has no layers that can be recomputed.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"gradient_checkpointing: {type(model).__name__} does not say which of its layers can "
            "be recomputed; set it to false"
        )
    for layer in layers:
        layer.forward = _recomputed(layer)
    return len(layers)


def _recomputed(layer: nn.Module) -> Any:
    forward = layer.forward

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
