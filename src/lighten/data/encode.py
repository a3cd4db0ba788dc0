"""From examples to token ids and a mask of the supervised ones.

A conversation is rendered once with its chat template and tokenised once, with offsets; the mask
is found on the text, so that tokens that merge across the border of prompt and answer cannot
shift it. Supervised are the assistant's answers, the token that ends each turn included.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lighten.data.conversation import Handling, Renderer
from lighten.data.examples import Example, Message
from lighten.data.findings import Findings
from lighten.data.storage import Row, RowWriter
from lighten.data.tokenise import EncodingCounts, tokenise
from lighten.errors import UserError

LEFT_OUT = "left out: "


@dataclass
class Encoded:
    """An encoded data set.

    Attributes:
        rows: The rows.
        counts: What was kept and lost.
        problems: A sentence per kind of loss, with the first row it befell.
        findings: What the chat template did, and what ends the answers.
    """

    rows: Sequence[Row]
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
    progress: Callable[[int, int], None] | None = None,
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
        progress: Told how many examples are encoded, and of how many.

    Raises:
        UserError: A template refuses rows, a row is too long and that was not allowed, or
            nothing at all is supervised (with the reason).
    """
    limit = limit or f"max_length {max_length}"
    counts = EncodingCounts(examples=len(examples))
    problems: dict[str, str] = {}
    causes: Counter[str] = Counter()
    written = RowWriter()
    renderer = Renderer(tokenizer, Handling(system_role, thinking))
    findings = renderer.findings
    too_long: str | None = None

    def whole(example: Example) -> bool:
        return not (completion_only_loss if example.single_turn else assistant_only_loss)

    for number, row in enumerate(tokenise(examples, renderer, whole, counts, problems), 1):
        if progress is not None:
            progress(number + findings.refused_rows, len(examples))
        where, before = row.example.where, int(row.supervised.sum())
        if before == 0:
            counts.dropped += 1
            causes["empty" if row.aligned else "unaligned"] += 1
            if row.aligned:
                problems.setdefault("empty", f"{where} has no answer to learn from")
            continue
        ids, supervised = row.ids[:max_length], row.supervised[:max_length]
        if len(row.ids) > max_length:
            too_long = too_long or f"{where} has {len(row.ids)} tokens, over {limit}"
            kept = int(supervised.sum()) if truncation_strategy == "truncate" else 0
            counts.lost_supervised_tokens += before - kept
            problems.setdefault(
                "long", f"{too_long}: {before - kept} of its {before} supervised tokens are lost"
            )
            if kept == 0:
                counts.dropped += 1
                causes["long"] += 1
                continue
            counts.truncated += 1
        written.append(ids, supervised, row.example)
    if not skip_bad_rows:
        findings.require_none_refused()
    if too_long and truncation_strategy == "raise":
        raise UserError(f"{too_long}; shorten it, or set truncation_strategy to truncate or drop")
    counts.rows, counts.tokens = len(written), written.tokens
    counts.supervised_tokens = written.supervised_tokens
    if not len(written):
        worst = causes.most_common(1)
        reason = problems[worst[0][0]] if worst else "there are no examples"
        raise UserError(f"nothing to learn from: no row has a supervised token, because {reason}")
    told = [*problems.values(), *findings.sentences()]
    told += [f"{LEFT_OUT}{sentence}" for sentence in findings.refusals()]
    return Encoded(written.rows(), counts, told, findings)


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
    rows = list(tokenise([asked], renderer, lambda _: False, EncodingCounts(), problems))
    renderer.findings.require_none_refused()
    ids, supervised = rows[0].ids, rows[0].supervised
    if not supervised.any():
        raise UserError(next(iter(problems.values()), f"{example.where} has an empty answer"))
    prompt: list[int] = ids[: int(supervised.argmax())].tolist()
    return prompt, rows[0].example.reference or reference
