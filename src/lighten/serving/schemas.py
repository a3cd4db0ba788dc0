"""JSON schemas: what both engines make of one, by llguidance.

`xllamacpp` is built with llguidance, so llama.cpp follows the same keywords as ours. A schema that
llguidance refuses is dropped by llama.cpp's server without a word, which is why it is looked at
here first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lighten.errors import UserError, missing_extra

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
        import llguidance
    except ImportError:
        raise missing_extra("llguidance", "serve") from None
    try:
        text = json.dumps(laid_out(schema))
    except RecursionError:
        raise UserError("this JSON schema is nested too deeply") from None
    grammar: str = llguidance.LLMatcher.grammar_from_json_schema(text)
    problem = str(llguidance.LLMatcher.validate_grammar(grammar))
    # That of a regular expression has a line that points at the place in the line before it.
    lines = [line.strip() for line in problem.splitlines() if line.strip(" ^")]
    if lines:
        raise UserError(f"this JSON schema cannot be followed: {' '.join(lines)[:300]}")
    return grammar
