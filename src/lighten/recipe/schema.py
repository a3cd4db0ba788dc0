"""The JSON schema of a recipe's file, which may say more than the typed settings hold.

A name alone stands for a list of it, a number for seconds, and swept settings stand in `sweep` by
their own names. Editors underline what a schema lacks.
"""

from __future__ import annotations

from typing import Any

_SECONDS = {"exclusiveMinimum": 0, "type": "number"}
_NAMES = {"type": "string"}
# Settings that `section.listed` reads, and times.
_LISTS = {
    "RecipeFields": ("report_to", "modules_to_save"), "AdapterEntry": ("modules_to_save",),
    "EvaluateOptions": ("extra_metrics", "tasks"), "QuantizeOptions": ("to",),
    "SweepOptions": ("reference",),
}  # fmt: skip
_TIMES = {"RecipeFields": ("max_time", "save_every"), "SweepOptions": ("budget",)}
# A section that is left empty asks for nothing.
SECTIONS = ("evaluate", "quantize", "sweep")


def complete(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with all that a file may say.

    Args:
        schema: As pydantic makes it of the settings.
    """
    sections = schema["$defs"]
    parts = {"RecipeFields": schema, **sections}
    for also, extra in ((_LISTS, _NAMES), (_TIMES, _SECONDS)):
        for section, names in also.items():
            fields = parts[section]["properties"]
            fields |= {name: _or(fields[name], extra) for name in names}
    schema["properties"]["report_to"]["anyOf"][0]["items"]["enum"].append("none")
    swept = sections["SweepOptions"]["properties"]
    grid = swept["grid"]["additionalProperties"]
    for name, field in schema["properties"].items():
        if name not in (*SECTIONS, *swept):
            one = {"type": ["string", "number", "boolean"]}
            swept[name] = {**_or(grid, one), "description": field["description"]}
    for name in SECTIONS:
        schema["properties"][name] = _or(schema["properties"][name], {"type": "null"})
    return schema


def _or(field: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """A field that may be something else, too."""
    shape = {key: field[key] for key in field if key in ("$ref", "type", "items", "pattern")}
    rest = {key: value for key, value in field.items() if key not in shape}
    several = rest.pop("anyOf", None) or rest.pop("oneOf", None) or [shape]
    return {**rest, "anyOf": [*several, extra]}
