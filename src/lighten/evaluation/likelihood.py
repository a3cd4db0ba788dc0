"""The loss of one adapter, or of the base, on encoded rows, with micro-batches as in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lighten.adapters import Trained
from lighten.data.batches import TokenRow
from lighten.engine.batching import choose_tokens
from lighten.engine.loss import Objective
from lighten.engine.validation import held_out
from lighten.engine.validation_loss import ValidationLoss
from lighten.models import Base
from lighten.recipe import Recipe


def most_tokens(base: Base, recipe: Recipe) -> int | None:
    """Padded tokens of a micro-batch at most; None: its rows decide."""
    device = base.model.device.type
    return choose_tokens(recipe.tokens_per_microbatch, device, base.dtype.value)[0]


def measure_loss(
    base: Base,
    trained: Trained,
    rows: Sequence[TokenRow],
    adapter: str | None,
    recipe: Recipe,
    *,
    packs: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ValidationLoss:
    """Loss of one adapter (None: the base) on encoded rows.

    Args:
        base: The base.
        trained: What is attached to it.
        rows: Encoded rows; those without a supervised token are passed over.
        adapter: The adapter's name.
        recipe: Says how many rows and tokens a micro-batch has at most.
        packs: Rows stand behind each other.
        progress: Log how many rows are measured, and of how many.
    """
    return held_out(
        Objective(base.model, trained, fast=trained.supports_fast_loss, packs=packs),
        rows,
        adapter,
        max_rows=recipe.per_device_eval_batch_size,
        max_tokens=most_tokens(base, recipe),
        device=base.model.device,
        progress=progress,
    )
