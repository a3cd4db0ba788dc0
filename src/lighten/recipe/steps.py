"""How long a run is: rows of an optimiser step, steps of an epoch and of the run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lighten.recipe import Recipe


def rows_per_step(recipe: Recipe, ranks: int = 1) -> int:
    """Rows of one optimiser step of one adapter, over all ranks."""
    return recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps * ranks


def steps_per_epoch(rows: int, per_step: int) -> int:
    """Optimiser steps of one pass over the data; the last one may have fewer rows.

    Args:
        rows: In the data.
        per_step: As `rows_per_step` gives it.
    """
    return math.ceil(rows / per_step)


def total_steps(recipe: Recipe, rows: int, per_step: int) -> int:
    """Optimiser steps of the whole run, `max_time` left aside.

    Args:
        recipe: What is trained.
        rows: In the data; they count for nothing where the recipe has `max_steps`.
        per_step: As `rows_per_step` gives it.
    """
    if recipe.max_steps is not None:
        return recipe.max_steps
    return math.ceil(recipe.num_train_epochs * steps_per_epoch(rows, per_step))
