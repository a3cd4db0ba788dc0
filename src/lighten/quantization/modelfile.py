"""An Ollama `Modelfile`: model, chat template and stop texts for `ollama create`.

Ollama's templates are Go's, a model's is Jinja's. What a chat looks like is therefore read off the
model's own template, rendered with marks in place of contents, and the Go template made of the
pieces is kept only where it renders every chat tried the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

Message = dict[str, str]
_MARKS = {
    "system": "\u2460SYSTEM\u2461",
    "user": "\u2460USER\u2461",
    "assistant": "\u2460ANSWER\u2461",
}
# Contents that a template might change: spaces at the ends, lines, braces.
_CONTENTS = ("one", "two words", "a line\nand another", "{braces} 'quotes'")


@dataclass(frozen=True)
class ChatPieces:
    """What stands around the contents of a chat.

    Attributes:
        start: Text at the beginning of every chat.
        without_system: Text that follows where the first message is not the system's.
        around: Text before and after a message, by role.
        prompt: Text after which the model answers.
    """

    start: str
    without_system: str
    around: dict[str, tuple[str, str]]
    prompt: str

    def render(self, messages: Sequence[Message]) -> str:
        """A chat as the Go template renders it."""
        text = self.start
        if messages and messages[0]["role"] != "system":
            text += self.without_system
        for message in messages:
            before, after = self.around[message["role"]]
            text += before + message["content"] + after
        return text + self.prompt

    def go_template(self) -> str:
        """The template for Ollama."""
        parts = [_literal(self.start)]
        if self.without_system:
            parts.append(
                '{{ if ne (index .Messages 0).Role "system" }}'
                f"{_literal(self.without_system)}{{{{ end }}}}"
            )
        parts.append("{{ range .Messages }}")
        for place, (role, (before, after)) in enumerate(self.around.items()):
            parts.append(f'{{{{ {"else if" if place else "if"} eq .Role "{role}" }}}}')
            parts.append(f"{_literal(before)}{{{{ .Content }}}}{_literal(after)}")
        parts.append(f"{{{{ end }}}}{{{{ end }}}}{_literal(self.prompt)}")
        return "".join(parts)


def modelfile(
    tokenizer: Any,
    *,
    source: str,
    stops: Sequence[str],
    adds_bos: bool = False,
) -> str:
    """The text of a `Modelfile`.

    Args:
        tokenizer: The model's transformers tokenizer, for its chat template.
        source: What `FROM` names: a GGUF file beside the Modelfile, or a model that Ollama has.
        stops: Texts of the tokens that end an answer (`gguf_tokenizer.stop_texts`).
        adds_bos: Whether the runtime puts the start token in front of a text, so that the template
            must not.
    """
    lines = [f"FROM {_path(source)}"]
    pieces = chat_pieces(tokenizer, adds_bos=adds_bos)
    if pieces is not None:
        lines.append(f'TEMPLATE """{pieces.go_template()}"""')
    elif getattr(tokenizer, "chat_template", None):
        lines.append(
            "# The chat template does more than put texts around messages; Ollama looks for its "
            "own\n# version of the one in the GGUF file."
        )
    lines += [f"PARAMETER stop {_quoted(text)}" for text in dict.fromkeys(stops)]
    return "\n".join(lines) + "\n"


def chat_pieces(tokenizer: Any, *, adds_bos: bool = False) -> ChatPieces | None:
    """What the model's template puts around messages; None where it does more than that.

    Args:
        tokenizer: The model's transformers tokenizer.
        adds_bos: Leave out a start token at the very beginning.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None

    def render(messages: Sequence[Message], answer: bool = True) -> str:
        text = str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=answer
            )
        )
        bos = getattr(tokenizer, "bos_token", None)
        return text.removeprefix(bos) if adds_bos and bos else text

    try:
        pieces = _pieces(render)
        matches = pieces is not None and all(
            render(chat) == pieces.render(chat) for chat in _chats(pieces)
        )
    # Templates refuse roles and orders in words of their own.
    except (TemplateError, ValueError, KeyError, TypeError):
        return None
    unquotable = pieces is not None and '"""' in pieces.go_template()
    return pieces if matches and not unquotable else None


def _pieces(render: Callable[..., str]) -> ChatPieces | None:
    user, assistant, system = (
        {"role": role, "content": _MARKS[role]} for role in ("user", "assistant", "system")
    )
    alone = render([user], answer=False)
    prompt = render([user]).removeprefix(alone)
    before_user, after_user = alone.split(_MARKS["user"])
    turns = render([user, assistant, user], answer=False).removeprefix(alone)
    before_answer, rest = turns.split(_MARKS["assistant"])
    between, after_last = rest.split(_MARKS["user"])
    if after_last != after_user:
        return None
    around = {}
    start, without_system = "", ""
    try:
        with_system = render([system, user], answer=False)
        start_system, rest = with_system.split(_MARKS["system"])
        middle, last = rest.split(_MARKS["user"])
    except (TemplateError, ValueError):  # it has no system message
        middle = last = start_system = ""
    # A user's turn begins as the longest text that the first and a later one share.
    opening = _common_end([before_user, between, *([middle] if middle else [])])
    around["user"] = (opening, after_user)
    around["assistant"] = (before_answer, between.removesuffix(opening))
    lead = before_user.removesuffix(opening)
    if middle and last == after_user:
        start = _common_start([lead, start_system])
        without_system = lead.removeprefix(start)
        around = {
            "system": (start_system.removeprefix(start), middle.removesuffix(opening)),
            **around,
        }
    else:
        start = lead
    return ChatPieces(start, without_system, around, prompt)


def _chats(pieces: ChatPieces) -> list[list[Message]]:
    """Chats of every shape that the pieces are to render as the template does."""
    chats = []
    for length, system in itertools.product((1, 2, 3), (False, True)):
        if system and "system" not in pieces.around:
            continue
        texts = itertools.cycle(_CONTENTS)
        chat = [{"role": "system", "content": next(texts)}] if system else []
        for turn in range(length):
            chat.append({"role": "user", "content": next(texts)})
            if turn < length - 1:
                chat.append({"role": "assistant", "content": next(texts)})
        chats.append(chat)
    return chats


def _common_start(texts: Sequence[str]) -> str:
    length = 0
    for letters in zip(*texts, strict=False):
        if len(set(letters)) > 1:
            break
        length += 1
    return texts[0][:length]


def _common_end(texts: Sequence[str]) -> str:
    return _common_start([text[::-1] for text in texts])[::-1]


def _literal(text: str) -> str:
    """A text that Go's templates print as it is."""
    text = text.replace("{{", '{{ "{{" }}')
    # A brace at the end would be the first of the action behind it.
    return text.removesuffix("{") + '{{ "{" }}' if text.endswith("{") else text


def _path(name: str) -> str:
    """Files are named as such, so that they are not taken for models of a registry."""
    return f"./{name}" if name.endswith(".gguf") and "/" not in name else name


def _quoted(text: str) -> str:
    """As Ollama reads it: what stands between the quotes is taken as it is, lines too."""
    quotes = '"""' if '"' in text else '"'
    return f"{quotes}{text}{quotes}"
