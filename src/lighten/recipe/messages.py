"""How the problems of a recipe are told: where each setting was said, its value, what to change."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from lighten.recipe import aliases, suggestions
from lighten.recipe.evaluating import EvaluateOptions
from lighten.recipe.fields import AdapterEntry, QuantizeOptions, RecipeFields
from lighten.recipe.sweeping import Range, SweepOptions

# A setting at the beginning of a sentence about it.
_SETTING = re.compile(r"[\w.-]+(?=[: ])")
_BY_NAME = "settings by name: {NAME: VALUE}"
# What pydantic says of these in words of its own.
_FORMS = {
    "bool_parsing": "true or false", "bool_type": "true or false", "model_type": _BY_NAME,
    "dict_type": _BY_NAME, "model_attributes_type": _BY_NAME, "list_type": "a list: [A, B]",
}  # fmt: skip
_KEYS = frozenset(
    name
    for section in (
        RecipeFields, EvaluateOptions, QuantizeOptions, AdapterEntry, SweepOptions, Range,
    )
    for name in section.model_fields
)  # fmt: skip


@dataclass(frozen=True)
class Places:
    """Where the settings of a recipe were said.

    Attributes:
        source: The recipe's file; of settings alone what they are called.
        lines: The line of each setting in the file, dotted where it stands in a section.
        overridden: Settings of the command line, by the names that were typed and by their own.
    """

    source: str
    lines: Mapping[str, int] = field(default_factory=dict)
    overridden: Collection[str] = ()

    def of(self, key: str) -> str:
        """Where a setting was said: on the command line, or in which line."""
        if any(name in self.overridden for name in (key, key.partition(".")[0])):
            return "command line"
        name = key if key in self.lines else self._alias(key)
        whole, _, entry = key.rpartition(".")
        if name is None and entry.isdigit():  # of a list
            return self.of(whole)
        return self.source if name is None else f"{self.source}:{self.lines[name]}"

    def told(self, problem: str) -> str:
        """A sentence that begins with its setting, behind the place where that was said."""
        setting = _SETTING.match(problem)
        # Of settings without a file all are typed alike.
        place = self.of(setting[0].rstrip(".")) if setting and self.lines else self.source
        return f"{place}: {problem}"

    def _alias(self, key: str) -> str | None:
        """Another tool's name by which the file says a setting."""
        section, dot, name = key.rpartition(".")
        names = (alias for alias, ours in aliases.RENAMED.items() if ours == name)
        return next(
            (full for alias in names if (full := f"{section}{dot}{alias}") in self.lines), None
        )


COMMAND_LINE = Places("command line")


def of_validation(error: ValidationError, places: Places, section: str | None = None) -> list[str]:
    """A sentence per setting that pydantic refuses.

    Args:
        error: What it says.
        places: Where settings were said.
        section: That was validated alone; None: the whole recipe.
    """
    problems: dict[str, str] = {}
    for item in error.errors():
        unknown = item["type"] == "extra_forbidden"
        key = f"{section}.{item['loc'][0]}" if section else _key(item["loc"], unknown=unknown)
        if key not in problems:  # pydantic tells a union's every branch
            problems[key] = f"{places.of(key)}: {_sentence(key, item)}"
        elif item["type"] == "literal_error":  # a word beside: auto
            problems[key] += f", or {item['ctx']['expected']}"
    # Of a list that may be one value too, the entry that is wrong says it all.
    return [
        problem for key, problem in problems.items()
        if not any(other.startswith(f"{key}.") for other in problems)
    ]  # fmt: skip


def _key(loc: tuple[int | str, ...], *, unknown: bool) -> str:
    if unknown:
        return ".".join(
            str(part) for part in loc if loc[0] != "sweep" or part not in ("grid", "range")
        )
    names = [str(part) for part in loc if str(part) in _KEYS or isinstance(part, int)]
    if loc[0] == "sweep" and "grid" in names:
        names.remove("grid")  # users write swept settings beside the options
    return ".".join(names) if names else str(loc[0])


def _sentence(key: str, item: Mapping[str, Any]) -> str:
    if item["type"] == "extra_forbidden":
        return f"{key} is not a setting; {suggestions.mend(key)}"
    if item["type"] == "missing":
        return f"{key} is missing; add it"
    reason = str(item["msg"]).removeprefix("Value error, ")
    choices = item.get("ctx", {}).get("expected") or _FORMS.get(item["type"])
    is_range = isinstance(item["input"], Mapping) and {"min", "max"} <= set(item["input"])
    if is_range and not key.startswith("sweep."):
        choices = f"one value, or sweep it: sweep: {{{key}: {{min: ..., max: ...}}}}"
    mend = f"use {choices}" if choices else reason[0].lower() + reason[1:]
    value = " ".join(repr(item["input"])[:300].split())  # a table of rows has lines
    return f"{key}: {value} does not do; {mend}"
