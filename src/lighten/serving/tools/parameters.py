"""Arguments that stand one by one between marks, as Qwen3.5, Nemotron and GLM write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


# Models write ends of lines into their texts, which strict JSON does not take.
JSON = json.JSONDecoder(parse_constant=_no_number, strict=False)
# What templates write with Jinja's own words for them.
_WORDS = {"True": True, "False": False, "None": None}


@dataclass(frozen=True)
class Parameters:
    """What stands around each argument.

    Attributes:
        before_key: Before its name.
        after_key: Between name and value. A text is written as it is, anything else as JSON.
        after_value: After the value.
    """

    before_key: str
    after_key: str
    after_value: str

    def value(self, text: str, key: str, schema: Mapping[str, Any] | None) -> Any:
        """An argument from its text.

        Args:
            text: What stands between the marks, their white space included.
            key: Its name.
            schema: Of all arguments.
        """
        if self.after_key.endswith("\n"):
            text = text.removeprefix("\n")
        if self.after_value.startswith("\n"):
            text = text.removesuffix("\n")
        described = ((schema or {}).get("properties") or {}).get(key)
        if is_text(described, schema):
            options = _options(described, schema)
            nothing = any("null" in _kinds(option) for option in options)
            return None if nothing and text.strip() in ("null", "None") else text
        try:
            return _WORDS[word] if (word := text.strip()) in _WORDS else JSON.decode(text)
        except (ValueError, RecursionError):
            return text


def is_text(described: Any, schema: Mapping[str, Any] | None) -> bool:
    """Whether an argument takes texts, which are written as they are.

    Args:
        described: Its schema.
        schema: Of all arguments, which holds what that refers to.
    """
    return any("string" in _kinds(option) for option in _options(described, schema))


def choices_of(described: Any, schema: Mapping[str, Any] | None) -> list[str] | None:
    """The texts that an argument of texts takes; None: any. See `is_text`."""
    choices: list[str] = []
    for option in _options(described, schema):
        if _kinds(option) == ["null"]:
            choices.append("null")
            continue
        values = option.get("enum") or ([option["const"]] if "const" in option else None)
        if values is None:
            return None
        choices += [value if isinstance(value, str) else json.dumps(value) for value in values]
    return choices


def limits_of(described: Any, schema: Mapping[str, Any] | None) -> list[str]:
    """What else a schema says of an argument's texts; see `is_text`."""
    return [
        name
        for option in _options(described, schema)
        for name in ("pattern", "minLength", "maxLength")
        if name in option
    ]


def _options(
    described: Any, schema: Mapping[str, Any] | None, followed: frozenset[str] = frozenset()
) -> list[Mapping[str, Any]]:
    """The schemas that stand for alternatives in one, those that it refers to among them."""
    if not isinstance(described, Mapping):
        return []
    reference = described.get("$ref")
    if isinstance(reference, str):
        if reference in followed:  # it refers to itself
            return []
        target: Any = schema
        for part in reference.removeprefix("#/").split("/"):
            target = target.get(part) if isinstance(target, Mapping) else None
        return _options(target, schema, followed | {reference})
    several, whole = described.get("anyOf") or described.get("oneOf"), described.get("allOf")
    if several is None and isinstance(whole, list) and len(whole) == 1:
        several = whole  # pydantic's, of a reference with a default
    if not isinstance(several, list):
        return [described]
    return [inner for option in several for inner in _options(option, schema, followed)]


def _kinds(option: Mapping[str, Any]) -> list[str]:
    kind = option.get("type")
    if kind is not None:
        return kind if isinstance(kind, list) else [kind]
    values = option.get("enum") or [option.get("const")]
    return ["string"] if isinstance(values, list) and isinstance(values[0], str) else []
