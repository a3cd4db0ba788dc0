"""What answers have to follow, JSON schemas and calls of tools: one grammar in every engine.

`xllamacpp` is built with llguidance, so llama.cpp follows the same keywords as ours. A schema that
llguidance refuses is dropped by llama.cpp's server without a word, which is why it is looked at
here first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lighten.errors import UserError, missing_extra
from lighten.serving.engine import EngineRefused, Generation

# One space after a comma and a colon, none elsewhere: a small model would write spaces for ever.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def laid_out(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema with the layout of its JSON."""
    return {**schema, "x-guidance": _LAYOUT}


def compiled(schema: Mapping[str, Any]) -> str:
    """The grammar of a schema, by llguidance; all of the schema is in it.

    Raises:
        UserError: It cannot be followed, with the reason; or llguidance is not installed.
    """
    try:
        text = json.dumps(laid_out(schema))
    except RecursionError:
        raise UserError("this JSON schema is nested too deeply") from None
    return _valid(_matcher().grammar_from_json_schema(text))


def grammar_of(generation: Generation) -> str | None:
    """The grammar that an answer has to follow, by llguidance; None where it is free.

    Raises:
        EngineRefused: It cannot be followed, or llguidance is not installed; names the field.
    """
    if generation.schema is None and generation.grammar is None:
        return None
    try:
        if generation.schema is not None:
            return compiled(generation.schema)
        return _valid(_matcher().grammar_from_lark(generation.grammar))
    except UserError as error:
        raise EngineRefused(f"{field_of(generation)}: {error}") from error


def field_of(generation: Generation) -> str:
    """The field that an answer's grammar comes from."""
    return "response_format" if generation.schema is not None else "tools"


def _matcher() -> Any:
    try:
        import llguidance
    except ImportError:
        raise missing_extra("llguidance", "serve") from None
    return llguidance.LLMatcher


def _valid(grammar: str) -> str:
    problem = str(_matcher().validate_grammar(grammar))
    # That of a regular expression has a line that points at the place in the line before it.
    lines = [line.strip() for line in problem.splitlines() if line.strip(" ^")]
    if lines:
        raise UserError(f"this JSON schema cannot be followed: {' '.join(lines)[:300]}")
    return grammar
