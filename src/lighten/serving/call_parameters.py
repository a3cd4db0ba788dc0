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
            return text
        try:
            return _WORDS[word] if (word := text.strip()) in _WORDS else JSON.decode(text)
        except (ValueError, RecursionError):
            return text


def is_text(described: Any) -> bool:
    """Whether a schema takes texts, which are written as they are."""
    if not isinstance(described, Mapping):
        return False
    options = described.get("anyOf") or described.get("oneOf") or ()
    kind = described.get("type")
    kinds = kind if isinstance(kind, list) else [kind]
    choices = described.get("enum") or [described.get("const")]
    return (
        "string" in kinds
        or (kind is None and all(isinstance(choice, str) for choice in choices))
        or any(is_text(option) for option in options)
    )
