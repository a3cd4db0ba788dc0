"""Courses of the learning rate, with transformers' names and parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator

if TYPE_CHECKING:
    from lighten.recipe import Recipe
    from lighten.recipe.fields import AdapterOptions

Schedule = Literal[
    "linear", "cosine", "constant", "constant_with_warmup", "cosine_with_restarts",
    "cosine_with_min_lr", "polynomial", "inverse_sqrt", "warmup_stable_decay",
]  # fmt: skip
_Kind = tuple[str, Callable[[Any], bool]]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    """Parameters with their numbers as such: YAML reads 1e-5 as text."""
    return {name: _number(value) for name, value in values.items()}


def _number(value: Any) -> Any:
    if isinstance(value, str):
        for kind in (int, float):
            with suppress(ValueError):
                return kind(value)
    return value


Parameters = Annotated[dict[str, Any], AfterValidator(_numbers)]
_ABOVE_0: _Kind = ("a number above 0", lambda value: _is_number(value) and value > 0)
_SHARE: _Kind = ("a number from 0 below 1", lambda value: _is_number(value) and 0 <= value < 1)
_RATE: _Kind = ("a learning rate", lambda value: _is_number(value) and value >= 0)
_COUNT: _Kind = ("a whole number from 1", lambda value: type(value) is int and value >= 1)
_STEPS: _Kind = (
    "a whole number of steps, or below 1 their share",
    lambda value: _is_number(value) and value > 0 and (value < 1 or value == int(value)),
)
_COURSE: _Kind = ("linear, cosine or 1-sqrt", lambda value: value in ("linear", "cosine", "1-sqrt"))
_PARAMETERS: dict[str, dict[str, _Kind]] = {
    "cosine": {"num_cycles": _ABOVE_0},
    "cosine_with_restarts": {"num_cycles": _COUNT},
    "cosine_with_min_lr": {"min_lr": _RATE, "min_lr_rate": _SHARE, "num_cycles": _ABOVE_0},
    "polynomial": {"lr_end": _RATE, "power": _ABOVE_0},
    "inverse_sqrt": {"timescale": _COUNT},
    "warmup_stable_decay": {
        "num_decay_steps": _STEPS, "decay_type": _COURSE, "min_lr_ratio": _SHARE,
        "num_cycles": _ABOVE_0,
    },
}  # fmt: skip
# Rates that are no shares, which the peak has to be above.
_LOWEST = {"min_lr": None, "lr_end": 1e-7}


def problems(recipe: Recipe, adapters: Sequence[AdapterOptions]) -> Iterator[str]:
    """What is wrong with the parameters of a recipe's course, each with what to change.

    Args:
        recipe: Whose.
        adapters: Its cohort; empty where that is not known.
    """
    schedule, given = recipe.lr_scheduler_type, recipe.lr_scheduler_kwargs
    known = _PARAMETERS.get(schedule, {})
    takes = f"takes {', '.join(known)}" if known else "takes none"
    for name, value in given.items():
        if name not in known:
            yield f"lr_scheduler_kwargs: lr_scheduler_type: {schedule} has no {name}; it {takes}"
        elif not known[name][1](value):
            yield f"lr_scheduler_kwargs: {name}: {value!r} does not do; write {known[name][0]}"
    if schedule == "cosine_with_min_lr" and len({"min_lr", "min_lr_rate"} & given.keys()) != 1:
        yield (
            "lr_scheduler_type: cosine_with_min_lr needs the lowest learning rate, or its share: "
            "lr_scheduler_kwargs: {min_lr: 1e-5} or {min_lr_rate: 0.1}"
        )
    if schedule == "warmup_stable_decay" and "num_decay_steps" not in given:
        yield (
            "lr_scheduler_type: warmup_stable_decay needs the steps of its end, or their share: "
            "lr_scheduler_kwargs: {num_decay_steps: 0.2}"
        )

    for name in known.keys() & _LOWEST.keys():
        lowest = given.get(name, _LOWEST[name])
        peak = min((adapter.learning_rate for adapter in adapters), default=math.inf)
        if lowest is not None and _is_number(lowest) and lowest >= peak:
            yield (
                f"lr_scheduler_kwargs: {name}: {lowest:g} has to be below learning_rate ({peak:g})"
            )
