"""Tool calls in a model's text: read as it comes, whatever format its template writes them in."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lighten.serving.tools.parameters import JSON, Parameters

# Llama's mark of a call, which its models write or leave out.
TAG = "<|python_tag|>"
_LETTERS = string.ascii_letters + string.digits
_NAME = re.compile(r"\s*([\w.:/-]+)")
_KEY = re.compile(r"\s*([^<>\s]+(?: +[^<>\s]+)*)")
_FIRST_WORD = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]|\S+")


@dataclass(frozen=True)
class Call:
    """A call that is whole.

    Attributes:
        index: Its place among those of one answer.
        id: By which the message with its result names it.
        name: Of the function.
        arguments: As JSON text.
    """

    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class CallFormat:
    """How calls stand in an answer, as the chat template writes them.

    Attributes:
        begin: Before the first call. Where it is nothing or Llama's mark, calls are the beginning
            of an answer and nothing tells them from other JSON.
        between: Between two calls; None: the template writes one at most.
        end: After the last one.
        name_key: Of the JSON object that a call is; None: a call is its name, `middle` and the
            JSON of its arguments.
        arguments_key: Of the same.
        middle: Between name and arguments.
        parameters: Where arguments stand one by one behind the name, what stands around each.
    """

    begin: str
    between: str | None
    end: str
    name_key: str | None = None
    arguments_key: str | None = None
    middle: str = ""
    parameters: Parameters | None = None

    @property
    def is_bare(self) -> bool:
        """Whether calls have no mark that other answers have not."""
        return self.begin.strip() in ("", TAG)

    @property
    def marks(self) -> str:
        """All that it writes around names and arguments."""
        one_by_one = self.parameters or Parameters("", "", "")
        return " ".join((
            self.begin, self.between or "", self.middle, self.end, one_by_one.before_key,
            one_by_one.after_key, one_by_one.after_value,
        ))  # fmt: skip

    def new_id(self) -> str:
        """Mistral's templates take ids of nine letters and digits alone."""
        if "[TOOL_CALLS]" in self.begin:
            return "".join(secrets.choice(_LETTERS) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


class _NotYet(Exception):
    """The text ends before it is clear whether it holds a call."""


class _NoCall(Exception):
    """The text holds none here."""


class CallReader:
    """Tells the calls in one answer's text from the rest of it.

    What may be the beginning of a call is held back until that is clear; what turns out to be
    none is content. White space around calls belongs to neither; content before and after them is
    on lines of its own.

    Args:
        call_format: Of the model.
        functions: Those that may be called, with the JSON schemas of their arguments; where calls
            have no mark, an object that names another one is content.
        most: Calls after which the answer ends; None: any number.
        thinking: Whether the prompt opened a thought. What stands in a thought is no call.

    Attributes:
        count: Calls so far.
    """

    def __init__(
        self, call_format: CallFormat, functions: Mapping[str, Mapping[str, Any] | None], *,
        most: int | None = None, thinking: bool = False,
    ) -> None:  # fmt: skip
        self.count = 0
        self._format, self._functions, self._most = call_format, functions, most
        self._thinking = thinking
        self._begin, self._end, self._middle = (
            "".join(text.split())
            for text in (call_format.begin, call_format.end, call_format.middle)
        )
        between = None if call_format.between is None else "".join(call_format.between.split())
        # Where each call has its own marks, one after another is read like the first.
        self._between = None if between == self._end + self._begin else between
        self._mark = "" if call_format.is_bare else _first_word(call_format.begin)
        self._pending = self._content = ""
        self._only_content = self._after_call = False
        self._awaits_brace = False

    @property
    def complete(self) -> bool:
        """Whether as many calls were read as are wanted."""
        return self._most is not None and self.count >= self._most

    def take(self, text: str, *, final: bool = False) -> tuple[str, list[Call]]:
        """What is known after some more text: content, and calls that are whole.

        Args:
            text: The next part of the answer.
            final: Whether the answer ends with it; nothing is held back then.
        """
        self._pending += text
        if self._awaits_brace and not final and "}" not in text:
            return "", []
        self._awaits_brace = False
        shown, calls = "", []
        while self._pending and not self.complete:
            at, content = (self._bare if self._format.is_bare else self._marked)(final=final)
            if at is None:
                shown += self._show(content)
                break
            before = self._pending[:at].rstrip()
            try:
                read, end = self._group(self._pending, at, final=final)
            except _NotYet:
                if final:
                    shown += self._show(self._refused(at))
                    continue
                self._pending = self._pending[len(before) :]
                shown += self._show(before)
                break
            except _NoCall:
                shown += self._show(self._refused(at))
                continue
            shown += self._show(before)
            calls += [self._numbered(*call) for call in read if not self.complete]
            self._pending, self._after_call = self._pending[end:], True
        return shown, calls

    def _numbered(self, name: str, arguments: Mapping[str, Any]) -> Call:
        self.count += 1
        return Call(self.count - 1, self._format.new_id(), name, as_text(arguments))

    def _show(self, text: str) -> str:
        if self._after_call:
            text = text.lstrip()
            self._after_call = not text
            if text and self._content:
                text = f"\n{text}"
        self._content += text
        return text

    def _refused(self, at: int) -> str:
        """Content, and no call, up to behind the mark at a place; it is taken out of the text."""
        end = at + len(self._mark) if self._mark else len(self._pending)
        self._only_content = not self._mark
        text, self._pending = self._pending[:end], self._pending[end:]
        return text

    def _bare(self, *, final: bool) -> tuple[int | None, str]:
        """Where a call may begin, which is at the beginning alone; else what is content."""
        text = self._pending.lstrip()
        begins = text.startswith(("{", TAG)) or (TAG.startswith(text) and not final)
        if begins and not self._only_content and not self.count:
            return 0, ""
        self._only_content = True
        text, self._pending = self._pending, ""
        return None, text

    def _marked(self, *, final: bool) -> tuple[int | None, str]:
        """Where a call's mark stands outside of a thought; else what is content by now."""
        at = self._pending.find(self._mark)
        while at >= 0 and self._in_thought(self._content + self._pending[:at]):
            at = self._pending.find(self._mark, at + 1)
        if at >= 0:
            return at, ""
        shown = self._pending
        if not final:
            longest = min(len(self._mark) - 1, len(shown))
            held = (n for n in range(longest, 0, -1) if shown.endswith(self._mark[:n]))
            shown = shown[: len(shown) - next(held, 0)].rstrip()
        self._pending = self._pending[len(shown) :]
        return None, shown

    def _in_thought(self, text: str) -> bool:
        opened = self._thinking or text.lstrip().startswith("<think>")
        return opened and "</think>" not in text

    def _group(
        self, text: str, at: int, *, final: bool
    ) -> tuple[list[tuple[str, Mapping[str, Any]]], int]:
        """The calls that stand together at a place, and where they end."""
        if self._format.is_bare:
            return self._bare_group(text, final=final)
        at, calls = _past(self._begin, text, at), []
        following: int | None = at
        while following is not None:
            call, at = self._call(text, following)
            calls.append(call)
            following = self._following(text, at, final=final)
        try:
            return calls, _past(self._end, text, at)
        except _NotYet:
            if not final or self._format.parameters is not None:
                raise
            return calls, len(text)  # a token that ended the answer stood for it

    def _following(self, text: str, at: int, *, final: bool) -> int | None:
        """Where another call of the same group begins."""
        if not self._between:
            return None
        try:
            return _past(self._between, text, at)
        except _NoCall:
            return None
        except _NotYet:
            if not final:
                raise
            return None

    def _bare_group(
        self, text: str, *, final: bool
    ) -> tuple[list[tuple[str, Mapping[str, Any]]], int]:
        calls: list[tuple[str, Mapping[str, Any]]] = []
        at = 0
        while True:
            with contextlib.suppress(_NoCall):
                at = _past(TAG, text, at)
            try:
                call, end = self._call(text, at)
                if call[0] not in self._functions:
                    raise _NoCall
            except (_NoCall, _NotYet) as error:
                if not calls or (isinstance(error, _NotYet) and not final):
                    raise
                return calls, at
            calls.append(call)
            rest = text[end:].lstrip("; \n")
            at = len(text) - len(rest)
            if not rest and not final:
                raise _NotYet  # another one may follow
            if not rest:
                return calls, at

    def _call(self, text: str, at: int) -> tuple[tuple[str, Mapping[str, Any]], int]:
        """Name and arguments of the call at a place, and where it ends."""
        if self._format.name_key is None:
            match = _NAME.match(text, at)
            if match is None:
                raise _NoCall if text[at:].strip() else _NotYet
            if match.end() == len(text):
                raise _NotYet  # the name may go on
            at = _past(self._middle, text, match.end())
            if self._format.parameters is not None:
                arguments, at = self._one_by_one(text, at, match[1], self._format.parameters)
            else:
                arguments, at = self._object(text, at)
            return (match[1], arguments), at
        written, at = self._object(text, at)
        keys = (self._format.arguments_key, "arguments", "parameters")
        key = next((key for key in keys if key in written), None)
        name, arguments = written.get(self._format.name_key), written.get(str(key), {})
        if isinstance(arguments, str):
            try:
                arguments = JSON.decode(arguments)
            except (ValueError, RecursionError):
                raise _NoCall from None
        named = isinstance(name, str) and name and (key is not None or not self._format.is_bare)
        if not named or not isinstance(arguments, dict):
            raise _NoCall
        return (str(name), arguments), at

    def _one_by_one(
        self, text: str, at: int, name: str, marks: Parameters
    ) -> tuple[dict[str, Any], int]:
        arguments: dict[str, Any] = {}
        while True:
            try:
                at = _past("".join(marks.before_key.split()), text, at)
            except _NoCall:
                return arguments, at
            key = _KEY.match(text, at)
            if key is None or key.end() == len(text):
                raise _NoCall if text[at:].strip() and key is None else _NotYet
            at = _past("".join(marks.after_key.split()), text, key.end())
            end = text.find(marks.after_value.strip(), at)
            if end < 0:
                raise _NotYet
            schema = self._functions.get(name)
            arguments[key[1]] = marks.value(text[at:end], key[1], schema)
            at = _past("".join(marks.after_value.split()), text, end)

    def _object(self, text: str, at: int) -> tuple[dict[str, Any], int]:
        at += len(text[at:]) - len(text[at:].lstrip())
        if at == len(text):
            raise _NotYet
        if text[at] != "{":
            raise _NoCall
        try:
            value, end = JSON.raw_decode(text, at)
        except (ValueError, RecursionError):
            self._awaits_brace = True
            raise _NotYet from None
        return value, end


def as_text(arguments: Mapping[str, Any]) -> str:
    """Arguments as JSON; half of a character, which no text can hold, as its escape."""
    text = json.dumps(arguments, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(arguments)
    return text


def _first_word(text: str) -> str:
    match = _FIRST_WORD.match(text.strip())
    assert match is not None
    return match[0]


def _past(mark: str, text: str, at: int) -> int:
    """The place behind a mark, whose white space may be any.

    Raises:
        _NotYet: The text ends inside it.
        _NoCall: Another text stands there.
    """
    for letter in mark:
        while at < len(text) and text[at].isspace():
            at += 1
        if at == len(text):
            raise _NotYet
        if text[at] != letter:
            raise _NoCall
        at += 1
    return at
