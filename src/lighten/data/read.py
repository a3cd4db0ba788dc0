"""Read examples from the files people have, recognising their shape without configuration.

Files: JSON lines, JSON, CSV, Parquet, or a folder that holds `train`, `valid` and `test` data, flat
or in the hub's layouts. Values are taken by their type: what is missing is missing, 0 is 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lighten.data.examples import Example
from lighten.data.files import Content
from lighten.data.formats import rows_of
from lighten.data.read_findings import ReadFindings
from lighten.data.shapes import SHAPES, example_of, renamed
from lighten.data.sources import sources, with_split
from lighten.data.storage import ExampleStore
from lighten.data.values import BadRowError
from lighten.errors import UserError

__all__ = ["BadRow", "Dataset", "left_out", "read", "with_split"]

# As many kinds of broken rows are told before the rest is only counted, and lines of each.
SHOWN_PROBLEMS = 10
SHOWN_LINES = 3


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that could not be read: where and why."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class Dataset:
    """What a file, all shards of a split, or several of these held.

    Attributes:
        examples: The rows that are whole.
        bad_rows: The others.
        format: The shape that most rows have.
        name: The files read, or the folders of the shards, for people.
        sha256: Of the bytes of all files, in order.
        findings: What reading passed over, a sentence each.
    """

    examples: Sequence[Example]
    bad_rows: list[BadRow]
    format: str
    name: str
    sha256: str
    findings: list[str] = field(default_factory=list)


def read(
    setting: str | Sequence[str],
    *,
    split: str = "train",
    limit: int | None = None,
    skip_bad_rows: bool = False,
    columns: Mapping[str, str] | None = None,
    content: Content | None = None,
) -> Dataset:
    """Read a file, one split of a folder, or several of these one behind another.

    Args:
        setting: Files or folders; `name#500` takes the first 500 rows.
        split: Which data of a folder: `train`, `valid` or `test`.
        limit: Rows at most of all.
        skip_bad_rows: Go on without broken rows.
        columns: Our name to the file's for columns that have other names there.
        content: What the files hold, where that was looked at just before.

    Raises:
        UserError: Nothing there, an unknown shape, a column that no row has, broken rows (each
            kind with its lines), a limit that leaves one of several out, or a file that changes
            while it is read.
    """
    all_sources = sources(setting, split)
    content = content or Content.of([file for source in all_sources for file in source.files])
    columns = columns or {}
    examples = ExampleStore()
    bad: list[BadRow] = []
    findings, unread = ReadFindings(), set[str]()
    shapes: dict[str, int] = {}
    missing_columns, present_columns = set(columns.values()), dict[str, None]()
    location = ", ".join(source.name for source in all_sources)
    for source in all_sources:
        if limit is not None and len(examples) >= limit:
            raise UserError(
                f"{source.name}: the {limit} rows that are asked for come from the data sets "
                "before it; say how many of each, as in data.jsonl#500"
            )
        most = _smaller(limit, None if source.rows is None else len(examples) + source.rows)
        for name, line, row in _numbered(source.files, columns, findings):
            if most is not None and len(examples) >= most:
                break
            try:
                if isinstance(row, BadRowError):
                    raise row
                if columns and isinstance(row, Mapping):
                    missing_columns -= row.keys()
                    present_columns.update(dict.fromkeys(map(str, row)))
                    row = renamed(row, columns)
                unread.clear()
                shape, example = example_of(row, name, line, unread)
            except BadRowError as error:
                bad.append(BadRow(name, line, str(error)))
                continue
            if unread:
                findings.add_unread(name, line, unread)
            shapes[shape] = shapes.get(shape, 0) + 1
            findings.look_at(example)
            examples.append(example)
    content.require_unchanged()
    if missing_columns and present_columns:
        raise UserError(
            f"{location} has no column {' or '.join(sorted(missing_columns))}, which "
            f"dataset_columns names; its columns are {', '.join(present_columns)}"
        )
    if bad and not skip_bad_rows:
        sentences = "\n".join(_sentences(bad))
        raise UserError(f"{sentences}\nfix these rows, or go on without them: --skip-bad-rows")
    if not examples:
        sentences = "".join(f"\n{sentence}" for sentence in _sentences(bad))
        raise UserError(f"{location} holds no example; it needs rows of {SHAPES}{sentences}")
    return Dataset(
        examples, bad, max(shapes, key=lambda s: shapes[s]), location, content.sha256,
        findings.sentences(len(examples)),
    )  # fmt: skip


def left_out(purpose: str, dataset: Dataset) -> list[str]:
    """How many broken rows a data set goes without, then a sentence per kind of them.

    Args:
        purpose: What the rows are for: training, held-out.
        dataset: As read with `skip_bad_rows`.
    """
    broken = len(dataset.bad_rows)
    if not broken:
        return []
    count = (
        f"{broken} of {broken + len(dataset.examples)} {purpose} rows "
        f"{'is' if broken == 1 else 'are'} broken and left out:"
    )
    return [count, *_sentences(dataset.bad_rows)]


def _sentences(bad: Sequence[BadRow]) -> list[str]:
    """A sentence per kind of broken row, with its lines; kinds beyond ten are only counted."""
    kinds: dict[tuple[str, str], list[BadRow]] = {}
    for row in bad:
        kinds.setdefault((row.file, re.sub(r"\d+", "0", row.reason)), []).append(row)
    sentences = [_sentence(rows) for rows in list(kinds.values())[:SHOWN_PROBLEMS]]
    unlisted = [len(rows) for rows in list(kinds.values())[SHOWN_PROBLEMS:]]
    if unlisted:
        sentences.append(
            f"… and {sum(unlisted)} more rows that are broken in {len(unlisted)} other ways"
        )
    return sentences


def _sentence(rows: Sequence[BadRow]) -> str:
    first, *later_rows = rows
    if not later_rows:
        return str(first)
    lines = [str(row.line) for row in later_rows[:SHOWN_LINES]]
    if len(later_rows) > SHOWN_LINES:
        lines.append(f"{len(later_rows) - SHOWN_LINES} more")
    listed = lines[0] if len(lines) == 1 else f"{', '.join(lines[:-1])} and {lines[-1]}"
    return f"{first} (so {'is line' if len(later_rows) == 1 else 'are lines'} {listed})"


def _smaller(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _numbered(
    files: Sequence[Path], columns: Mapping[str, str], findings: ReadFindings
) -> Iterator[tuple[str, int, Any]]:
    for file in files:
        name = str(file)
        for line, row in rows_of(file, columns.values(), findings):
            yield name, line, row
