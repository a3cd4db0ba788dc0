"""The format in which a model writes tool calls: what its chat template makes of a made-up one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from lighten.data import Message
from lighten.data.asking import OPENED
from lighten.data.spans import EMPTY_THOUGHT, RefusedError, render
from lighten.data.special import MARKER, special_tokens
from lighten.serving.tools.parameters import Parameters
from lighten.serving.tools.reader import CallFormat, CallReader

_CALLED = "lighten_call"
_ARGUMENTS = {"lighten_argument": "lighten_value", "lighten_other": "lighten_text"}
_IDS = ("lighten01", "lighten02")  # as Mistral's templates want them
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": _CALLED, "description": "A call.",
        "parameters": {"type": "object", "properties": {
            key: {"type": "string", "description": "A value."} for key in _ARGUMENTS
        }, "required": list(_ARGUMENTS)},
    },
}  # fmt: skip
_QUESTION = Message("user", "?")


@dataclass(frozen=True)
class Abilities:
    """What a chat template does with tools.

    Attributes:
        describes: It writes the descriptions of tools into the prompt.
        writes_calls: It writes an assistant's calls of earlier turns.
        writes_results: It writes messages of role `tool`.
        calls: The format of calls; None: it is not understood.
    """

    describes: bool
    writes_calls: bool
    writes_results: bool
    calls: CallFormat | None


_CACHE: WeakKeyDictionary[Any, tuple[Any, Abilities]] = WeakKeyDictionary()


def abilities(tokenizer: Any, ends: Iterable[str]) -> Abilities:
    """What a tokenizer's chat template does with tools.

    Args:
        tokenizer: With its chat template chosen.
        ends: Tokens that end its answers.
    """
    state = tokenizer.chat_template, tuple(sorted(ends))
    entry = _CACHE.get(tokenizer)
    if entry is None or entry[0] != state:
        entry = _CACHE[tokenizer] = state, _abilities(tokenizer, state[1])
    return entry[1]


def _abilities(tokenizer: Any, ends: Iterable[str]) -> Abilities:
    one, two = (_with_calls(tokenizer, count) for count in (1, 2))
    result = Message("tool", MARKER, extra=(("tool_call_id", _IDS[0]), ("name", _CALLED)))
    with_result = _rendered(tokenizer, _QUESTION, _calling(1), result)
    prompt = _rendered(tokenizer, _QUESTION, add_generation_prompt=True)
    without = _rendered(tokenizer, _QUESTION, add_generation_prompt=True, tools=None)
    return Abilities(
        describes=prompt is not None and prompt != without,
        writes_calls=_CALLED in (one or ""),
        writes_results=MARKER in (with_result or "") or "u2060lighten" in (with_result or ""),
        calls=None if one is None else _format(one, two, [*ends, special_tokens(tokenizer).tail]),
    )


def _calling(count: int) -> Message:
    calls = [
        {"id": each, "type": "function",
         "function": {"name": _CALLED, "arguments": dict(_ARGUMENTS)}}
        for each in _IDS[:count]
    ]  # fmt: skip
    return Message("assistant", "", extra=(("tool_calls", calls),))


def _rendered(tokenizer: Any, *messages: Message, **options: Any) -> str | None:
    """A conversation as text; None where the template refuses it."""
    try:
        return render(messages, tokenizer, "", **{"tools": [_TOOL], **options})
    except RefusedError:
        return None


def _with_calls(tokenizer: Any, count: int) -> str | None:
    """An answer that calls the tool so many times, without its prompt and an empty thought.

    None where the template refuses it or writes another prompt before it.
    """
    text = _rendered(tokenizer, _QUESTION, _calling(count))
    prompt = _rendered(tokenizer, _QUESTION, add_generation_prompt=True) or ""
    marked = _rendered(tokenizer, _QUESTION, Message("assistant", MARKER)) or ""
    prompts = [
        prompt,
        OPENED.sub("", prompt),
        marked.partition(MARKER)[0] if MARKER in marked else "",
    ]
    fitting = [each for each in prompts if each and text is not None and text.startswith(each)]
    if text is None or not fitting:
        return None
    answer = text[len(max(fitting, key=len)) :]
    empty = EMPTY_THOUGHT.match(answer)
    return answer[empty.end() :] if empty else answer


@dataclass(frozen=True)
class _Span:
    """Where one call stands, and how it is written."""

    begin: int
    end: int
    name_key: str | None = None
    arguments_key: str | None = None
    middle: str = ""
    parameters: Parameters | None = None


def _format(one: str, two: str | None, ends: Iterable[str]) -> CallFormat | None:
    """The format of an answer with one call, and of one with two; None: it is not understood."""
    first = _span(one, 0)
    if first is None:
        return None
    end = _up_to(one[first.end :], ends)
    between, written = None, ""
    if two is not None and (before := _span(two, 0)) and (after := _span(two, before.end)):
        same = two[: before.begin] == one[: first.begin]
        if same and _up_to(two[after.end :], ends) == end:
            between, written = two[before.end : after.begin], two[: after.end] + end
    call_format = CallFormat(
        one[: first.begin], between, end, first.name_key, first.arguments_key, first.middle,
        first.parameters,
    )  # fmt: skip
    # A name without a mark before it is any word; gpt-oss calls otherwise than its template writes.
    unmarked = call_format.is_bare and call_format.name_key is None
    if unmarked or any(word in call_format.marks for word in (_CALLED, "<|channel|>")):
        return None
    read = [_read(call_format, one[: first.end] + end)]
    if between is not None:
        read.append(_read(call_format, written))
    return call_format if read == [1, 2][: len(read)] else None


def _read(call_format: CallFormat, text: str) -> int:
    """How many calls are read in a text that is nothing else."""
    functions = {_CALLED: _TOOL["function"]["parameters"]}
    content, calls = CallReader(call_format, functions).take(text, final=True)
    right = all((call.name, json.loads(call.arguments)) == (_CALLED, _ARGUMENTS) for call in calls)
    return len(calls) if right and not content else 0


def _up_to(text: str, ends: Iterable[str]) -> str:
    """A text up to the first of some tokens that end answers."""
    return text[: min((text.find(end) for end in ends if end and end in text), default=len(text))]


def _span(text: str, start: int) -> _Span | None:
    """The first call from a place on."""
    at = text.find(_CALLED, start)
    if at < 0:
        return None
    brace = text.rfind("{", start, at)
    while brace >= 0:
        value, end = _object(text, brace)
        names = [key for key, inner in value.items() if inner == _CALLED]
        arguments = [key for key, inner in value.items() if inner == _ARGUMENTS]
        if names and arguments:
            return _Span(brace, end, names[0], arguments[0])
        brace = text.rfind("{", start, brace)
    behind = at + len(_CALLED)
    brace = text.find("{", behind)
    value, end = _object(text, brace)
    if value == _ARGUMENTS:
        return _Span(at, end, middle=text[behind:brace])
    return _one_by_one(text, at, behind)


def _one_by_one(text: str, begin: int, behind: int) -> _Span | None:
    """A call whose arguments stand one by one behind its name."""
    words = [word for pair in _ARGUMENTS.items() for word in pair]
    places = [text.find(word, behind) for word in words]
    if min(places) < 0 or places != sorted(places):
        return None
    ends = [behind, *(place + len(word) for place, word in zip(places, words, strict=True))]
    before, after_key, between, same, rest = (
        text[end:place] for end, place in zip(ends, [*places, len(text)], strict=True)
    )
    pairs = zip(reversed(before), reversed(between), strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    before_key, after_value = between[len(between) - shared :], between[: len(between) - shared]
    marks = (before_key, after_key, after_value)
    if after_key != same or not rest.startswith(after_value) or not all(map(str.strip, marks)):
        return None
    middle = before[: len(before) - shared]
    return _Span(begin, ends[-1] + len(after_value), None, None, middle, Parameters(*marks))


def _object(text: str, at: int) -> tuple[dict[str, Any], int]:
    """The JSON object at a place, and where it ends; empty where there is none."""
    if at < 0:
        return {}, at
    try:
        value, end = json.JSONDecoder().raw_decode(text, at)
    except ValueError:
        return {}, at
    return value, end
