"""The `sweep` section of a recipe: what is tried, and how it is compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from lighten.recipe.section import (
    FULL_LEARNING_RATE,
    Duration,
    Rate,
    Section,
    listed_names,
    seconds,
)


class Range(Section):
    """Values between two ends, both among them where the steps reach them.

    `{min: 1e-4, max: 1e-3, count: 4, log: true}` or `{min: 8, max: 128, factor: 2}`.
    """

    min: float = Field(description="first value")
    max: float = Field(description="last value")
    log: bool = Field(False, description="even steps of the logarithm")
    count: Annotated[int, Field(ge=2)] | None = Field(None, description="how many values")
    factor: Annotated[float, Field(gt=1.0)] | None = Field(
        None, description="each value is this many times the one before"
    )

    @model_validator(mode="after")
    def _holds(self) -> Self:
        if self.min >= self.max:
            raise ValueError(f"min {self.min:g} must be below max {self.max:g}")
        if (self.log or self.factor is not None) and self.min <= 0:
            raise ValueError("min must be above 0 where steps multiply")
        if self.count is not None and self.factor is not None:
            raise ValueError("count and factor both say how many; keep one")
        return self

    def values(self, *, whole: bool) -> list[float | int]:
        """The values, from the first on.

        Args:
            whole: The setting takes whole numbers only: between two of them values are rounded.

        Raises:
            ValueError: Neither `count` nor `factor` says how many.
        """
        if self.factor is not None:
            steps = math.floor(math.log(self.max / self.min) / math.log(self.factor) + 1e-9)
            values = [self.min * self.factor**i for i in range(steps + 1)]
        elif self.count is None:
            raise ValueError("add count or factor to say how many values are tried")
        elif self.log:
            ratio = math.log(self.max / self.min) / (self.count - 1)
            values = [self.min * math.exp(i * ratio) for i in range(self.count)]
        else:
            step = (self.max - self.min) / (self.count - 1)
            values = [self.min + i * step for i in range(self.count)]
        if whole and self.min.is_integer() and self.max.is_integer():
            return list(dict.fromkeys(round(value) for value in values))
        return [float(f"{value:.6g}") for value in values]


def _form(value: Any) -> str:
    return "range" if isinstance(value, Mapping | Range) else "values"


# The tags let an error speak of the form that was meant alone.
SweptValues = Annotated[
    Annotated[list[Any], Tag("values")] | Annotated[Range, Tag("range")], Discriminator(_form)
]


class SweepOptions(Section):
    """What `lighten sweep` tries, beside the swept settings themselves.

    Attributes:
        grid: Swept settings by name, each a list of values or a range; every combination is an
            arm. In a recipe they stand in the section under their own names.
    """

    grid: dict[str, SweptValues] = Field({}, description="swept settings by name")
    scaling: Literal["fixed", "rslora", "alpha"] = Field(
        "fixed",
        description="over swept ranks, fixed: alpha / r stays the recipe's; rslora: alpha / "
        "sqrt(r), equal to the recipe's scale at its own rank; alpha: alpha itself stays",
    )
    tune: Literal["learning_rate"] | None = Field(
        None, description="learning_rate: find each setting's own best rate first"
    )
    reference: list[Literal["base", "full"]] = Field(
        ["base"], description="what to compare with: base (untouched), full (all weights trained)"
    )
    full_learning_rate: Rate = Field(
        FULL_LEARNING_RATE, description="learning rate of reference full"
    )
    metric: Literal[
        "loss", "perplexity", "chrf", "bleu", "exact_match", "chrf_spaces", "rouge1", "rouge2",
        "rougeL", "token_f1", "json_valid",
    ] = Field(
        "chrf", description="metric beside the held-out loss; loss: no answers are generated"
    )  # fmt: skip
    budget: Duration | None = Field(None, description="time there is: 90s, 30m, 2h; null: no limit")
    search: Literal["tpe", "random"] | None = Field(
        None, description="draw settings through Optuna instead of trying every combination"
    )
    trials: Annotated[int, Field(ge=1)] | None = Field(
        None, description="settings that search draws; default 20"
    )
    truncate: bool = Field(
        False, description="train the largest rank only; measure it cut to the lower ones"
    )
    executor: Literal["local", "ray"] = Field(
        "local", description="ray: train groups through Ray Tune, on its GPUs or machines"
    )

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, section: Any) -> Any:
        """Swept settings stand beside the options; `grid` holds them from here on."""
        if not isinstance(section, Mapping):
            return section
        options = {key: value for key, value in section.items() if key in cls.model_fields}
        swept = {key: value for key, value in section.items() if key not in cls.model_fields}
        grid = options.get("grid") or {}
        if not isinstance(grid, Mapping):
            return section
        return {**options, "grid": {**grid, **swept}} if grid or swept else options

    @field_validator("grid", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """A lone value is a list of one."""
        if not isinstance(value, Mapping):
            return value
        return {
            key: entry if isinstance(entry, list | Mapping | Range) else [entry]
            for key, entry in value.items()
        }

    @field_validator("reference", mode="before")
    @classmethod
    def _references(cls, value: Any) -> Any:
        return listed_names(value)

    @property
    def budget_s(self) -> float | None:
        """The time there is, in seconds."""
        return None if self.budget is None else seconds(self.budget)
