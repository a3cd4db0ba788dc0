"""The grammar of answers that have to call: a template's marks, the names and the arguments.

It is llguidance's Lark, which every engine follows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lighten.errors import UserError
from lighten.serving.requests import Refused
from lighten.serving.schemas import compiled, laid_out
from lighten.serving.tools.fields import Function
from lighten.serving.tools.parameters import Parameters, choices_of, is_text, limits_of
from lighten.serving.tools.reader import CallFormat

# In one answer: small models would go on for ever.
_MOST_CALLS = 16
# What a schema says of an object's members together.
_OF_ALL = ("$ref", "anyOf", "oneOf", "allOf", "minProperties")


def call_grammar(
    tokenizer: Any, call_format: CallFormat, functions: Sequence[Function],
    places: Sequence[int], most: int | None, content: dict[str, Any] | None,
) -> str:  # fmt: skip
    """The grammar of answers that call some of the functions, or follow a JSON schema instead.

    Args:
        tokenizer: Of the model.
        call_format: In which it calls.
        functions: All of the request.
        places: Of those among them that may be called.
        most: Calls of an answer; None: any number.
        content: The schema of other answers; None: there are none.

    Raises:
        Refused: A schema that cannot be followed; names the field.
    """
    text = _Terminals(tokenizer)
    calls = f"{text(call_format.begin)} call"
    if call_format.between is not None and most != 1:
        calls += f" ({text(call_format.between)} call){{0,{_MOST_CALLS - 1}}}"
    lines = [f"start: calls{'' if content is None else ' | content'}",
             f"calls: {calls} {text(call_format.end)}",
             f"call: {' | '.join(f'call{place}' for place in places)}"]  # fmt: skip
    for place in places:
        function, number = functions[place], str(place)
        schema = _schema_of(function, f"tools[{place}].function.parameters")
        if call_format.name_key is not None:
            name = json.dumps(function.name, ensure_ascii=False)
            before = f'{{"{call_format.name_key}": {name}, "{call_format.arguments_key}": '
            words = f"{_literal(before)} arguments{number} {_literal('}')}"
        else:
            words = f"{text(function.name)} {text(call_format.middle)} arguments{number}"
        lines.append(f"call{number}: {words}")
        if call_format.parameters is None:
            lines.append(f"arguments{number}: {_json(schema)}")
        else:
            lines += _one_by_one(call_format.parameters, schema, place, text)
    if content is not None:
        _require_followed(content, "response_format")
        lines.append(f"content: {_json(content)}")
    return "\n".join(lines) + "\n"


class _Terminals:
    """Texts in Lark, tokens of their own by their ids."""

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_decoder.items()
        self._ids = {token.content: number for number, token in added if token.content}

    def __call__(self, text: str) -> str:
        words = []
        while text:
            at, token = min(
                ((text.find(token), token) for token in self._ids if token in text),
                key=lambda place: (place[0], -len(place[1])), default=(len(text), ""),
            )  # fmt: skip
            words += [_literal(text[:at])] if at else []
            words += [f"<[{self._ids[token]}]>"] if token else []
            text = text[at + len(token) :]
        return " ".join(words)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps(laid_out(schema))}"


def _schema_of(function: Function, field: str) -> dict[str, Any]:
    """The schema of a function's arguments.

    Raises:
        Refused: It cannot be followed.
    """
    schema = function.parameters
    if schema is None:  # OpenAI's meaning
        schema = {"properties": {}, "additionalProperties": False}
    schema = {"type": "object", **schema}
    if schema["type"] != "object":
        raise Refused(400, f"{field}: arguments are an object, not {schema['type']!r}", field)
    _require_followed(schema, field)
    return schema


def _require_followed(schema: Mapping[str, Any], field: str) -> None:
    try:
        compiled(schema)
    except UserError as error:
        raise Refused(400, f"{field}: {error}", field) from error


def _one_by_one(
    marks: Parameters, schema: Mapping[str, Any], number: int, text: _Terminals
) -> list[str]:
    """Arguments in the order of their schema, those that need not be there or not.

    Raises:
        Refused: Texts that stand as they are have to follow more than a list of them, or the
            arguments more than each its own schema.
    """
    field, named = f"tools[{number}].function.parameters", schema.get("properties") or {}
    of_all = [key for key in _OF_ALL if key in schema]
    of_all += [f"required {key!r}" for key in schema.get("required") or () if key not in named]
    if of_all:
        raise Refused(400, f"{field}: {of_all[0]} cannot be followed, since this model writes "
                      "arguments one by one; describe each in properties or use tool_choice auto",
                      field)  # fmt: skip
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    required, words, lines = schema.get("required") or (), [], []
    for place, (key, described) in enumerate(named.items()):
        name = f"argument{number}x{place}"
        words.append(name if key in required else f"{name}?")
        lines.append(f"{name}: {text(marks.before_key)} {_literal(key)} {text(marks.after_key)} "
                     f"value{name}")  # fmt: skip
        after = text(marks.after_value)
        as_text = is_text(described, schema)
        choices = choices_of(described, schema) if as_text else None
        if choices is not None:
            options = " | ".join(map(_literal, choices))
            lines.append(f"value{name}: ({options}) {after}")
        elif as_text:
            if limits := limits_of(described, schema):
                raise Refused(400, f"{field}: {limits[0]} cannot be followed, since this model "
                              "writes texts as they are, not as JSON; leave it out or use "
                              "tool_choice auto", field)  # fmt: skip
            lines.append(f"value{name}[suffix={_literal(marks.after_value)}]: /(?s:.*)/")
        else:
            described = {**shared, **described} if isinstance(described, Mapping) else {}
            lines += [f"value{name}: json{name} {after}", f"json{name}: {_json(described)}"]
    return [f"arguments{number}: {' '.join(words) or _literal('')}", *lines]
