"""Requests that are far too large, refused before they are read piece by piece.

A body of a few megabytes holds a million prompts, or a text of a million tokens. Encoding them
takes minutes, in which nobody else's prompts are encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lighten.serving.requests import Refused

# Of a text, for each token that there is room for: tokens are shorter by far, so the beginning of
# a text that is too long is too long itself.
_LETTERS_PER_TOKEN = 16


def require_few(body: Any, context: int, most_answers: int) -> None:
    """Refuse more prompts, tokens or messages than can be answered, by their number alone.

    Args:
        body: Of a request, as it was sent; what is no list is looked at elsewhere.
        context: Tokens of a prompt with its answer.
        most_answers: Made in one request.

    Raises:
        Refused: Names the field.
    """
    if not isinstance(body, dict):
        return
    messages, prompt = body.get("messages"), body.get("prompt")
    if isinstance(messages, list) and len(messages) > context:
        raise Refused(400, f"there are {len(messages)} messages, which take more than the "
                      f"{context} tokens that prompt and answer may have together here "
                      "(--max-model-len)", "messages", "context_length_exceeded")  # fmt: skip
    if not isinstance(prompt, list) or not prompt:
        return
    if isinstance(prompt[0], int):
        _require_tokens_fit(prompt, context)
        return
    require_answers_fit(len(prompt), 1, most_answers)
    for each in prompt:
        if isinstance(each, list):
            _require_tokens_fit(each, context)


def require_answers_fit(prompts: int, answers: int, most: int) -> None:
    """Refuse more answers than are made at a time.

    Args:
        prompts: Of one request.
        answers: To each of them, `n`.
        most: Of all.

    Raises:
        Refused: Names the field.
    """
    if prompts * answers > most:
        field = "n" if prompts == 1 else "prompt"
        raise Refused(400, f"{field}: {prompts * answers} answers in one request are more than "
                      f"the {most} that this server makes at a time (--max-waiting)",
                      field)  # fmt: skip


def require_texts_fit(
    texts: Iterable[str], field: str, context: int, encode: Callable[[str], list[int]]
) -> None:
    """Refuse texts whose beginning has more tokens than there is room for.

    Args:
        texts: Of a prompt, which no template leaves out.
        field: Where they stand.
        context: Tokens of a prompt with its answer.
        encode: Tokens of a text.

    Raises:
        Refused: Names the field.
    """
    beginning = _LETTERS_PER_TOKEN * context
    for text in texts:
        if len(text) > beginning and len(encode(text[:beginning])) > context:
            raise Refused(400, f"the prompt has more than {context} tokens, which prompt and "
                          "answer may have together here (--max-model-len)",
                          field, "context_length_exceeded")  # fmt: skip


def _require_tokens_fit(prompt: list[Any], context: int) -> None:
    if len(prompt) >= context:
        raise Refused(400, f"the prompt has {len(prompt)} tokens; prompt and answer may have "
                      f"{context} together here (--max-model-len)", "prompt",
                      "context_length_exceeded")  # fmt: skip
