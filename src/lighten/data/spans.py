"""Where in a rendered conversation the answers stand.

The conversation is rendered with its chat template; an answer's place is looked for on the text,
so that tokens that merge across the border of prompt and answer cannot shift it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from lighten.data.examples import Example, Message
from lighten.errors import UserError

_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
_EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
# Stands for an answer while its place is looked for.
_MARKER = "\u2060lighten\u2060answer\u2060"
Span = tuple[int, int]


def render(messages: Sequence[Message], tokenizer: Any, where: str, **options: Any) -> str:
    """The conversation as text, by the tokenizer's chat template.

    Raises:
        UserError: The template refuses it.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            [message.for_template() for message in messages], tokenize=False, **options
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where}: the chat template refuses this conversation: {error}") from error
    return text


def answers(example: Example, text: str, tokenizer: Any) -> list[Span | None]:
    """Where in the rendered text each answer to learn stands; None for one not found."""
    wanted = [
        place
        for place, message in enumerate(example.messages)
        if message.role == "assistant" and message.train is not False
    ]
    if _GENERATION.search(tokenizer.chat_template or ""):
        tagged = _tagged(example, tokenizer)
        answers = [p for p, m in enumerate(example.messages) if m.role == "assistant"]
        if len(tagged) != len(answers):
            return [None]
        at = dict(zip(answers, tagged, strict=True))
        return [_trimmed(at[place], example.messages[place], text, tokenizer) for place in wanted]
    return [_answer(example, place, text, tokenizer) for place in wanted]


def _answer(example: Example, place: int, text: str, tokenizer: Any) -> Span | None:
    """One answer's span: what follows its prompt, verified to be there (trap 13)."""
    upto = example.messages[: place + 1]
    prompt = _prompt_before(example, place, text, tokenizer)
    if prompt is None:
        return None
    shown = render(upto, tokenizer, example.where, tools=example.tools)
    if text.startswith(shown) and len(shown) > len(prompt):
        span = len(prompt), len(shown)
    else:
        # The template writes the last turn otherwise than earlier ones: look for the words.
        found = _words_after(prompt, upto[-1].content, text)
        if found is None:
            return None
        begin, end = found
        tail = text[end:].lstrip()
        for token in tokenizer.all_special_tokens:
            if tail.startswith(token):
                end = text.index(token, end) + len(token)
                break
        span = begin, end
    return _trimmed(span, upto[-1], text, tokenizer)


def _prompt_before(example: Example, place: int, text: str, tokenizer: Any) -> str | None:
    """The text before an answer, header included; None if the template rewrites it.

    A word that no text holds is put in the answer's place: what the template writes before it is
    the prompt. Where the answer itself changes what stands before it (a thought), the template's
    own generation prompt is.
    """
    before = example.messages[:place]
    marker = Message("assistant", _MARKER, extra=example.messages[place].extra)
    shown = render((*before, marker), tokenizer, example.where, tools=example.tools)
    prompt = shown[: shown.find(_MARKER)] if _MARKER in shown else ""
    if prompt and text.startswith(prompt):
        return prompt
    if not place:
        return None
    prompt = render(
        before, tokenizer, example.where, tools=example.tools, add_generation_prompt=True
    )
    return prompt if text.startswith(prompt) else None


def _trimmed(span: Span, message: Message, text: str, tokenizer: Any) -> Span:
    """The span without a template's empty thought (trap 14) and without white space at its end."""
    begin, end = span
    empty = _EMPTY_THOUGHT.match(text, begin, end)
    if empty and not _EMPTY_THOUGHT.match(message.content):
        begin = empty.end()
    if not message.content.strip() and not dict(message.extra).get("tool_calls"):
        return begin, begin  # an empty answer teaches nothing but silence
    stripped = text[begin:end].rstrip()
    return begin, begin + len(stripped) if ends(stripped, tokenizer) else end


def _words_after(prompt: str, content: str, text: str) -> Span | None:
    """Where the answer's words stand right after its prompt, its thought kept or cut out."""
    for words in (content.strip(), content.rpartition("</think>")[2].strip()):
        at = text.find(words, len(prompt)) if words and text.startswith(prompt) else -1
        if at >= 0 and re.fullmatch(r"\s*(<think>\s*</think>)?\s*", text[len(prompt) : at]):
            return at, at + len(words)
    return None


def _tagged(example: Example, tokenizer: Any) -> list[Span]:
    """Spans that the template itself marks with {% generation %}, one per assistant turn."""
    from transformers.utils.chat_template_utils import render_jinja_template

    marked: list[list[Span]]
    _, marked = render_jinja_template(  # type: ignore[assignment, str-unpack]  # typed as text
        [[message.for_template() for message in example.messages]],
        tools=example.tools,
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return [(int(begin), int(end)) for begin, end in marked[0]]


def ends(answer: str, tokenizer: Any) -> bool:
    """Whether an answer ends with a special token, so that the model learns to stop (trap 10)."""
    return not answer or answer.rstrip().endswith(tuple(tokenizer.all_special_tokens))


def unaligned(example: Example) -> str:
    """What to say of an answer that is not found."""
    return (
        f"{example.where}: an answer cannot be found in what the chat template made of it (the "
        "template rewrites it); use another chat_template, or one with {% generation %} marks"
    )


def endless(example: Example) -> str:
    """What to say of an answer without an end."""
    return (
        f"{example.where}: the chat template does not end the answer with a special token, so the "
        "model cannot learn to stop"
    )
