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
        if is_text(described):
            nothing = any("null" in _kinds(option) for option in _options(described))
            return None if nothing and text.strip() in ("null", "None") else text
        try:
            return _WORDS[word] if (word := text.strip()) in _WORDS else JSON.decode(text)
        except (ValueError, RecursionError):
            return text


def is_text(described: Any) -> bool:
    """Whether a schema takes texts, which are written as they are."""
    return any("string" in _kinds(option) for option in _options(described))


def choices_of(described: Any) -> list[str] | None:
    """The texts that a schema of texts takes; None: any."""
    choices: list[str] = []
    for option in _options(described):
        if _kinds(option) == ["null"]:
            choices.append("null")
            continue
        values = option.get("enum") or ([option["const"]] if "const" in option else None)
        if values is None:
            return None
        choices += [value if isinstance(value, str) else json.dumps(value) for value in values]
    return choices


def limits_of(described: Any) -> list[str]:
    """What else a schema says of its texts."""
    return [
        name
        for option in _options(described)
        for name in ("pattern", "minLength", "maxLength")
        if name in option
    ]


def _options(described: Any) -> list[Mapping[str, Any]]:
    """The schemas that stand for alternatives in one."""
    if not isinstance(described, Mapping):
        return []
    several = described.get("anyOf") or described.get("oneOf")
    if not isinstance(several, list):
        return [described]
    return [inner for option in several for inner in _options(option)]


def _kinds(option: Mapping[str, Any]) -> list[str]:
    kind = option.get("type")
    if kind is not None:
        return kind if isinstance(kind, list) else [kind]
    values = option.get("enum") or [option.get("const")]
    return ["string"] if isinstance(values, list) and isinstance(values[0], str) else []
