"""What one example is, whatever file it came from."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: `system`, `user`, `assistant` or `tool`.
        content: Its text.
        train: False leaves an assistant's turn unsupervised; None follows the recipe.
        extra: Other keys that templates know, such as `tool_calls`.
    """

    role: str
    content: str
    train: bool | None = None
    extra: tuple[tuple[str, Any], ...] = ()

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates want it."""
        return {"role": self.role, "content": self.content, **dict(self.extra)}


@dataclass(frozen=True, slots=True)
class Example:
    """One example: a conversation, a plain text, or tokens made elsewhere.

    Attributes:
        file: Where it stood.
        line: Its line there, or its row number from 1 where a file has no lines.
        messages: The conversation.
        text: Plain text, supervised whole.
        input_ids: Ready token ids.
        labels: Their labels, -100 where a token is not supervised.
        single_turn: One prompt and one completion (`completion_only_loss` speaks of it).
        tools: Tool descriptions for the template.
    """

    file: str
    line: int
    messages: tuple[Message, ...] = ()
    text: str | None = None
    input_ids: tuple[int, ...] | None = None
    labels: tuple[int, ...] | None = None
    single_turn: bool = False
    tools: Any = None

    @property
    def where(self) -> str:
        """File and line, for messages."""
        return f"{self.file}:{self.line}"

    @property
    def prompt_key(self) -> str:
        """A fingerprint of what is asked: two examples with the same one are the same question.

        However their characters are composed: some systems write Hangul as its single letters.
        """
        if self.messages:
            prompt = [
                (m.role, " ".join(_composed(m.content).split()).casefold())
                for m in self.messages
                if m.role != "assistant"
            ]
        else:
            tokens = str(self._prompt_ids()) if self.text is None else _composed(self.text)
            prompt = [("text", tokens)]
        return hashlib.sha256(json.dumps(prompt, ensure_ascii=False).encode()).hexdigest()

    @property
    def content_key(self) -> str:
        """A fingerprint of all that it says, every turn and the answers too."""
        said: list[Any] = [
            [m.role, _composed(m.content), [str(entry) for entry in m.extra]] for m in self.messages
        ]
        said += [list(map(int, numbers or ())) for numbers in (self.input_ids, self.labels)]
        said += [self.text and _composed(self.text), str(self.tools)]
        return hashlib.sha256(json.dumps(said, ensure_ascii=False).encode()).hexdigest()

    def _prompt_ids(self) -> tuple[int, ...]:
        """Of ready tokens those that are read and not learnt, up to the last that is learnt.

        All of them where that is one at most: a text after its BOS asks nothing.
        """
        ids, labels = self.input_ids or (), self.labels or ()
        learnt = [place for place, label in enumerate(labels) if label != -100]
        end = max(learnt, default=0)
        prompt = tuple(ids[place] for place in range(end) if labels[place] == -100)
        return prompt if len(prompt) > 1 else ids

    @property
    def reference(self) -> str | None:
        """The last answer, if the example ends with one."""
        if self.messages and self.messages[-1].role == "assistant":
            return self.messages[-1].content
        return None


def _composed(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)
