"""One conversation as text: what a template does to it is found by rendering, counted and told.

A template may refuse a system message or show it elsewhere, cut thoughts out of answers, leave
messages out and write today's date. Settings say what happens to system messages and thoughts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from lighten.data.examples import Example, Message
from lighten.data.findings import SYSTEM, Findings
from lighten.data.spans import (
    Place,
    RefusedError,
    Span,
    ends,
    learnt,
    mark,
    places,
    render,
    tokenizer_name,
)
from lighten.data.special import special_tokens
from lighten.data.thoughts import THOUGHT_KEYS, raw_answer, thought_of, without_thought
from lighten.data.tools import call_names
from lighten.errors import UserError

_DATE_FORMAT = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1")
# A message of fewer characters may stand in a text by chance.
TELLING = 16
_EMPTY_BEFORE = re.compile(r"(<think>\s*</think>\s*)$")


@dataclass(frozen=True)
class Handling:
    """What happens to what a template may not take.

    Attributes:
        system_role: `keep` leaves system messages to the template; `fold` puts them at the
            beginning of the next user turn; `drop` leaves them out; None folds those that the
            template refuses or leaves out.
        thinking: `keep` writes thoughts that the template cuts out back into their answers;
            `drop` removes all thoughts; None leaves them to the template.
    """

    system_role: str | None = None
    thinking: str | None = None


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        example: The conversation as it was rendered, folded or without its thoughts.
        text: What the template made of it.
        learnt: Spans to learn; all of it where the whole text is.
        answers: Spans of the answers, each with its end.
        moved: Spans of answers that are not learnt, because the template moves their prompt.
        aligned: Every answer was found.
        endless: An answer does not end with a special token.
    """

    example: Example
    text: str
    learnt: tuple[Span, ...]
    answers: tuple[Span, ...]
    moved: tuple[Span, ...] = ()
    aligned: bool = True
    endless: bool = False


class Renderer:
    """Renders conversations with a tokenizer's chat template, and finds what that changes.

    Args:
        tokenizer: With its chat template chosen.
        handling: What happens to system messages and thoughts.

    Attributes:
        findings: What was found so far.
    """

    def __init__(self, tokenizer: Any, handling: Handling | None = None) -> None:
        self.tokenizer = tokenizer
        self.handling = handling or Handling()
        self.findings = Findings()
        self._begun = False
        formats = _DATE_FORMAT.findall(str(tokenizer.chat_template or ""))
        now = datetime.now(UTC).astimezone()  # templates write the local date
        self._dates = [now.strftime(date_format) for _, date_format in formats]

    def render(self, example: Example, *, supervise_all: bool = False) -> Rendered | None:
        """A conversation as text; None, and remembered, where the template refuses it.

        Args:
            example: With messages.
            supervise_all: All of it is to be learnt, not its answers alone.

        Raises:
            UserError: The template needs a token that the tokenizer has not.
        """
        if not self._begun:
            require_end(self.tokenizer)
            self._begun = True
        try:
            return self._render(example, supervise_all)
        except RefusedError as error:
            self.findings.refuse(error, example)
            return None

    def count_end(self, answer: Sequence[int], *, answer_alone: bool = True) -> None:
        """Count the special token that ends an answer, and those inside it.

        Args:
            answer: Its ids, with the end.
            answer_alone: Its question is not among them.
        """
        if not len(answer):
            return
        special, last = special_tokens(self.tokenizer).ids, int(answer[-1])
        if last in special:
            self.findings.ends[last] += 1
            answer = answer[:-1]
        if answer_alone:
            self.findings.inside |= special.intersection(answer)

    def system(self, example: Example) -> tuple[Example, str]:
        """The example with its system messages where the template takes them, and its text.

        Raises:
            RefusedError: The template refuses it all the same.
        """
        role, location, findings = self.handling.system_role, example.where, self.findings
        number = sum(message.role in SYSTEM for message in example.messages)
        findings.add("system", location, number)
        if number and role == "drop":
            findings.add("system drop", location, number)
            messages = tuple(m for m in example.messages if m.role not in SYSTEM)
            example = replace(example, messages=messages)
        elif number and role == "fold":
            findings.add("system fold", location, number)
            example = replace(example, messages=fold(example.messages))
        elif number and role is None:
            folded = replace(example, messages=fold(example.messages))
            try:
                text = self._text(example)
                if all(
                    self._shows(example, place, text)
                    for place, message in enumerate(example.messages)
                    if message.role in SYSTEM
                ):
                    return example, text
                folded_text = self._text(folded)
            except RefusedError as refused:
                try:
                    folded_text = self._text(folded)
                except RefusedError:  # it is something else that it refuses
                    raise refused from None
            findings.add("system folded", location, number)
            return folded, folded_text
        return example, self._text(example)

    def _render(self, example: Example, supervise_all: bool) -> Rendered:
        findings, location = self.findings, example.where
        example, text = self.system(example)
        if self.handling.thinking == "drop":
            thoughts = sum(bool(thought_of(example.messages[place])) for place in learnt(example))
            findings.add("thoughts", location, thoughts)
            findings.add("thoughts dropped", location, thoughts)
            if any(map(thought_of, example.messages)):
                example = replace(example, messages=tuple(map(without_thought, example.messages)))
                text = self._text(example)
        answers = places(example, text, self.tokenizer)
        if self.handling.thinking != "drop":
            example, text, answers = self._thoughts(example, text, answers)
        findings.add("conversations", location)
        findings.add("dated", location, self._dated(example, text))
        self._look(example, text, answers)
        stand = tuple(place.span for place in answers if place.span and not place.moved)
        if supervise_all:
            return Rendered(example, text, ((0, len(text)),), stand)
        findings.add("answers moved", location, sum(place.moved for place in answers))
        return Rendered(
            example, text, stand, stand,
            tuple(place.span for place in answers if place.span and place.moved),
            aligned=all(place.span is not None for place in answers),
            endless=any(
                not ends(text[slice(*place.span)], self.tokenizer)
                for place in answers if place.span is not None
            ),
        )  # fmt: skip

    def _text(self, example: Example) -> str:
        return render(example.messages, self.tokenizer, example.where, tools=example.tools)

    def _shows(self, example: Example, place: int, text: str) -> bool:
        """Whether the template shows a message, in whatever form."""
        message = example.messages[place]
        words = message.content.strip()
        if words in text and (message.role == "user" or len(words) >= TELLING):
            return True
        marked = list(example.messages)
        marked[place] = replace(message, content=mark(place))
        try:
            rendered_text = self._text(replace(example, messages=tuple(marked)))
        except RefusedError:
            return True
        # As JSON the mark's first character is written \u2060.
        return mark(place).casefold() in rendered_text.casefold() or "u2060lighten" in rendered_text

    def _thoughts(
        self, example: Example, text: str, answers: list[Place]
    ) -> tuple[Example, str, list[Place]]:
        """Count the thoughts that the template cut out, and write them back if that is wanted."""
        findings, location = self.findings, example.where
        answer_texts = {
            answer.message: text if answer.span is None else text[slice(*answer.span)]
            for answer in answers
        }
        cut = []
        for at, message in enumerate(example.messages):
            thought = thought_of(message)
            if thought and not (
                thought in answer_texts[at]
                if at in answer_texts
                else self._shows_thought(example, at)
            ):
                cut.append(at)
            elif thought and at in answer_texts:
                findings.add("thoughts learnt", location)
            findings.add("thoughts", location, bool(thought) and at in answer_texts)
        if not cut:
            return example, text, answers
        messages = list(example.messages)
        if self.handling.thinking != "keep":
            findings.add("thoughts cut", location, len(answer_texts.keys() & set(cut)))
            for at in cut:
                messages[at] = without_thought(messages[at])
            return replace(example, messages=tuple(messages)), text, answers
        for at in cut:
            extra = tuple(entry for entry in messages[at].extra if entry[0] not in THOUGHT_KEYS)
            messages[at] = replace(messages[at], content=raw_answer(messages[at]), extra=extra)
        placeholders = [
            replace(message, content=_placeholder(at)) if at in cut else message
            for at, message in enumerate(messages)
        ]
        marked = replace(example, messages=tuple(placeholders))
        text = self._text(marked)
        answers = places(marked, text, self.tokenizer)
        raw = {at: messages[at].content for at in cut}
        text, answers, restored = _restore_answers(text, answers, raw)
        count = len(answer_texts.keys() & restored)
        findings.add("thoughts kept", location, count)
        findings.add("thoughts learnt", location, count)
        findings.add("thoughts lost", location, len(answer_texts.keys() & set(cut)) - count)
        return replace(example, messages=tuple(messages)), text, answers

    def _shows_thought(self, example: Example, place: int) -> bool:
        """Whether the template shows the thought of an answer that is not to be learnt."""
        message, thought = example.messages[place], thought_of(example.messages[place])
        extra = tuple(
            (key, mark(place) if key in THOUGHT_KEYS else value) for key, value in message.extra
        )
        marked = list(example.messages)
        marked[place] = replace(
            message, content=message.content.replace(thought, mark(place)), extra=extra
        )
        return mark(place) in self._text(replace(example, messages=tuple(marked)))

    def _look(self, example: Example, text: str, answers: Sequence[Place]) -> None:
        """Count what the template did to an example's words."""
        findings, location = self.findings, example.where
        findings.add("answers", location, len(answers))
        for answer in answers:
            message = example.messages[answer.message]
            if answer.span is None or thought_of(message) or not message.content.strip():
                continue
            if message.content.strip() not in text[slice(*answer.span)]:
                findings.add("answers changed", location)
        if example.tools and self._text(replace(example, tools=None)) == text:
            findings.add("tools left out", location)
        findings.add(
            "calls left out",
            location,
            sum(name not in text for each in example.messages for name in call_names(each)),
        )
        first = next((answer.span for answer in answers if answer.span is not None), None)
        for place, message in enumerate(example.messages):
            if message.role == "assistant" or not message.content.strip():
                continue
            if not self._shows(example, place, text):
                findings.add(f"left out {message.role}", location)
            elif place == 0 and message.role in SYSTEM and first is not None:
                findings.add(
                    "system moved", location, text.find(message.content.strip()) > first[1]
                )

    def _dated(self, example: Example, text: str) -> bool:
        """Whether the template wrote today's date into a text."""
        dates = [
            date for date in self._dates
            if date in text and not any(date in message.content for message in example.messages)
        ]  # fmt: skip
        self.findings.dates.update(dates)
        return bool(dates)


def _placeholder(place: int) -> str:
    """What stands for an answer whose thought the template would cut out."""
    return f"\u2060lighten\u2060held{place}\u2060"


def _restore_answers(
    text: str, answers: Sequence[Place], raw: Mapping[int, str]
) -> tuple[str, list[Place], set[int]]:
    """Put answers with their thoughts where marks hold their places; which could be put."""
    edits: list[tuple[int, int, str]] = []
    restored: set[int] = set()
    for place, words in raw.items():
        placeholder = _placeholder(place)
        at = text.find(placeholder)
        if at < 0:
            continue
        # A template puts an empty thought before an answer that it takes to be without one.
        empty = _EMPTY_BEFORE.search(text, 0, at)
        edits.append((empty.start(1) if empty else at, at + len(placeholder), words))
        restored.add(place)

    def moved(position: int) -> int:
        shift = 0
        for begin, end, words in edits:
            if position >= end:
                shift += len(words) - (end - begin)
            elif position > begin:
                return begin + shift
        return position + shift

    placed = [
        answer if answer.span is None
        else replace(answer, span=(moved(answer.span[0]), moved(answer.span[1])))
        for answer in answers
    ]  # fmt: skip
    pieces, at = [], 0
    for begin, end, words in edits:
        pieces += [text[at:begin], words]
        at = end
    return "".join([*pieces, text[at:]]), placed, restored


def require_end(tokenizer: Any) -> None:
    """A template that writes the tokenizer's end or start needs a tokenizer that has one.

    Raises:
        UserError: It has none, and the template fails without it or ends answers with nothing.
    """
    template = str(tokenizer.chat_template or "")
    missing = [
        name
        for name in ("eos_token", "bos_token")
        if name in template and getattr(tokenizer, name, None) is None
    ]
    if not missing:
        return
    try:
        text = render([Message("user", "?"), Message("assistant", "!")], tokenizer, "")
    except RefusedError:
        text = ""
    if text and ("eos_token" not in missing or ends(text, tokenizer)):
        return
    raise UserError(
        f"the tokenizer {tokenizer_name(tokenizer)} has no {' and no '.join(missing)}, which the "
        f"chat template writes; set {'it' if len(missing) == 1 else 'them'} in its "
        "tokenizer_config.json, or choose another chat_template"
    )


def fold(messages: Sequence[Message]) -> tuple[Message, ...]:
    """System messages at the beginning of the user turn after them."""
    folded: list[Message] = []
    waiting: list[str] = []
    for message in messages:
        if message.role in SYSTEM:
            waiting.append(message.content)
            continue
        if waiting and message.role == "user":
            message = replace(message, content="\n\n".join([*waiting, message.content]))
            waiting = []
        elif waiting and message.role == "assistant":
            folded.append(Message("user", "\n\n".join(waiting)))
            waiting = []
        folded.append(message)
    if waiting:
        folded.append(Message("user", "\n\n".join(waiting)))
    return tuple(folded)
