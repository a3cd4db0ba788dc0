"""A conversation in the terminal, or through a pipe, with whatever answers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Protocol, TextIO

from lighten.errors import UserError
from lighten.streams import encodable

HELP = "/reset forgets the conversation, /system TEXT sets a system message, /adapter NAME, /exit"


class Answerer(Protocol):
    """What answers: models in this process, or a server's.

    Attributes:
        system: System message.
    """

    system: str | None

    def resolve(self, name: str | None) -> str | None:
        """The model of a name; None and the empty name mean the one that answers by default.

        Raises:
            UserError: There is none of that name.
        """

    def compared(self, name: str | None) -> tuple[str | None, ...]:
        """The base and a model, where they are two; else the model alone."""

    def answer(self, question: str, name: str | None) -> Iterator[str]:
        """The answer to one more question, piece by piece.

        Raises:
            UserError: This question cannot be answered.
        """

    def remember(self, question: str, answer: str) -> None:
        """Make a question and its answer part of the conversation."""

    def reset(self) -> None:
        """Forget the conversation."""


def converse(
    answerer: Answerer,
    *,
    model: str | None = None,
    compare: bool = False,
    lines: TextIO | None = None,
    out: TextIO | None = None,
) -> None:
    """Ask what is typed, and write what is answered, until `/exit` or the end of the input.

    Args:
        answerer: Who answers.
        model: Which of its models; None: the one that answers by default.
        compare: Answer with the base too.
        lines: Where questions come from, standard input by default.
        out: Where answers go, standard output by default.

    Raises:
        UserError: No such model, or a question cannot be read.
    """
    source, sink = lines or sys.stdin, _Sink(out or sys.stdout)
    if source is None:
        raise UserError("there is nothing to read questions from: standard input is closed")
    model = answerer.resolve(model)
    typed = source.isatty()
    if typed:
        sink.write(f"{HELP}\n")
    while True:
        if typed:
            sink.write("\n> ")
            sink.flush()
        line = _line(source)
        question = line.strip()
        if not line or question in ("/exit", "/quit"):
            return
        word, _, rest = question.partition(" ")
        if word == "/reset":
            answerer.reset()
        elif word == "/system":
            answerer.system = rest or None
        elif word == "/adapter":
            try:
                model = answerer.resolve(rest)
            except UserError as error:
                sink.write(f"{error}\n")
        elif word.startswith("/"):
            sink.write(f"{HELP}\n")
        elif question:
            try:
                _answer(answerer, question, model, compare, sink)
            except UserError as error:  # the conversation goes on without this question
                sink.write(f"{error}\n")
        sink.flush()


def _answer(
    answerer: Answerer, question: str, model: str | None, compare: bool, sink: _Sink
) -> None:
    """Write what each model says; the conversation goes on with the last one's answer."""
    answer = ""
    for name in answerer.compared(model) if compare else (model,):
        if compare:
            sink.write(f"[{name or 'base'}] ")
        answer = ""
        for piece in answerer.answer(question, name):
            answer += piece
            sink.write(piece)
            sink.flush()
        sink.write("\n")
    answerer.remember(question, answer)


class _Sink:
    """Where answers go, in whatever encoding.

    Args:
        out: The stream; None (a program without a console) takes everything and shows nothing.
    """

    def __init__(self, out: TextIO | None) -> None:
        self._out = out

    def write(self, text: str) -> None:
        """Write a piece of text."""
        if self._out is not None:
            self._out.write(encodable(text, self._out))

    def flush(self) -> None:
        """Show what was written."""
        if self._out is not None:
            self._out.flush()


def _line(source: TextIO) -> str:
    """The next line; empty at the end.

    Raises:
        UserError: It cannot be read, or is no text in the stream's encoding.
    """
    try:
        line = source.readline()
        line.encode()  # bytes that the encoding does not have may come as surrogates
    except UnicodeError as error:
        raise UserError(
            f"a question is not text in the encoding of the input ({source.encoding}); give it in "
            "that encoding, or set PYTHONIOENCODING to that of the text"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"questions cannot be read: {error}") from error
    return line
