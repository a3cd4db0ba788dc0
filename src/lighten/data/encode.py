"""From examples to token ids and a mask of the supervised ones.

A conversation is rendered once with its chat template and tokenised once, with offsets; the mask
is found on the text, so that tokens that merge across the border of prompt and answer cannot
shift it. Supervised are the assistant's answers, the token that ends each turn included.
"""

from __future__ import annotations

import hashlib
import os
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lighten.data.conversation import Handling, Renderer
from lighten.data.examples import Example, Message
from lighten.data.findings import Findings
from lighten.data.storage import EncodedRows, Row, RowWriter, flush
from lighten.data.tokenise import PART_EXAMPLES, EncodingCounts, Tokenised, tokenise
from lighten.errors import UserError
from lighten.machine import forks
from lighten.wording import counted

LEFT_OUT = "left out: "
# Processes are forked for what would take longer than this, as the first examples took: each
# begins in a tenth of it.
PAYS_S = 2.0
PATIENCE_S = 60.0
# Examples that a process takes at a time: with 256 each needed twice the memory (32 MiB), and no
# less time.
FORKED_EXAMPLES = 64
THREADS = "TOKENIZERS_PARALLELISM"  # of Hugging Face's tokenizers


class NothingSupervised(UserError):
    """No row of a data set has a supervised token.

    Attributes:
        reason: Why, with the first row.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"nothing to learn from: no row has a supervised token, because {reason}")
        self.reason = reason


@dataclass
class Encoded:
    """An encoded data set.

    Attributes:
        rows: The rows.
        counts: What was kept and lost.
        problems: A sentence per kind of loss, with the first row it befell.
        findings: What the chat template did, and what ends the answers.
        places: Which of the examples given each row is; of rows from a cache this is not known.
    """

    rows: Sequence[Row]
    counts: EncodingCounts
    problems: list[str] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)
    places: Sequence[int] = ()

    @property
    def sha256(self) -> str:
        """Of all ids and masks: two equal data sets train alike."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(np.asarray(row.input_ids, dtype=np.int64).tobytes())
            digest.update(np.asarray(row.supervised, dtype=np.bool_).tobytes() + b"|")
        return digest.hexdigest()


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
        progress: Log how many examples are encoded, and of how many.

    Raises:
        NothingSupervised: Nothing at all is supervised.
        UserError: A template refuses rows, or a row is too long and that was not allowed.
    """
    job = _Job(
        examples, tokenizer, Handling(system_role, thinking), max_length,
        limit or f"max_length {max_length}", cut=truncation_strategy == "truncate",
        chats_in_full=not assistant_only_loss, pairs_in_full=not completion_only_loss,
    )  # fmt: skip
    result = _encode_all(job, progress or _no_progress)
    counts, problems = result.counts, result.problems
    counts.examples = len(examples)
    if not skip_bad_rows:
        result.findings.require_none_refused()
    if result.too_long and truncation_strategy == "raise":
        raise UserError(
            f"{result.too_long}; shorten it, or set truncation_strategy to truncate or drop"
        )
    counts.refused = result.findings.refused_rows
    counts.rows, counts.tokens = len(result.writer), result.writer.tokens
    if not len(result.writer):
        worst = result.causes.most_common(1)
        reason = problems[worst[0][0]] if worst else "there are no examples"
        raise NothingSupervised(reason)
    if "empty" in problems:
        other_rows = result.causes["empty"] - 1
        suffix = f", nor {'has' if other_rows == 1 else 'have'} {counted(other_rows, 'other row')}"
        problems["empty"] += f"{suffix if other_rows else ''}: left out"
    sentences = [*problems.values(), *result.findings.sentences()]
    sentences += [f"{LEFT_OUT}{sentence}" for sentence in result.findings.refusals()]
    return Encoded(result.writer.rows(), counts, sentences, result.findings, result.places)


def cut(encoded: Encoded, max_length: int, limit: str | None = None) -> Encoded:
    """What encoding to a longest length would give, from rows that were encoded without one.

    Args:
        encoded: Rows of any length.
        max_length: Tokens a row may have; longer ones are cut.
        limit: What sets it, in words; None: the setting of that name.

    Raises:
        NothingSupervised: Nothing supervised is left.
    """
    job = _Job(
        [], None, Handling(), max_length, limit or f"max_length {max_length}",
        cut=True, chats_in_full=False, pairs_in_full=False,
    )  # fmt: skip
    result = _Result(counts=replace(encoded.counts, supervised_tokens=0))
    for place, row in enumerate(encoded.rows):
        ids = np.asarray(row.input_ids, dtype=np.int32)
        supervised = np.asarray(row.supervised, dtype=np.bool_)
        job.keep(Tokenised(ids, supervised, row.example, place), result, place)
    sentences = [*result.problems.values(), *encoded.problems]
    result.counts.rows, result.counts.tokens = len(result.writer), result.writer.tokens
    if not len(result.writer):
        raise NothingSupervised(sentences[0])
    return Encoded(result.writer.rows(), result.counts, sentences, encoded.findings)


def _no_progress(encoded: int, total: int) -> None:
    """Progress that nobody wants to see."""


@dataclass
class _Result:
    """What came of some of the examples.

    Attributes:
        writer: Their rows.
        places: Which of the examples each row is.
        counts: What was kept and lost.
        problems: The first sentence of each kind of loss.
        causes: Why rows have nothing to learn.
        too_long: A sentence about the first row that is too long.
        findings: What the chat template did.
    """

    writer: RowWriter = field(default_factory=RowWriter)
    places: array[int] = field(default_factory=lambda: array("q"))
    counts: EncodingCounts = field(default_factory=EncodingCounts)
    problems: dict[str, str] = field(default_factory=dict)
    causes: Counter[str] = field(default_factory=Counter)
    too_long: str | None = None
    findings: Findings = field(default_factory=Findings)

    def merge(self, rows: EncodedRows, later: _Result) -> None:
        """Add what came of later examples, and their rows."""
        self.writer.extend(rows)
        self.places.extend(later.places)
        self.counts.add(later.counts)
        self.problems = {**later.problems, **self.problems}
        self.causes += later.causes
        self.too_long = self.too_long or later.too_long
        self.findings.merge(later.findings)


@dataclass(frozen=True)
class _Job:
    """What is to be encoded, and how.

    Attributes:
        examples: All of them.
        tokenizer: With its chat template chosen.
        handling: What happens to system messages and thoughts.
        max_length: Tokens a row may have.
        limit: What sets it, in words.
        cut: A longer row is cut, not left out.
        chats_in_full: Conversations are learnt whole, not their answers alone.
        pairs_in_full: And so are single pairs.
    """

    examples: Sequence[Example]
    tokenizer: Any
    handling: Handling
    max_length: int
    limit: str
    cut: bool
    chats_in_full: bool
    pairs_in_full: bool

    def make(self, some: range, result: _Result, progress: Callable[[int], None]) -> None:
        """Encode some of the examples.

        Args:
            some: Their places.
            result: Receives what comes of them.
            progress: Log how many of them are encoded.
        """
        examples = self.examples if len(some) == len(self.examples) else (
            self.examples[some.start : some.stop]
        )  # fmt: skip
        renderer = Renderer(self.tokenizer, self.handling)
        tokenised = tokenise(
            examples, renderer, self._supervises_all, result.counts, result.problems
        )
        for number, row in enumerate(tokenised, 1):
            progress(number + renderer.findings.refused_rows)
            self.keep(row, result, some.start + row.place)
        result.findings.merge(renderer.findings)

    def part(self, some: range) -> tuple[dict[str, np.ndarray[Any, Any]], list[str], _Result]:
        """What comes of some of the examples, as it can be sent from process to process."""
        result = _Result()
        self.make(some, result, lambda _: None)
        rows, result.writer = result.writer.rows(), RowWriter()
        arrays = {name: np.asarray(array) for name, array in rows.arrays().items()}
        return arrays, rows.names, result

    def _supervises_all(self, example: Example) -> bool:
        return self.pairs_in_full if example.single_turn else self.chats_in_full

    def keep(self, row: Tokenised, result: _Result, place: int) -> None:
        """Write a row as far as it may go and has something to learn."""
        counts, location = result.counts, row.example.where
        before = int(np.count_nonzero(row.supervised))
        if before == 0:
            counts.dropped += 1
            result.causes["empty" if row.aligned else "unaligned"] += 1
            if row.aligned:
                result.problems.setdefault("empty", f"{location} has no answer to learn from")
            return
        remaining = before
        ids, supervised = row.ids[: self.max_length], row.supervised[: self.max_length]
        if len(row.ids) > self.max_length:
            result.too_long = (
                result.too_long or f"{location} has {len(row.ids)} tokens, over {self.limit}"
            )
            remaining = int(np.count_nonzero(supervised)) if self.cut else 0
            counts.lost_supervised_tokens += before - remaining
            result.problems.setdefault(
                "long",
                f"{result.too_long}: {before - remaining} of its {before} supervised tokens are "
                "lost",
            )
            if remaining == 0:
                counts.dropped += 1
                result.causes["long"] += 1
                return
            counts.truncated += 1
        counts.supervised_tokens += remaining
        result.writer.append(ids, supervised, row.example)
        result.places.append(place)


def _encode_all(job: _Job, progress: Callable[[int, int], None]) -> _Result:
    """Encode all examples: the first here, the others side by side where that is quicker."""
    result, total = _Result(), len(job.examples)
    first = min(total, PART_EXAMPLES)
    began = time.perf_counter()
    job.make(range(first), result, lambda encoded: progress(encoded, total))
    took_s = time.perf_counter() - began
    starts = range(first, total, FORKED_EXAMPLES)
    processes = min(forks.processors(), len(starts)) if forks.possible() else 1
    if processes < 2 or took_s * (total - first) / first < PAYS_S:
        job.make(range(first, total), result, lambda encoded: progress(first + encoded, total))
        return result

    def part(number: int) -> Any:
        start = starts[number]
        return job.part(range(start, min(start + FORKED_EXAMPLES, total)))

    flush(job.examples)
    with single_threaded():
        parts = forks.in_order(part, len(starts), processes, max(PATIENCE_S, 100 * took_s))
        for start, (arrays, names, later) in zip(starts, parts, strict=True):
            result.merge(EncodedRows(arrays, names), later)
            progress(min(start + FORKED_EXAMPLES, total), total)
    return result


@contextmanager
def single_threaded() -> Iterator[None]:
    """Until the end of the block a tokenizer begins no threads.

    Its own are not there in a forked process, which would wait for them.
    """
    before = os.environ.get(THREADS)
    os.environ[THREADS] = "false"
    try:
        yield
    finally:
        del os.environ[THREADS]
        if before is not None:
            os.environ[THREADS] = before


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
    masked = Example(example.file, example.line, (*only_last, last), tools=example.tools)
    problems: dict[str, str] = {}
    renderer = Renderer(tokenizer, handling)
    rows = list(tokenise([masked], renderer, lambda _: False, EncodingCounts(), problems))
    renderer.findings.require_none_refused()
    ids, supervised = rows[0].ids, rows[0].supervised
    if not supervised.any():
        raise UserError(next(iter(problems.values()), f"{example.where} has an empty answer"))
    prompt: list[int] = ids[: int(supervised.argmax())].tolist()
    return prompt, rows[0].example.reference or reference
