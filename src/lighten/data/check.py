"""`lighten data check`: what a data file would be to a training run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lighten.data.encode import LEFT_OUT, Encoded, cut, encode
from lighten.data.examples import Example
from lighten.data.read import Dataset, left_out
from lighten.data.splits import shared_prompts
from lighten.data.storage import lengths_of

# Upper ends of the histogram's bins, in tokens.
BINS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
# What a decoder writes for bytes that are no character, and tokens that are joined at most until
# they are some: a token may end in the first byte of the next character, and so on.
BROKEN, JOINED = "\ufffd", 24


@dataclass(frozen=True)
class CheckReport:
    """What was found.

    Attributes:
        format: Shape of the rows.
        rows: Whole rows.
        bad_rows: A sentence per broken row.
        left_out: Their number, and a sentence per kind of them.
        lengths: Tokens per row: min, median, mean, p95, max.
        histogram: Rows by length, `(upper end, rows)`; the last has no end.
        counts: What encoding at `max_length` keeps and loses.
        problems: What reading passed over, and a sentence per kind of loss.
        duplicates: Rows whose prompt stood before.
        overlap: Rows whose prompt stands in the evaluation data too, None without any.
        sample: `(token, supervised)` of one row.
        max_length: Tokens a row may have.
        template: Name of the chat template and why.
    """

    format: str
    rows: int
    bad_rows: list[str]
    left_out: list[str]
    lengths: dict[str, float]
    histogram: list[tuple[int | None, int]]
    counts: dict[str, int]
    problems: list[str]
    duplicates: int
    overlap: int | None
    sample: list[tuple[str, bool]]
    max_length: int
    template: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def check(
    dataset: Dataset,
    tokenizer: Any,
    *,
    max_length: int,
    template: str,
    evaluation: Sequence[Example] | None = None,
    sample: int = 0,
    verify: Callable[[Sequence[Any], Any], None] | None = None,
    limit: str | None = None,
    **options: Any,
) -> CheckReport:
    """Look at a data set as a run would see it.

    Args:
        dataset: The data set.
        tokenizer: With its chat template chosen.
        max_length: Tokens a row may have.
        template: What to say of the chat template.
        evaluation: Examples to look for overlap with.
        sample: Which row to show token by token.
        verify: Raises for rows, with the tokenizer, that a model does not take.
        limit: What sets `max_length`, in words; None: the setting of that name.
        options: As for `encode`.
    """
    encoded = encode(dataset.examples, tokenizer, max_length=2**31, limit=limit, **options)
    if verify is not None:
        verify(encoded.rows, tokenizer)
    shortened = cut(encoded, max_length, limit)
    lengths = np.asarray(lengths_of(encoded.rows))
    keys = Counter(example.prompt_key for example in dataset.examples)
    overlap = (
        None
        if evaluation is None
        else sum(keys[key] for key in shared_prompts(dataset.examples, evaluation))
    )
    return CheckReport(
        format=dataset.format,
        rows=len(dataset.examples),
        bad_rows=[*map(str, dataset.bad_rows), *shortened.findings.refusals()],
        left_out=[*left_out("training", dataset), *shortened.findings.refusals()],
        lengths={
            "min": int(lengths.min()),
            "median": float(np.median(lengths)),
            "mean": float(lengths.mean()),
            "p95": float(np.percentile(lengths, 95)),
            "max": int(lengths.max()),
        },
        histogram=_histogram(lengths),
        counts=asdict(shortened.counts),
        problems=[
            *dataset.findings,
            *(problem for problem in shortened.problems if not problem.startswith(LEFT_OUT)),
        ],
        duplicates=sum(count - 1 for count in keys.values()),
        overlap=overlap,
        sample=_tokens(encoded, min(sample, len(encoded.rows) - 1), tokenizer),
        max_length=max_length,
        template=template,
    )


def _histogram(lengths: np.ndarray[Any, Any]) -> list[tuple[int | None, int]]:
    edges: list[int | None] = [*BINS, None]
    before, rows = 0, []
    for edge in edges:
        upto = int((lengths <= edge).sum()) if edge is not None else len(lengths)
        rows.append((edge, upto - before))
        before = upto
    while rows and rows[-1][1] == 0:
        rows.pop()
    return rows


def _tokens(encoded: Encoded, place: int, tokenizer: Any) -> list[tuple[str, bool]]:
    """Each token's text with its mask; tokens that hold parts of a character stand together."""
    row = encoded.rows[place]
    ids, mask = [int(token) for token in row.input_ids], [bool(on) for on in row.supervised]
    tokens: list[tuple[str, bool]] = []
    begin = 0
    while begin < len(ids):
        text, end = tokenizer.decode([ids[begin]]), begin + 1
        for longer in range(begin + 2, min(begin + JOINED, len(ids)) + 1):
            if BROKEN not in text:
                break
            joined = tokenizer.decode(ids[begin:longer])
            joined_ids = tokenizer(joined, add_special_tokens=False)["input_ids"]
            # The text itself may hold that mark.
            if BROKEN not in joined or joined_ids == ids[begin:longer]:
                text, end = joined, longer
                break
        tokens.append((text, any(mask[begin:end])))
        begin = end
    return tokens
