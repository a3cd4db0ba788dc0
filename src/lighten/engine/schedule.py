"""The learning rate at each step, as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def in_steps(number: float, total_steps: int) -> int:
    """So many steps, or below 1 their share of all steps rounded up, as transformers does it."""
    return math.ceil(total_steps * number) if number < 1 else int(number)


def warmup_length(total_steps: int, warmup_ratio: float, warmup_steps: float | None) -> int:
    """Steps of warm-up: as given, or below 1 their share of all steps rounded up."""
    return in_steps(warmup_ratio if warmup_steps is None else warmup_steps, total_steps)


def learning_rate_factor(
    step: int, total_steps: int, warmup: int, schedule: str,
    parameters: Mapping[str, Any] | None = None, *, peak: float = 1.0,
) -> float:  # fmt: skip
    """What the learning rate is multiplied with at a step.

    Args:
        step: Optimiser steps already made, from 0. The first step of a warm-up is not zero: a
            step that changes nothing is a step wasted.
        total_steps: Steps of the whole run.
        warmup: Steps of warm-up.
        schedule: By transformers' name.
        parameters: Of the schedule, by transformers' names (`lr_scheduler_kwargs`).
        peak: The learning rate itself, which lowest rates are shares of.
    """
    given = parameters or {}
    if schedule == "constant":
        return 1.0
    if step < warmup:
        return _above((step + 1) / warmup, given.get("min_lr_ratio", 0.0))
    progress = (step - warmup) / max(1, total_steps - warmup)
    match schedule:
        case "constant_with_warmup":
            return 1.0
        case "linear":
            return max(0.0, 1.0 - progress)
        case "cosine" | "cosine_with_min_lr":
            lowest = given["min_lr"] / peak if "min_lr" in given else given.get("min_lr_rate", 0.0)
            return max(0.0, _above(_cosine(progress, given.get("num_cycles", 0.5)), lowest))
        case "cosine_with_restarts":
            return max(0.0, _cosine(given.get("num_cycles", 1) * progress % 1.0))
        case "polynomial":
            left = max(0.0, 1.0 - progress) ** given.get("power", 1.0)
            return _above(left, given.get("lr_end", 1e-7) / peak)
        case "inverse_sqrt":
            timescale = given.get("timescale") or warmup or 10_000
            return math.sqrt(timescale / (step - warmup + timescale))
        case "warmup_stable_decay":
            return _decay_at_end(step, total_steps, given)
    raise ValueError(f"lr_scheduler_type {schedule!r} is not known")


def _decay_at_end(step: int, total_steps: int, given: Mapping[str, Any]) -> float:
    decay = in_steps(given["num_decay_steps"], total_steps)
    progress = (step - (total_steps - decay)) / max(1, decay)
    if progress < 0:
        return 1.0
    left = {
        "linear": 1.0 - progress,
        "cosine": _cosine(progress, given.get("num_cycles", 0.5)),
        "1-sqrt": 1.0 - math.sqrt(progress),
    }[given.get("decay_type", "cosine")]
    return max(0.0, _above(left, given.get("min_lr_ratio", 0.0)))


def _cosine(progress: float, cycles: float = 0.5) -> float:
    """Half a cosine, from 1 to 0; of so many whole ones, where that is said."""
    return 0.5 * (1.0 + math.cos(2.0 * math.pi * cycles * progress))


def _above(factor: float, lowest: float) -> float:
    """A factor between 0 and 1 as one between `lowest` and 1."""
    return factor * (1.0 - lowest) + lowest
