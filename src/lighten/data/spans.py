"""Where in a rendered conversation the answers stand.

The conversation is rendered with its chat template; an answer's place is looked for on the text,
so that tokens that merge across the border of prompt and answer cannot shift it. Its words are
replaced by a mark that no text holds, and what stands around the mark is looked for in the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from lighten.data.examples import Example, Message
from lighten.data.rendering import rendered
from lighten.data.special import MARKER, special_tokens
from lighten.data.tools import call_names
from lighten.errors import UserError

_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
Span = tuple[int, int]
# What a template may raise: whatever it says of itself, and what its expressions do.
_REFUSALS = (
    TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
    RecursionError,
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where one answer stands.

    Attributes:
        message: Its place among the messages.
        span: In the rendered text, its end included; None where it is not found.
        moved: What stands before it is not what the template writes when the answer is asked for,
            so that learning it would teach another question.
    """

    message: int
    span: Span | None
    moved: bool = False


class RefusedError(UserError):
    """A chat template refuses a conversation.

    Attributes:
        reason: What the template says.
    """

    def __init__(self, location: str, reason: str) -> None:
        super().__init__(f"{location}: {reason}")
        self.reason = reason


def render(messages: Sequence[Message], tokenizer: Any, location: str, **options: Any) -> str:
    """The conversation as text, by the tokenizer's chat template.

    Raises:
        RefusedError: The template refuses it.
        UserError: The template itself is broken.
    """
    try:
        text = rendered(messages, tokenizer, options)
    except TemplateSyntaxError as error:
        raise UserError(
            f"the chat template is not valid Jinja (line {error.lineno}): {error.message}"
        ) from error
    except _REFUSALS as error:
        raise RefusedError(
            location, f"the chat template refuses this conversation: {error}"
        ) from error
    return text


def places(example: Example, text: str, tokenizer: Any) -> list[Place]:
    """Where in the rendered text each answer to learn stands.

    Raises:
        RefusedError: The template refuses a part of the conversation.
    """
    targets = learnt(example)
    if _GENERATION.search(tokenizer.chat_template or ""):
        tagged = _tagged(example, tokenizer)
        answers = [p for p, m in enumerate(example.messages) if m.role == "assistant"]
        if len(tagged) != len(answers):
            return [Place(place, None) for place in targets]
        at = dict(zip(answers, tagged, strict=True))
        return [
            Place(place, _trimmed(at[place], example.messages[place], text, tokenizer))
            for place in targets
        ]
    quick = _around_marks(example, targets, text, tokenizer)
    return [_place(example, place, text, tokenizer, quick.get(place)) for place in targets]


def learnt(example: Example) -> list[int]:
    """Places of the messages that are to be learnt."""
    return [
        place
        for place, message in enumerate(example.messages)
        if message.role == "assistant" and message.train is not False
    ]


def mark(place: int) -> str:
    """What stands for the answer at a place."""
    return f"{MARKER}{place}\u2060"


def _place(example: Example, place: int, text: str, tokenizer: Any, quick: Span | None) -> Place:
    message = example.messages[place]
    if quick is not None:
        last = place == len(example.messages) - 1
        moved = not last and _prompt_before(example, place, text, tokenizer) is None
        return Place(place, _trimmed(quick, message, text, tokenizer), moved)
    return Place(place, _answer(example, place, text, tokenizer))


def _around_marks(
    example: Example, targets: Sequence[int], text: str, tokenizer: Any
) -> dict[int, Span]:
    """Spans of the answers that the template writes as it writes a mark in their place.

    Empty where it does not: it looks at the words, or writes calls of tools where they would be.
    """
    messages = list(example.messages)
    for place in targets:
        messages[place] = replace(messages[place], content=mark(place))
    try:
        marked_text = render(messages, tokenizer, example.where, tools=example.tools)
    except RefusedError:
        return {}
    if any(marked_text.count(mark(place)) != 1 for place in targets):
        return {}
    spans: dict[int, Span] = {}
    special, at = special_tokens(tokenizer), 0
    for number, place in enumerate(targets):
        before, _, marked_text = marked_text.partition(mark(place))
        if not text.startswith(before, at):
            return {}
        begin = at + len(before)
        final = number + 1 == len(targets)
        after = marked_text if final else marked_text.partition(mark(targets[number + 1]))[0]
        end = _end_of(example.messages[place].content, text, begin, after, final=final)
        if end is None:
            return {}
        if place == len(messages) - 1:
            spans[place] = begin, len(text)
        elif after.lstrip().startswith(special.tail) and special.tail:
            spans[place] = begin, text.index(special.tail, end) + len(special.tail)
        elif token := special.starts(after.lstrip()):
            spans[place] = begin, text.index(token, end) + len(token)
        at = end
    return {p: span for p, span in spans.items() if not dict(messages[p].extra).get("tool_calls")}


def _end_of(content: str, text: str, begin: int, after: str, *, final: bool) -> int | None:
    """Where an answer's words end that begin somewhere and are followed by a known text."""
    for words in (content, content.strip(), content.rstrip(), content.lstrip()):
        end = begin + len(words)
        if text.startswith(words, begin) and text.startswith(after, end):
            return end
    # The template cut something out of them.
    end = len(text) - len(after) if final else text.find(after, begin)
    return end if after and end > begin and text.startswith(after, end) else None


def _answer(example: Example, place: int, text: str, tokenizer: Any) -> Span | None:
    """One answer's span: what follows its prompt, verified to be there (trap 13)."""
    upto = example.messages[: place + 1]
    prompt = _prompt_before(example, place, text, tokenizer)
    if prompt is None:
        return None
    try:
        beginning = render(upto, tokenizer, example.where, tools=example.tools)
    except RefusedError:  # a conversation may be whole where its beginning is not
        beginning = ""
    if text.startswith(beginning) and len(beginning) > len(prompt):
        span = len(prompt), len(beginning)
    else:
        # The template writes the last turn otherwise than earlier ones: look for the words.
        words = _words_after(prompt, upto[-1].content, text)
        if words is None:
            return None
        begin, end = words
        if token := special_tokens(tokenizer).starts(text[end:].lstrip()):
            end = text.index(token, end) + len(token)
        span = begin, end
    return _trimmed(span, upto[-1], text, tokenizer)


def _prompt_before(example: Example, place: int, text: str, tokenizer: Any) -> str | None:
    """The text before an answer, header included; None if the template rewrites it.

    A word that no text holds is put in the answer's place: what the template writes before it is
    the prompt. Where the answer itself changes what stands before it (a thought), the template's
    own generation prompt is.
    """
    before = example.messages[:place]
    marker = Message("assistant", MARKER, extra=example.messages[place].extra)
    options: dict[str, Any] = {"tools": example.tools}
    for messages, extra_options in (
        ((*before, marker), {}),
        (before, {"add_generation_prompt": True}),
    ):
        if not messages:
            continue
        try:
            prompt = render(messages, tokenizer, example.where, **options, **extra_options)
        except RefusedError:
            continue
        if not extra_options:
            prompt = prompt[: prompt.find(MARKER)] if MARKER in prompt else ""
        if prompt and text.startswith(prompt):
            return prompt
    return None


def _trimmed(span: Span, message: Message, text: str, tokenizer: Any) -> Span:
    """The span without a template's empty thought (trap 14) and without white space at its end."""
    begin, end = span
    empty = EMPTY_THOUGHT.match(text, begin, end)
    if empty and not EMPTY_THOUGHT.match(message.content):
        begin = empty.end()
    calls = any(name in text[begin:end] for name in call_names(message))
    if not message.content.strip() and not calls:
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
    return not answer or answer.rstrip().endswith(special_tokens(tokenizer).texts)


def unaligned(example: Example) -> str:
    """What to say of an answer that is not found."""
    return (
        f"{example.where}: an answer cannot be found in what the chat template made of it (the "
        "template rewrites it); use another chat_template, or one with {% generation %} marks"
    )


def endless(example: Example, tokenizer: Any) -> str:
    """What to say of an answer without an end."""
    if tokenizer.eos_token is None and not special_tokens(tokenizer).tail:
        return (
            f"{example.where}: the answer has no end, because the tokenizer "
            f"{tokenizer_name(tokenizer)} has no eos_token and the chat template writes no other "
            "token after an answer; the model cannot learn to stop: choose another chat_template, "
            "or add its end to added_tokens"
        )
    return (
        f"{example.where}: the chat template does not end the answer with a special token, so the "
        "model cannot learn to stop"
    )


def tokenizer_name(tokenizer: Any) -> str:
    """A tokenizer's name, for messages."""
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
