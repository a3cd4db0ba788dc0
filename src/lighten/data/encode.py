"""From examples to token ids and a mask of the supervised ones.

A conversation is rendered once with its chat template and tokenised once, with offsets; the mask
is found on the text, so that tokens that merge across the border of prompt and answer cannot
shift it. Supervised are the assistant's answers, the token that ends each turn included.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jinja2 import TemplateError

from lighten.data.examples import Example, Message
from lighten.errors import UserError

_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
_EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
# Stands for an answer while its place is looked for.
_MARKER = "\u2060lighten\u2060answer\u2060"
Span = tuple[int, int]


@dataclass(frozen=True)
class Row:
    """An encoded example.

    Attributes:
        input_ids: Token ids.
        supervised: Per token whether it is a target; the first never is.
        example: Where it came from.
    """

    input_ids: list[int]
    supervised: list[bool]
    example: Example

    @property
    def supervised_tokens(self) -> int:
        """How many tokens are targets."""
        return sum(self.supervised)


@dataclass
class EncodingCounts:
    """What encoding did to a data set.

    Attributes:
        examples: Examples given.
        rows: Rows that came out.
        tokens: Their tokens.
        supervised_tokens: Those that are targets.
        truncated: Rows cut to the longest length allowed.
        dropped: Rows left out: too long, or without a supervised token.
        lost_supervised_tokens: Targets cut off or left out with their rows.
        unaligned: Rows whose answers could not be found in the rendered text.
        endless: Rows with an answer that the template does not end with a special token.
    """

    examples: int = 0
    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    truncated: int = 0
    dropped: int = 0
    lost_supervised_tokens: int = 0
    unaligned: int = 0
    endless: int = 0


@dataclass
class Encoded:
    """An encoded data set.

    Attributes:
        rows: The rows.
        counts: What was kept and lost.
        problems: A sentence per kind of loss, with the first row it befell.
    """

    rows: list[Row]
    counts: EncodingCounts
    problems: list[str] = field(default_factory=list)

    @property
    def sha256(self) -> str:
        """Of all ids and masks: two equal data sets train alike."""
        whole = hashlib.sha256()
        for row in self.rows:
            whole.update(np.asarray(row.input_ids, dtype=np.int64).tobytes())
            whole.update(np.asarray(row.supervised, dtype=np.bool_).tobytes() + b"|")
        return whole.hexdigest()


def encode(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    max_length: int,
    truncation_strategy: str = "truncate",
    assistant_only_loss: bool = True,
    completion_only_loss: bool = True,
) -> Encoded:
    """Encode examples with the tokenizer and its chat template.

    Args:
        examples: What to encode.
        tokenizer: A fast tokenizer; conversations need a chat template on it.
        max_length: Tokens a row may have.
        truncation_strategy: What happens to a longer row: `truncate` cuts its end off, `drop`
            leaves it out, `raise` stops.
        assistant_only_loss: In conversations only the assistant's turns are supervised.
        completion_only_loss: In single prompt-completion pairs only the completion is.

    Raises:
        UserError: A template refuses a row, a row is too long and that was not allowed, or
            nothing at all is supervised (with the reason).
    """
    counts = EncodingCounts(examples=len(examples))
    problems: dict[str, str] = {}
    causes: Counter[str] = Counter()
    rows: list[Row] = []
    whole = [
        not (completion_only_loss if example.single_turn else assistant_only_loss)
        for example in examples
    ]
    for row, aligned in _tokenised(examples, tokenizer, whole, counts, problems):
        before = row.supervised_tokens
        if before == 0:
            counts.dropped += 1
            causes["empty" if aligned else "unaligned"] += 1
            if aligned:
                problems.setdefault("empty", f"{row.example.where} has no answer to learn from")
            continue
        if len(row.input_ids) > max_length:
            if truncation_strategy == "raise":
                raise UserError(
                    f"{row.example.where} has {len(row.input_ids)} tokens, over max_length "
                    f"{max_length}; raise it, or set truncation_strategy to truncate or drop"
                )
            cut = Row(row.input_ids[:max_length], row.supervised[:max_length], row.example)
            kept = cut.supervised_tokens if truncation_strategy == "truncate" else 0
            counts.lost_supervised_tokens += before - kept
            problems.setdefault(
                "long",
                f"{row.example.where} has {len(row.input_ids)} tokens, over max_length "
                f"{max_length}: {before - kept} of its {before} supervised tokens are lost",
            )
            if kept == 0:
                counts.dropped += 1
                causes["long"] += 1
                continue
            counts.truncated += 1
            row = cut
        rows.append(row)
    counts.rows = len(rows)
    counts.tokens = sum(len(row.input_ids) for row in rows)
    counts.supervised_tokens = sum(row.supervised_tokens for row in rows)
    if not rows:
        worst = causes.most_common(1)
        reason = problems[worst[0][0]] if worst else "there are no examples"
        raise UserError(f"nothing to learn from: no row has a supervised token, because {reason}")
    return Encoded(rows, counts, list(problems.values()))


def prompt_of(example: Example, tokenizer: Any) -> tuple[list[int], str]:
    """Token ids before an example's last answer, exactly as training sees them, and the answer.

    Raises:
        UserError: The example does not end with an answer, or it cannot be found in the text.
    """
    reference = example.reference
    if reference is None:
        raise UserError(f"{example.where} does not end with an answer to compare with")
    only_last = [Message(m.role, m.content, False, m.extra) for m in example.messages[:-1]]
    last = Message("assistant", reference, True, example.messages[-1].extra)
    asked = Example(example.file, example.line, (*only_last, last), tools=example.tools)
    problems: dict[str, str] = {}
    row, _ = next(_tokenised([asked], tokenizer, [False], EncodingCounts(), problems))
    if not any(row.supervised):
        raise UserError(next(iter(problems.values()), f"{example.where} has an empty answer"))
    return row.input_ids[: row.supervised.index(True)], reference


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


def _tokenised(
    examples: Sequence[Example],
    tokenizer: Any,
    whole: Sequence[bool],
    counts: EncodingCounts,
    problems: dict[str, str],
) -> Iterator[tuple[Row, bool]]:
    """A row per example, before any length is looked at, and whether each answer was found."""
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} gives no offsets; a fast tokenizer is needed")
    texts: list[str] = []
    spans: list[list[Span]] = []
    aligned: list[bool] = []
    for example, everything in zip(examples, whole, strict=True):
        text = ""
        own: list[Span | None] = []
        if example.messages:
            text = render(example.messages, tokenizer, example.where, tools=example.tools)
            own = [(0, len(text))] if everything else _answers(example, text, tokenizer)
            if None in own:
                counts.unaligned += 1
                problems.setdefault("unaligned", _unaligned(example))
            found = [span for span in own if span is not None]
            if not everything and any(not _ends(text[a:b], tokenizer) for a, b in found):
                counts.endless += 1
                problems.setdefault("endless", _endless(example))
        texts.append(text)
        spans.append([span for span in own if span is not None])
        aligned.append(None not in own)
    if not texts:
        return
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    for place, example in enumerate(examples):
        if example.input_ids is not None and example.labels is not None:
            ids = list(example.input_ids)
            mask = [label != -100 for label in example.labels]
        elif example.text is not None:
            ids = _plain_text(example.text, tokenizer)
            mask = [True] * len(ids)
        else:
            ids = list(encoded["input_ids"][place])
            mask = _mask(encoded["offset_mapping"][place], spans[place])
        if mask:
            mask[0] = False  # nothing stands before the first token to predict it from
        yield Row(ids, mask, example), aligned[place]


def _plain_text(text: str, tokenizer: Any) -> list[int]:
    """A text's ids with the tokenizer's own start and one end token."""
    ids: list[int] = tokenizer(text)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]  # the text brought its own (trap 9)
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def _mask(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """A token is supervised if any of it is answer: what stands before is then pure prompt."""
    places = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    mask = np.zeros(len(places), dtype=np.bool_)
    for begin, end in spans:
        mask |= (places[:, 1] > begin) & (places[:, 0] < end)
    found: list[bool] = mask.tolist()
    return found


def _answers(example: Example, text: str, tokenizer: Any) -> list[Span | None]:
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
    return begin, begin + len(stripped) if _ends(stripped, tokenizer) else end


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


def _ends(answer: str, tokenizer: Any) -> bool:
    """Whether an answer ends with a special token, so that the model learns to stop (trap 10)."""
    return not answer or answer.rstrip().endswith(tuple(tokenizer.all_special_tokens))


def _unaligned(example: Example) -> str:
    return (
        f"{example.where}: an answer cannot be found in what the chat template made of it (the "
        "template rewrites it); use another chat_template, or one with {% generation %} marks"
    )


def _endless(example: Example) -> str:
    return (
        f"{example.where}: the chat template does not end the answer with a special token, so the "
        "model cannot learn to stop"
    )
