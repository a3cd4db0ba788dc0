"""From examples to token ids and marks, some hundred at a time.

While one part is tokenised (in the tokenizer's own threads, without Python's lock) the next one is
read and rendered. Nothing is kept of a part when it has been handed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from lighten.data.conversation import Rendered, Renderer
from lighten.data.examples import Example
from lighten.data.spans import endless, unaligned
from lighten.data.special import unchanged
from lighten.data.token_bytes import TokenBytes, bytes_before
from lighten.errors import UserError

# Examples that are rendered and tokenised together: enough to keep a tokenizer's threads busy.
PART_EXAMPLES = 256
Array = np.ndarray[Any, Any]


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

    def add(self, later: EncodingCounts) -> None:
        """Add what encoding did to later examples."""
        for name in vars(later):
            setattr(self, name, getattr(self, name) + getattr(later, name))


@dataclass(frozen=True)
class Tokenised:
    """An example as tokens, before any length is looked at.

    Attributes:
        ids: [T] int32.
        supervised: [T] bool: whether each token is a target; the first never is.
        example: What was encoded.
        place: Which of the examples it is.
        aligned: Each answer was located in the rendered text.
    """

    ids: Array
    supervised: Array
    example: Example
    place: int
    aligned: bool = True


_Part = tuple[int, list[tuple[Example, Rendered | None]], Future[list[Any]]]


def tokenise(
    examples: Sequence[Example],
    renderer: Renderer,
    supervise_all: Callable[[Example], bool],
    counts: EncodingCounts,
    problems: dict[str, str],
) -> Iterator[Tokenised]:
    """Tokens and marks of each example, in order.

    Rows that the chat template refuses are left out; the renderer's findings hold them.

    Args:
        examples: What to encode.
        renderer: Renders conversations.
        supervise_all: Whether all of a conversation is learnt, not its answers alone.
        counts: Receives `unaligned` and `endless`.
        problems: Receives the first sentence of each kind.

    Raises:
        UserError: The tokenizer gives no offsets.
    """
    tokenizer = renderer.tokenizer
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} gives no offsets; a fast tokenizer is needed")
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # what a file of the tokenizer may have set
    backend.no_padding()
    token_bytes = TokenBytes.of(tokenizer)
    encode = backend.encode_batch if token_bytes is None else backend.encode_batch_fast
    with unchanged(tokenizer), ThreadPoolExecutor(1, thread_name_prefix="tokenizer") as thread:
        waiting: _Part | None = None
        for start in range(0, len(examples), PART_EXAMPLES):
            part = [
                (example, renderer.render(example, supervise_all=supervise_all(example)))
                if example.messages
                else (example, None)
                for example in examples[start : start + PART_EXAMPLES]
            ]
            texts = [rendered.text for _, rendered in part if rendered is not None]
            encodings = thread.submit(encode, texts, add_special_tokens=False)
            if waiting is not None:
                yield from _rows(waiting, renderer, token_bytes, counts, problems)
            waiting = start, part, encodings
        if waiting is not None:
            yield from _rows(waiting, renderer, token_bytes, counts, problems)


def _rows(
    part: _Part,
    renderer: Renderer,
    token_bytes: TokenBytes | None,
    counts: EncodingCounts,
    problems: dict[str, str],
) -> Iterator[Tokenised]:
    start, pairs, future = part
    encodings = iter(future.result())
    for place, (example, rendered) in enumerate(pairs, start):
        if rendered is not None:
            row = _conversation(rendered, next(encodings), renderer, token_bytes, place)
            counts.unaligned += not rendered.aligned
            counts.endless += rendered.endless
            if not rendered.aligned:
                problems.setdefault("unaligned", unaligned(rendered.example))
            if rendered.endless:
                problems.setdefault("endless", endless(rendered.example, renderer.tokenizer))
        elif example.messages:
            continue
        else:
            row = _text_or_tokens(example, renderer, place)
        if len(row.supervised):
            row.supervised[0] = False  # nothing stands before the first token to predict it from
        yield row


def _conversation(
    rendered: Rendered,
    encoding: Any,
    renderer: Renderer,
    token_bytes: TokenBytes | None,
    place: int,
) -> Tokenised:
    ids = np.asarray(encoding.ids, dtype=np.int32)
    supervised = np.zeros(len(ids), dtype=np.bool_)
    tokens = _tokens_of(rendered.text, ids, encoding, renderer, token_bytes)
    for begin, end in rendered.learnt:
        supervised[tokens.of(begin, end)] = True
    if rendered.moved:
        moved = np.zeros(len(ids), dtype=np.bool_)
        for begin, end in rendered.moved:
            moved[tokens.of(begin, end)] = True
        renderer.findings.counts["tokens moved"] += int(moved.sum())
    for begin, end in rendered.answers:
        renderer.count_end(ids[tokens.of(begin, end)].tolist())
    return Tokenised(ids, supervised, rendered.example, place, rendered.aligned)


def _text_or_tokens(example: Example, renderer: Renderer, place: int) -> Tokenised:
    """An example that came as tokens, or as plain text."""
    tokenizer = renderer.tokenizer
    if example.input_ids is not None and example.labels is not None:
        token_ids = np.asarray(example.input_ids)
        supervised = np.asarray([label != -100 for label in example.labels], dtype=np.bool_)
    else:
        token_ids = np.asarray(_plain_text(example.text or "", tokenizer))
        supervised = np.ones(len(token_ids), dtype=np.bool_)
        renderer.findings.add("texts endless", example.where, tokenizer.eos_token_id is None)
    ids = token_ids.astype(np.int32)
    edges = np.flatnonzero(np.diff(supervised.astype(np.int8), prepend=0, append=0))
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        # What is learnt from its first token on holds questions too, and turns that end.
        renderer.count_end(ids[begin:end].tolist(), answer_alone=begin > 1)
    return Tokenised(ids, supervised, example, place)


def _tokens_of(
    text: str, ids: Array, encoding: Any, renderer: Renderer, token_bytes: TokenBytes | None
) -> _ByBytes | _ByOffsets:
    if token_bytes is None:
        return _ByOffsets(encoding)
    ends = token_bytes.ends(ids, text)
    if ends is not None:
        return _ByBytes(text, ends)
    # The quick way to encode tells no offsets: this row once more.
    backend = renderer.tokenizer.backend_tokenizer
    return _ByOffsets(backend.encode(text, add_special_tokens=False))


class _ByBytes:
    """Which tokens hold anything of a stretch of text, by the bytes of each.

    Args:
        text: The whole text.
        ends: [T] where each token ends, in bytes.
    """

    def __init__(self, text: str, ends: Array) -> None:
        self._text, self._ends = text, ends

    def of(self, begin: int, end: int) -> slice:
        """The tokens of a span: those that end behind its begin and begin before its end."""
        if begin >= end:
            return slice(0, 0)
        first, last = (bytes_before(self._text, place) for place in (begin, end))
        return slice(
            int(np.searchsorted(self._ends, first, side="right")),
            int(np.searchsorted(self._ends, last, side="left")) + 1,
        )


class _ByOffsets:
    """The same by the tokenizer's offsets.

    As Python objects all offsets cost more than the tokens themselves, so the two ends are asked
    for; only where the tokenizer cannot tell are all of them compared.
    """

    def __init__(self, encoding: Any) -> None:
        self._encoding = encoding
        self._count = len(encoding)
        self._offsets: Array | None = None

    def of(self, begin: int, end: int) -> slice:
        """The tokens of a span: those that end behind its begin and begin before its end."""
        if begin >= end:
            return slice(0, 0)
        first, last = self._encoding.char_to_token(begin), self._encoding.char_to_token(end - 1)
        if first is None or last is None or last < first:
            return self._compared(begin, end)
        # The tokens of one character, if it takes several, all hold it.
        while last + 1 < self._count and self._encoding.token_to_chars(last + 1)[0] < end:
            last += 1
        return slice(first, last + 1)

    def _compared(self, begin: int, end: int) -> slice:
        if self._offsets is None:
            self._offsets = np.asarray(self._encoding.offsets, dtype=np.int64).reshape(-1, 2)
        inside = np.flatnonzero((self._offsets[:, 1] > begin) & (self._offsets[:, 0] < end))
        return slice(int(inside[0]), int(inside[-1]) + 1) if len(inside) else slice(0, 0)


def _plain_text(text: str, tokenizer: Any) -> list[int]:
    """A text's ids with the tokenizer's own start and one end token."""
    ids: list[int] = tokenizer(text)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]  # the text brought its own (trap 9)
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]
