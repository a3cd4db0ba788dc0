"""The verb `chat --url`: talk to a server in the terminal, or through a pipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TextIO

from lighten.dialogue import converse
from lighten.errors import UserError
from lighten.serving.remote import Remote, ServerError, Streamed

_LONGEST_ANSWER = "max_completion_tokens"


class _Models:
    """A server's models, and the words said so far."""

    def __init__(self, remote: Remote, system: str | None, options: dict[str, Any]) -> None:
        self.system = system
        self._remote, self._options = remote, options
        self._parents = remote.models()
        self._base = next((name for name, parent in self._parents.items() if parent is None), None)
        self._messages: list[dict[str, str]] = []

    def resolve(self, name: str | None) -> str | None:
        """A model of the server; by default its first adapter, else the base."""
        if not name:
            adapters = (name for name, parent in self._parents.items() if parent is not None)
            return next(adapters, self._base)
        if name in self._parents:
            return name
        raise UserError(f"no model is called {name!r}; there are: {', '.join(self._parents)}")

    def compared(self, name: str | None) -> tuple[str | None, ...]:
        """The base and a model, where they are two."""
        return (name,) if self._base in (None, name) else (self._base, name)

    def answer(self, question: str, name: str | None) -> Iterator[str]:
        """The answer as it arrives.

        Raises:
            UserError: The server has no model, or refuses the question.
        """
        if name is None:
            raise UserError("the server has no models")
        start = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*start, *self._messages, {"role": "user", "content": question}]
        try:
            yield from self._streamed(name, messages)
        except ServerError as error:
            raise UserError(str(error)) from error

    def _streamed(self, name: str, messages: list[dict[str, str]]) -> Iterator[str]:
        """An answer of as many tokens as are wanted, or as there is room for."""
        try:
            yield from self._remote.stream(name, messages, Streamed(), **self._options)
        except ServerError as error:  # told before its first part
            if (error.code, error.param) != ("context_length_exceeded", _LONGEST_ANSWER):
                raise
            fewer = {key: value for key, value in self._options.items() if key != _LONGEST_ANSWER}
            yield from self._remote.stream(name, messages, Streamed(), **fewer)

    def remember(self, question: str, answer: str) -> None:
        """Send them along from now on."""
        self._messages += [
            {"role": "user", "content": question}, {"role": "assistant", "content": answer},
        ]  # fmt: skip

    def reset(self) -> None:
        """Forget the conversation."""
        self._messages.clear()


def talk(
    url: str,
    *,
    key: str | None = None,
    adapter: str | None = None,
    compare: bool = False,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    lines: TextIO | None = None,
    out: TextIO | None = None,
) -> None:
    """Converse until `/exit` or the end of the input.

    Args:
        url: Of an OpenAI-compatible server.
        key: Of the server.
        adapter: Which of its models; default its first adapter, else the base.
        compare: Answer with the base too.
        system: System message.
        max_new_tokens: Longest answer.
        temperature: 0 answers greedily.
        lines: Where questions come from, standard input by default.
        out: Where answers go, standard output by default.

    Raises:
        UserError: The server does not answer, or has no such model.
    """
    options = {_LONGEST_ANSWER: max_new_tokens, "temperature": temperature}
    models = _Models(Remote(url, key), system, options)
    converse(models, model=adapter, compare=compare, lines=lines, out=out)
