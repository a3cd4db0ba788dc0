"""What every section of a recipe shares: its base class and bounded numbers."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from lighten.recipe.numbers import decimal_comma

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
# What every generator here takes (PyTorch: below 2^64, as a signed number below 2^63).
Seed = Annotated[int, Field(ge=0, lt=2**63)]


def _share_or_count(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError(f"write a share below 1 or a whole number, not {value:g}")
    return value


ShareOrCount = Annotated[float, Field(ge=0.0, allow_inf_nan=False), AfterValidator(_share_or_count)]
Rate = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


def _steps_or_share(value: float) -> float:
    if value == int(value):
        return int(value)
    if value > 1:
        raise ValueError(f"write a whole number of steps or a share below 1, not {value:g}")
    return value


# Steps, or below 1 a share of all steps, as in transformers.
StepsOrShare = Annotated[float, Field(ge=0.0, allow_inf_nan=False), AfterValidator(_steps_or_share)]
# How often something is done.
Every = Annotated[float, Field(gt=0.0, allow_inf_nan=False), AfterValidator(_steps_or_share)]

# What an adapter, and a base's own weights, learn at where nothing is said.
LORA_LEARNING_RATE, FULL_LEARNING_RATE = 2e-4, 2e-5

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_DURATION = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(s|m|min|h|)\s*")


def seconds(text: str) -> float:
    """Seconds of a time such as `90s`, `30m` or `2h`; a lone number is seconds."""
    parts = _DURATION.fullmatch(text)
    assert parts is not None, text
    return float(parts[1]) * _UNITS[parts[2]]


def duration(text: str) -> float:
    """Seconds of a time that somebody wrote.

    Raises:
        ValueError: It is none.
    """
    return seconds(_duration(text))


def _duration(value: Any) -> Any:
    if value is None:
        return None
    text = str(value)
    if isinstance(value, bool) or not _DURATION.fullmatch(text) or seconds(text) <= 0:
        raise ValueError("write a time such as 90s, 30m or 2h")
    return text


Duration = Annotated[str, BeforeValidator(_duration)]


def _data_sets(value: Any) -> Any:
    several = isinstance(value, list) and value and all(isinstance(item, str) for item in value)
    if not (isinstance(value, str) or several):
        raise ValueError(
            "give a file, folder or hub id, or a list of these; rows that are in memory are "
            "written to a JSONL file first"
        )
    return value


# One data set, or several that are taken together.
DataSets = Annotated[str | list[str], BeforeValidator(_data_sets)]


def _expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression ({error})") from error
    return text


# Names of modules, as PEFT's patterns match them.
ModulePattern = Annotated[str, AfterValidator(_expression)]


def told_by_pattern(pattern: str, words: str) -> tuple[BeforeValidator, Any]:
    """What makes a text one of a pattern: pydantic would answer any other with the pattern itself.

    Args:
        pattern: Of the whole text; the JSON schema has it.
        words: What to use, for people.
    """

    def check(value: Any) -> Any:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError(f"use {words}")
        return value

    return BeforeValidator(check), Field(json_schema_extra={"pattern": f"^({pattern})$"})


def listed(value: Any) -> Any:
    """Words with commas, or one alone, are as good as a list."""
    if not isinstance(value, str):
        return value
    return [word.strip() for word in value.split(",") if word.strip()]


def targets(value: Any) -> Any:
    """Modules as other tools name them: one name alone, several with commas, or all.

    A regular expression that is one name would match no module: they all have longer paths.
    """
    if value == "all":
        return "all-linear"
    if isinstance(value, str) and value not in ("attention", "mlp") and _NAMES.fullmatch(value):
        return listed(value)
    return value


_NAMES = re.compile(r"\s*(\w+|[\w.]+(\s*,\s*[\w.]+)+)\s*")
Targets = Annotated[str | list[str], BeforeValidator(targets)]
Names = Annotated[list[str], BeforeValidator(listed)]


def listed_names(value: Any) -> Any:
    """As `listed`; `none` and nothing name nothing."""
    names = listed([] if value is None else value)
    return [name for name in names if name != "none"] if isinstance(names, list) else names


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, numbers written as text are numbers."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _valued(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse a flag without its value, which reads as true and so as 1; and decimal commas."""
        declared = str(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and "bool" not in declared:
            raise ValueError("it needs a value, not true or false")
        if isinstance(value, str) and "float" in declared and "dict" not in declared:
            number = decimal_comma(value)
            if number is not None:
                raise ValueError(f"write {number}, with a point")
        return value
