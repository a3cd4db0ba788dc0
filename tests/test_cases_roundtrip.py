"""Any rows of text, written in every format by the library people use, read back as they were."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pyarrow.parquet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lighten import data

# Any character of UTF-8, and those that split lines, cells or documents more often than by chance.
CHARACTERS = st.one_of(
    st.sampled_from("\r\n\t,;|\"'\\ \u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\ufeff\x00{}[]#0"),
    st.characters(exclude_categories=["Cs"]),
)
TEXT = st.text(CHARACTERS, max_size=12)
Rows = list[dict[str, str]]


def by_csv(rows: Rows, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def by_json_lines(rows: Rows, path: Path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def by_arrow(rows: Rows, path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def pandas_json(orient: Any) -> Callable[[Rows, Path], None]:
    return lambda rows, path: pandas.DataFrame(rows).to_json(path, orient=orient)


WRITERS: dict[str, Callable[[Rows, Path], None]] = {
    "csv.csv": by_csv,
    "lines.jsonl": by_json_lines,
    "ascii.jsonl": lambda rows, path: path.write_text("\n".join(map(json.dumps, rows))) and None,
    "json.json": lambda rows, path: path.write_text(json.dumps(rows)) and None,
    "indented.json": lambda rows, path: path.write_text(json.dumps(rows, indent=1)) and None,
    "arrow.parquet": by_arrow,
    "pandas.parquet": lambda rows, path: pandas.DataFrame(rows).to_parquet(path),
    "pandas.csv": lambda rows, path: pandas.DataFrame(rows).to_csv(path, lineterminator="\r\n"),
    "pandas.tsv": lambda rows, path: pandas.DataFrame(rows).to_csv(
        path, sep="\t", index=False, lineterminator="\r\n"
    ),
    "pandas.jsonl": lambda rows, path: pandas.DataFrame(rows).to_json(
        path, orient="records", lines=True
    ),
    "records.json": pandas_json("records"),
    "columns.json": pandas_json("columns"),
    "split.json": pandas_json("split"),
    "index.json": pandas_json("index"),
}  # fmt: skip


# Separators alone are a blank line there (pandas.csv has an index besides).
SPREADSHEETS = ("csv.csv", "pandas.tsv")


def rows_of(keys: tuple[str, ...]) -> st.SearchStrategy[Rows]:
    return st.lists(st.fixed_dictionaries(dict.fromkeys(keys, TEXT)), min_size=1, max_size=6)


def as_rows(example: data.Example, keys: tuple[str, ...]) -> tuple[str, ...]:
    """What the example says, by the columns it came from."""
    if example.text is not None:
        return (example.text,)
    return tuple(message.content for message in example.messages)[-len(keys) :]


@given(st.sampled_from([("prompt", "completion"), ("instruction", "output")]).flatmap(
    lambda keys: st.tuples(st.just(keys), rows_of(keys))
))  # fmt: skip
@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_rows_of_text_read_back_equal_from_every_format(
    tmp_path: Path, keys_and_rows: tuple[tuple[str, ...], Rows]
) -> None:
    keys, rows = keys_and_rows
    for name, write in WRITERS.items():
        expected = [
            tuple(row[key] for key in keys)
            for row in rows
            if name not in SPREADSHEETS or any(row.values())
        ]
        if not expected:
            continue
        write(rows, tmp_path / name)
        dataset = data.read(str(tmp_path / name))
        assert [as_rows(example, keys) for example in dataset.examples] == expected, name
