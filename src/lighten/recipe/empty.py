"""Settings that are left empty, by any of their names: they ask for nothing."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from lighten.recipe import aliases
from lighten.recipe.evaluating import EvaluateOptions
from lighten.recipe.fields import QuantizeOptions, RecipeFields
from lighten.recipe.sweeping import SweepOptions

_SECTIONS: dict[str, type[BaseModel]] = {
    "evaluate": EvaluateOptions, "quantize": QuantizeOptions, "sweep": SweepOptions,
}  # fmt: skip


def _valued(section: type[BaseModel]) -> frozenset[str]:
    """The settings of a section for which null is no value: `save_total_limit: null` says a lot."""
    return frozenset(
        name
        for name, field in section.model_fields.items()
        if not (
            get_origin(field.annotation) in (Union, types.UnionType)
            and types.NoneType in get_args(field.annotation)
        )
    )


_VALUED = _valued(RecipeFields)
_VALUED_IN = {name: _valued(section) for name, section in _SECTIONS.items()}


def left_out(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Settings without those that are left empty.

    Args:
        values: Settings by name, ours or another tool's; those of a section in it, or dotted.

    Returns:
        The others, the names of recipe-wide ones that were left empty, and a sentence per problem.
    """
    kept: dict[str, Any] = {}
    empty: list[str] = []
    problems: list[str] = []
    for key, value in values.items():
        section, _, name = key.partition(".")
        if value is None and key == "max_length":
            problems.append(
                "max_length is empty, with which TRL cuts no row; give the most tokens that a row "
                "may have"
            )
        elif value is None and aliases.RENAMED.get(key, key) in _VALUED - _SECTIONS.keys():
            empty.append(key)
        elif value is not None or name not in _VALUED_IN.get(section, ()):
            kept[key] = _filled(section, value) if not name else value
    return kept, empty, problems


def _filled(section: str, value: Any) -> Any:
    """A section without what is left empty in it; any other value as it is."""
    if section not in _SECTIONS or not isinstance(value, Mapping):
        return value
    return {
        name: inner
        for name, inner in value.items()
        if inner is not None or name not in _VALUED_IN[section]
    }


def told(names: Iterable[str], recipe: RecipeFields) -> list[str]:
    """What holds in place of settings that were left empty."""
    ours = dict.fromkeys(aliases.RENAMED.get(name, name) for name in names)
    values = ", ".join(f"{name}: {getattr(recipe, name)}" for name in ours)
    return [f"left empty, which asks for nothing; what holds: {values}"] * bool(ours)
