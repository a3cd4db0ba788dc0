"""The verb `chat --url`: talk to a server in the terminal, or through a pipe."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from lighten.errors import UserError
from lighten.serve.remote import Remote, ServerError, Streamed

HELP = "/reset forgets the conversation, /system TEXT sets a system message, /adapter NAME, /exit"


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
    source, sink = lines or sys.stdin, out or sys.stdout
    remote = Remote(url, key)
    parents = remote.models()
    base = next((name for name, parent in parents.items() if parent is None), None)
    chosen = _known(parents, adapter) if adapter else next(
        (name for name, parent in parents.items() if parent is not None), base
    )  # fmt: skip
    messages: list[dict[str, str]] = []
    options: dict[str, Any] = {"max_completion_tokens": max_new_tokens, "temperature": temperature}
    if source.isatty():
        sink.write(f"{HELP}\n")
    while True:
        if source.isatty():
            sink.write("\n> ")
            sink.flush()
        line = source.readline()
        question = line.strip()
        if not line or question in ("/exit", "/quit"):
            return
        word, _, rest = question.partition(" ")
        if word == "/reset":
            messages.clear()
        elif word == "/system":
            system = rest or None
        elif word == "/adapter":
            try:
                chosen = _known(parents, rest)
            except UserError as error:
                sink.write(f"{error}\n")
        elif word.startswith("/"):
            sink.write(f"{HELP}\n")
        elif question and chosen is not None:
            names = (base, chosen) if compare and base not in (None, chosen) else (chosen,)
            start = [{"role": "system", "content": system}] if system else []
            asked = [*messages, {"role": "user", "content": question}]
            answer = ""
            try:
                for name in names:
                    if compare:
                        sink.write(f"[{name}] ")
                    into = Streamed()
                    for text in remote.stream(str(name), [*start, *asked], into, **options):
                        sink.write(text)
                        sink.flush()
                    sink.write("\n")
                    answer = into.text
            except ServerError as error:  # the conversation goes on without this question
                sink.write(f"{error}\n")
            else:
                messages = [*asked, {"role": "assistant", "content": answer}]
        sink.flush()


def _known(parents: dict[str, str | None], name: str) -> str:
    if name in parents:
        return name
    raise UserError(f"no model is called {name!r}; there are: {', '.join(parents)}")
