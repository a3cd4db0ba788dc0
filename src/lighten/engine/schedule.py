"""The learning rate at each step, as pure functions of the step."""

from __future__ import annotations

import math


def in_steps(number: float, total_steps: int) -> int:
    """So many steps, or below 1 their share of all steps rounded up, as transformers does it."""
    return math.ceil(total_steps * number) if number < 1 else int(number)


def warmup_length(total_steps: int, warmup_ratio: float, warmup_steps: float | None) -> int:
    """Steps of warm-up: as given, or below 1 their share of all steps rounded up."""
    return in_steps(warmup_ratio if warmup_steps is None else warmup_steps, total_steps)


def learning_rate_factor(step: int, total_steps: int, warmup: int, schedule: str) -> float:
    """What the learning rate is multiplied with at a step.

    Args:
        step: Optimiser steps already made, from 0. The first step of a warm-up is not zero: a
            step that changes nothing is a step wasted.
        total_steps: Steps of the whole run.
        warmup: Steps of warm-up.
        schedule: `linear`, `cosine`, `constant` or `constant_with_warmup`, as in transformers.
    """
    if schedule != "constant" and step < warmup:
        return (step + 1) / warmup
    if schedule in ("constant", "constant_with_warmup"):
        return 1.0
    progress = (step - warmup) / max(1, total_steps - warmup)
    if schedule == "linear":
        return max(0.0, 1.0 - progress)
    if schedule == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    raise ValueError(f"lr_scheduler_type {schedule!r} is not known")
