"""Values by their type: what is missing, what is text, what is a list written as JSON text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


class BadRowError(ValueError):
    """A row is broken: the reason."""


def is_missing(value: Any) -> bool:
    """Null, NaN or NaT: no value, whatever wrote it. 0, false and "" are values."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def without_missing(row: Mapping[Any, Any]) -> dict[str, Any]:
    """The row's columns that hold a value."""
    return {str(key): value for key, value in row.items() if not is_missing(value)}


def text_of(value: Any, name: str) -> str:
    """Text, a number as text, or the text parts of a list of parts.

    Raises:
        BadRowError: It is none of these.
    """
    if isinstance(value, str):
        if not value.isascii():
            _check_characters(value, name)
        return value
    if is_missing(value):
        raise BadRowError(f"{name} must be text, not nothing (null or NaN)")
    if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        non_text = [
            part_type for part in value if (part_type := part.get("type", "text")) != "text"
        ]
        if non_text:
            raise BadRowError(
                f"{name} holds a part of type {non_text[0]!r}; only text can be trained here"
            )
        return "".join(text_of(part.get("text"), f"{name}: a part") for part in value)
    if isinstance(value, bool):
        raise BadRowError(f"{name} must be text, not {str(value).lower()}")
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    raise BadRowError(f"{name} must be text, not {_type_name(value)}")


def optional_text(row: Mapping[str, Any], key: str) -> str:
    """The column's text; "" where it is missing."""
    return text_of(row[key], key) if not is_missing(row.get(key)) else ""


def decoded(value: Any, name: str) -> Any:
    """A value that may be written as JSON text, decoded once.

    Raises:
        BadRowError: It is text, but not JSON.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        value = JSON.decode(value)
    except (ValueError, RecursionError) as error:
        hint = "; it looks like Python's repr, write it with json.dumps" * (value[:2] in _REPRS)
        raise BadRowError(f"{name} is text, but not JSON{hint}") from error
    if isinstance(value, str):
        raise BadRowError(f"{name} is JSON text inside JSON text; write it with json.dumps once")
    return value


def check_nested(value: Any, name: str) -> None:
    """Refuse nested values that cannot be written as UTF-8.

    Raises:
        BadRowError: A text in it holds half of a surrogate pair.
    """
    if isinstance(value, str):
        _check_characters(value, name)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            check_nested(key, name)
            check_nested(inner, name)
    elif isinstance(value, list | tuple):
        for inner in value:
            check_nested(inner, name)


def _check_characters(value: str, name: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRowError(f"{name} holds half of a surrogate pair, no character") from None


def _type_name(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", float: "an infinite number"}
    return kinds.get(type(value), type(value).__name__)


def _constant(name: str) -> float | None:
    """NaN is no value; `json.dumps` writes it for what pandas calls missing."""
    return None if name == "NaN" else float(name.replace("Infinity", "inf"))


_REPRS = ("[{", "{'", "['")
JSON = json.JSONDecoder(parse_constant=_constant)
