"""From examples to token ids and a mask of the supervised ones.

A conversation is rendered once with its chat template and tokenised once, with offsets; the mask
is found on the text, so that tokens that merge across the border of prompt and answer cannot
shift it. Supervised are the assistant's answers, the token that ends each turn included.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lighten.data.conversation import Handling, Renderer
from lighten.data.examples import Example, Message
from lighten.data.findings import Findings
from lighten.data.spans import Span, endless, unaligned
from lighten.errors import UserError

LEFT_OUT = "left out: "


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
        refused: Rows that the chat template refuses.
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
    refused: int = 0


@dataclass
class Encoded:
    """An encoded data set.

    Attributes:
        rows: The rows.
        counts: What was kept and lost.
        problems: A sentence per kind of loss, with the first row it befell.
        findings: What the chat template did, and what ends the answers.
    """

    rows: list[Row]
    counts: EncodingCounts
    problems: list[str] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)

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
    system_role: str | None = None,
    thinking: str | None = None,
    skip_bad_rows: bool = False,
    limit: str | None = None,
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
        system_role: What happens to system messages: `keep`, `fold`, `drop`; None folds those that
            the template does not take.
        thinking: What happens to thoughts that the template cuts out: `keep`, `drop`; None leaves
            them to it.
        skip_bad_rows: Go on without rows that the template refuses.
        limit: What sets `max_length`, in words; None: the setting of that name.

    Raises:
        UserError: A template refuses rows, a row is too long and that was not allowed, or
            nothing at all is supervised (with the reason).
    """
    limit = limit or f"max_length {max_length}"
    counts = EncodingCounts(examples=len(examples))
    problems: dict[str, str] = {}
    causes: Counter[str] = Counter()
    rows: list[Row] = []
    whole = [
        not (completion_only_loss if example.single_turn else assistant_only_loss)
        for example in examples
    ]
    renderer = Renderer(tokenizer, Handling(system_role, thinking))
    findings = renderer.findings
    tokenised = _tokenised(examples, renderer, whole, counts, problems)
    if not skip_bad_rows:
        findings.require_none_refused()
    for row, aligned in tokenised:
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
                    f"{row.example.where} has {len(row.input_ids)} tokens, over {limit}; "
                    "shorten it, or set truncation_strategy to truncate or drop"
                )
            cut = Row(row.input_ids[:max_length], row.supervised[:max_length], row.example)
            kept = cut.supervised_tokens if truncation_strategy == "truncate" else 0
            counts.lost_supervised_tokens += before - kept
            problems.setdefault(
                "long",
                f"{row.example.where} has {len(row.input_ids)} tokens, over {limit}: "
                f"{before - kept} of its {before} supervised tokens are lost",
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
    told = [*problems.values(), *findings.sentences()]
    told += [f"{LEFT_OUT}{sentence}" for sentence in findings.refusals()]
    return Encoded(rows, counts, told, findings)


def prompt_of(
    example: Example, tokenizer: Any, handling: Handling | None = None
) -> tuple[list[int], str]:
    """Token ids before an example's last answer, exactly as training sees them, and the answer.

    Args:
        example: Ends with an answer.
        tokenizer: With its chat template chosen.
        handling: What happened to system messages and thoughts in training.

    Raises:
        UserError: The template refuses the example, it does not end with an answer, or the answer
            cannot be found in the text.
    """
    reference = example.reference
    if reference is None:
        raise UserError(f"{example.where} does not end with an answer to compare with")
    only_last = [Message(m.role, m.content, False, m.extra) for m in example.messages[:-1]]
    last = Message("assistant", reference, True, example.messages[-1].extra)
    asked = Example(example.file, example.line, (*only_last, last), tools=example.tools)
    problems: dict[str, str] = {}
    renderer = Renderer(tokenizer, handling)
    rows = _tokenised([asked], renderer, [False], EncodingCounts(), problems)
    renderer.findings.require_none_refused()
    row, _ = rows[0]
    if not any(row.supervised):
        raise UserError(next(iter(problems.values()), f"{example.where} has an empty answer"))
    return row.input_ids[: row.supervised.index(True)], row.example.reference or reference


def _tokenised(
    examples: Sequence[Example],
    renderer: Renderer,
    whole: Sequence[bool],
    counts: EncodingCounts,
    problems: dict[str, str],
) -> list[tuple[Row, bool]]:
    """A row per example, before any length is looked at, and whether each answer was found.

    Rows that the chat template refuses are left out; the renderer's findings hold them.
    """
    tokenizer = renderer.tokenizer
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} gives no offsets; a fast tokenizer is needed")
    rendered = [
        renderer.render(example, whole=everything) if example.messages else None
        for example, everything in zip(examples, whole, strict=True)
    ]
    counts.refused = renderer.findings.refused_rows
    texts = [own.text for own in rendered if own is not None]
    encoded: Any = {}
    if texts:
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    rows: list[tuple[Row, bool]] = []
    place = -1
    for example, own in zip(examples, rendered, strict=True):
        aligned = True
        if own is not None:
            place += 1
            ids = list(encoded["input_ids"][place])
            offsets = np.asarray(encoded["offset_mapping"][place], dtype=np.int64).reshape(-1, 2)
            mask = _mask(offsets, own.learnt)
            renderer.findings.counts["tokens moved"] += sum(_mask(offsets, own.moved))
            for begin, end in own.answers:
                renderer.count_end(ids[_tokens_of(offsets, begin, end)])
            example, aligned = own.example, own.aligned
            counts.unaligned += not aligned
            counts.endless += own.endless
            if not aligned:
                problems.setdefault("unaligned", unaligned(example))
            if own.endless:
                problems.setdefault("endless", endless(example, tokenizer))
        elif example.messages:
            continue
        elif example.input_ids is not None and example.labels is not None:
            ids = list(example.input_ids)
            mask = [label != -100 for label in example.labels]
        else:
            ids = _plain_text(example.text or "", tokenizer)
            mask = [True] * len(ids)
            renderer.findings.add("texts endless", example.where, tokenizer.eos_token_id is None)
        if own is None:
            for answer in _runs(ids, mask):
                renderer.count_end(answer)
        if mask:
            mask[0] = False  # nothing stands before the first token to predict it from
        rows.append((Row(ids, mask, example), aligned))
    return rows


def _tokens_of(offsets: np.ndarray[Any, Any], begin: int, end: int) -> slice:
    """The tokens that hold anything of a span."""
    return slice(
        int(np.searchsorted(offsets[:, 1], begin, side="right")),
        int(np.searchsorted(offsets[:, 0], end, side="left")),
    )


def _runs(ids: Sequence[int], mask: Sequence[bool]) -> list[Sequence[int]]:
    """The stretches of supervised tokens."""
    edges = np.flatnonzero(np.diff(np.asarray([False, *mask, False], dtype=np.int8)))
    return [ids[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _plain_text(text: str, tokenizer: Any) -> list[int]:
    """A text's ids with the tokenizer's own start and one end token."""
    ids: list[int] = tokenizer(text)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]  # the text brought its own (trap 9)
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def _mask(offsets: np.ndarray[Any, Any], spans: Sequence[Span]) -> list[bool]:
    """A token is supervised if any of it is answer: what stands before is then pure prompt."""
    mask = np.zeros(len(offsets), dtype=np.bool_)
    for begin, end in spans:
        mask |= (offsets[:, 1] > begin) & (offsets[:, 0] < end)
    found: list[bool] = mask.tolist()
    return found
