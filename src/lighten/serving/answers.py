"""What clients get: OpenAI's bodies, whole and streamed."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from lighten.serving.echo import Echo
from lighten.serving.engine import Finish, Piece, TokenLogprob
from lighten.serving.tools.reader import Call

# Ends of lines to clients that read a stream as Python reads text, as httpx does; to no others.
_LINE_ENDS = {ord(end): json.dumps(end)[1:-1] for end in "\x85\u2028\u2029"}


@dataclass
class Choice:
    """One answer as far as it is made."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None
    tokens: int = 0
    cached: int = 0
    missing_logprobs: int = 0
    prompt: tuple[TokenLogprob, ...] = ()
    calls: list[Call] = field(default_factory=list)


@dataclass(frozen=True)
class Usage:
    """Tokens of a request and its answers."""

    prompt: int
    completion: int
    cached: int = 0

    def body(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {
            "prompt_tokens": self.prompt, "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }  # fmt: skip


class Form(Protocol):
    """How one of the two routes writes its answers."""

    def full_body(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """The body of an answer that is not streamed."""

    def first(self, number: int, prompt: Sequence[TokenLogprob]) -> str | None:
        """What a stream begins each answer with.

        Args:
            number: Of the answer.
            prompt: Its tokens, where their log-probabilities were asked for.
        """

    def part(self, number: int, piece: Piece) -> str:
        """The next part of a streamed answer."""

    def usage(self, usage: Usage) -> str:
        """The last event of a stream whose client wants to know."""


class _BaseForm:
    def __init__(
        self, object_type: str, chunk: str, prefix: str, model: str, logprobs: bool,
        prompt_logprobs: int | None,
    ) -> None:  # fmt: skip
        self._object_type, self._chunk, self._logprobs = object_type, chunk, logprobs
        self._prompt_logprobs = prompt_logprobs
        self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()),
                      "model": model}  # fmt: skip

    def _event(self, choices: list[dict[str, Any]], **extra: Any) -> str:
        body = {**self._head, "object": self._chunk, "choices": choices, **extra}
        text = json.dumps(body, ensure_ascii=False).translate(_LINE_ENDS)
        return f"data: {text}\n\n"

    def usage(self, usage: Usage) -> str:
        """See `Form`."""
        return self._event([], usage=usage.body())

    def _of_prompt(self, choice: Choice) -> dict[str, Any]:
        """What vLLM calls `prompt_logprobs`, where they were asked for."""
        most = self._prompt_logprobs
        if most is None:
            return {}
        return {"prompt_logprobs": [
            None if token.logprob is None else {
                str(each.id): {
                    "logprob": each.logprob, "rank": each.rank, "decoded_token": each.text
                } for each in (token, *token.top[:most])
            } for token in choice.prompt
        ]}  # fmt: skip


class ChatForm(_BaseForm):
    """`/v1/chat/completions`."""

    def __init__(self, model: str, logprobs: bool, prompt_logprobs: int | None = None) -> None:
        super().__init__("chat.completion", "chat.completion.chunk", "chatcmpl", model, logprobs,
                         prompt_logprobs)  # fmt: skip

    def full_body(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """See `Form`."""
        return {
            **self._head, "object": self._object_type,
            "choices": [
                {"index": number, "finish_reason": choice.finish,
                 "message": _message(choice),
                 "logprobs": self._probabilities(choice.logprobs, choice.missing_logprobs)}
                for number, choice in enumerate(choices)
            ],
            "usage": usage.body(), **self._of_prompt(choices[0]),
        }  # fmt: skip

    def first(
        self,
        number: int,
        prompt: Sequence[TokenLogprob],  # noqa: ARG002  # see the other route
    ) -> str | None:
        """See `Form`."""
        delta = {"role": "assistant", "content": ""}
        return self._event([{"index": number, "delta": delta, "logprobs": None,
                             "finish_reason": None}])  # fmt: skip

    def part(self, number: int, piece: Piece) -> str:
        """See `Form`."""
        known = piece.logprobs or piece.missing_logprobs
        logprobs = self._probabilities(piece.logprobs, piece.missing_logprobs) if known else None
        deltas = [delta for call in piece.calls for delta in _deltas(call)]
        if piece.text or not (piece.finish or deltas):
            deltas.insert(0, {"content": piece.text})
        if not deltas or (piece.calls and piece.finish):
            deltas.append({})
        last = len(deltas) - 1
        return "".join(
            self._event([{"index": number, "delta": delta,
                          "logprobs": logprobs if place == 0 else None,
                          "finish_reason": piece.finish if place == last else None}])
            for place, delta in enumerate(deltas)
        )  # fmt: skip

    def _probabilities(
        self, logprobs: Sequence[TokenLogprob], missing: int
    ) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = [
            {**_token(token), "top_logprobs": [_token(top) for top in token.top]}
            for token in logprobs
        ]
        body = {"content": content, "refusal": None}
        return {**body, "missing_tokens": missing} if missing else body


class CompletionForm(_BaseForm):
    """`/v1/completions`.

    Args:
        model: Who answers.
        logprobs: Alternatives for each token; None: no log-probabilities.
        prompt_logprobs: The same, for those that are told apart from the answer.
        echoes: Each answer's prompt, where answers begin with it.
    """

    def __init__(
        self, model: str, logprobs: int | None, prompt_logprobs: int | None = None,
        echoes: Sequence[Echo] | None = None,
    ) -> None:  # fmt: skip
        super().__init__("text_completion", "text_completion", "cmpl", model,
                         logprobs is not None, prompt_logprobs)  # fmt: skip
        self._most, self._echoes = logprobs, echoes

    def full_body(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        """See `Form`."""
        return {
            **self._head, "object": self._object_type,
            "choices": [
                {"index": number, "text": self._echo(number).text + choice.text,
                 "finish_reason": choice.finish,
                 "logprobs": self._probabilities(
                     self._shown(number, choice.prompt, choice.logprobs), choice.missing_logprobs
                 ), **self._of_prompt(choice)}
                for number, choice in enumerate(choices)
            ],
            "usage": usage.body(),
        }  # fmt: skip

    def first(self, number: int, prompt: Sequence[TokenLogprob]) -> str | None:
        """See `Form`."""
        if self._echoes is None:
            return None
        logprobs = self._probabilities(self._shown(number, prompt, ()), 0)
        return self._event([{"index": number, "text": self._echo(number).text,
                             "logprobs": logprobs, "finish_reason": None}])  # fmt: skip

    def _echo(self, number: int) -> Echo:
        return _NO_ECHO if self._echoes is None else self._echoes[number]

    def _shown(
        self, number: int, prompt: Sequence[TokenLogprob], answer: Sequence[TokenLogprob]
    ) -> list[TokenLogprob]:
        """The tokens that an answer shows, with their places in its text."""
        echo = self._echo(number)
        shown = prompt if self._echoes is not None else ()
        return [
            *(replace(token, offset=offset, top=token.top[: self._most])
              for token, offset in zip(shown, echo.offsets, strict=bool(shown))),
            *(replace(token, offset=token.offset + len(echo.text)) for token in answer),
        ]  # fmt: skip

    def part(self, number: int, piece: Piece) -> str:
        """See `Form`."""
        logprobs, tokens = None, self._shown(number, (), piece.logprobs)
        if tokens or piece.missing_logprobs:
            logprobs = self._probabilities(tokens, piece.missing_logprobs)
        return self._event([{"index": number, "text": piece.text, "logprobs": logprobs,
                             "finish_reason": piece.finish}])  # fmt: skip

    def _probabilities(
        self, logprobs: Sequence[TokenLogprob], missing: int
    ) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        body = {
            "tokens": [_token_key(token) for token in logprobs],
            "token_logprobs": [token.logprob for token in logprobs],
            "top_logprobs": [_top(token) for token in logprobs],
            "text_offset": [token.offset for token in logprobs],
        }
        return {**body, "missing_tokens": missing} if missing else body


_NO_ECHO = Echo("", ())


def _top(token: TokenLogprob) -> dict[str, float] | None:
    """A token's alternatives; itself is always among them, so there may be one more than wanted."""
    if token.logprob is None:
        return None
    top: dict[str, Any] = {}
    for each in (*token.top, token):
        top.setdefault(_token_key(each), each.logprob)  # of two that look alike the likelier
    return top


def _message(choice: Choice) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.calls:
        message["content"] = choice.text or None
        message["tool_calls"] = [
            {"id": call.id, "type": "function",
             "function": {"name": call.name, "arguments": call.arguments}}
            for call in choice.calls
        ]  # fmt: skip
    return message


def _deltas(call: Call) -> list[dict[str, Any]]:
    """A call in a stream: who is called, then with what."""
    begun = {"index": call.index, "id": call.id, "type": "function",
             "function": {"name": call.name, "arguments": ""}}  # fmt: skip
    arguments = {"index": call.index, "function": {"arguments": call.arguments}}
    return [{"tool_calls": [begun]}, {"tool_calls": [arguments]}]


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.bytes)}


def _token_key(token: TokenLogprob) -> str:
    """A token as the key of a mapping, where no two may look alike.

    Parts of a character have their bytes in their name, as at OpenAI, and tokens without a text
    their id, as at vLLM.
    """
    if not token.text:
        return f"token_id:{token.id}"
    if "\N{REPLACEMENT CHARACTER}" not in token.text:
        return token.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.bytes)


def failure_event(body: dict[str, Any]) -> str:
    """An error inside a stream, as OpenAI's clients raise it."""
    return f"data: {json.dumps(body)}\n\n"
