"""The prompt before its answer, as OpenAI's `echo` asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lighten.serving.texts import Texts


@dataclass(frozen=True)
class Echo:
    """A prompt as it stands before its answer.

    Attributes:
        text: As it was sent; of token ids what they write, special tokens among them.
        offsets: Where each of its tokens begins in it; those that the tokenizer put before a text
            begin where that does.
    """

    text: str
    offsets: tuple[int, ...]


def echoes(
    tokenizer: Any, prompts: Sequence[str | Sequence[int]], ids: Sequence[Sequence[int]]
) -> list[Echo]:
    """Prompts as they stand before their answers.

    Args:
        tokenizer: That read them.
        prompts: As they were sent.
        ids: Of each.
    """
    texts = Texts(tokenizer)
    return [_echo(texts, *pair) for pair in zip(prompts, ids, strict=True)]


def _echo(texts: Texts, prompt: str | Sequence[int], ids: Sequence[int]) -> Echo:
    written, offsets = texts.whole(ids)
    text = prompt if isinstance(prompt, str) else written
    before = len(written) - len(text) if written.endswith(text) else 0
    return Echo(text, tuple(min(max(0, offset - before), len(text)) for offset in offsets))
