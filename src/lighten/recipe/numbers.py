"""Numbers as people write them: a decimal comma is asked about, never taken for a list."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lighten.recipe import aliases

# A whole number, a comma, digits: 2,5e-4. A point or an exponent before the comma makes a list.
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+(?:[eE][+-]?\d+)?")
# The same inside a longer list; 16,32 are two values where whole numbers are usual.
_CLEARLY_DECIMAL = re.compile(r"[+-]?\d+,(?:0\d+|\d+[eE][+-]?\d+)")
_USUALLY_WHOLE = ("lora_alpha", "warmup_steps")


def decimal_comma(text: str) -> str | None:
    """The number with a point if the text writes one with a decimal comma, else None."""
    stripped = text.strip()
    return stripped.replace(",", ".") if _DECIMAL_COMMA.fullmatch(stripped) else None


def ambiguous_list(key: str, text: str, fields: Mapping[str, Any]) -> str | None:
    """Why a setting's text cannot be split at its commas, or None if it can.

    Args:
        key: The setting, perhaps by another tool's name or in the section `sweep`.
        text: Its value as typed, without brackets.
        fields: The recipe's fields by name.
    """
    name = key.removeprefix("sweep.")
    name = aliases.RENAMED.get(name, name)
    field = fields.get(name)
    declared = "" if field is None else str(field.annotation)
    if "float" not in declared or "dict" in declared:
        return None
    pattern = _CLEARLY_DECIMAL if name in _USUALLY_WHOLE else _DECIMAL_COMMA
    place = re.search(rf"(?:^|,)\s*({pattern.pattern})\s*(?=,|$)", text)
    if place is None:
        return None
    number = place[1].replace(",", ".")
    if "list" not in declared and not key.startswith("sweep."):
        return f"{key}: {text!r} is no number; write {number}, with a point, or [{text}] to sweep"
    return (
        f"{key}: {text!r} may mean {number} or the values {place[1].replace(',', ' and ')}; write "
        f"{number} with a point, or [{text}] for a list"
    )
