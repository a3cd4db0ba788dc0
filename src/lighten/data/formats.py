"""Rows of a file with the line each stands on: JSON lines, JSON, CSV and Parquet.

`datasets` and `pyarrow` read these too, but give no line numbers, guess types per block, and
fill missing keys of nested objects with nulls; Parquet alone is read with `pyarrow`.
"""

from __future__ import annotations

import codecs
import csv
import io
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from lighten.data.json_rows import json_rows
from lighten.data.read_findings import ReadFindings
from lighten.data.values import BadRowError
from lighten.errors import UserError, missing_extra
from lighten.wording import first_line

_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
# Names of columns that say what a table is; its separator is the one that shows them.
_HEADERS = ({"instruction", "output"}, {"prompt", "completion"}, {"messages"}, {"conversations"},
            {"text"}, {"input_ids"})  # fmt: skip
_WIDE = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Stands for a carriage return inside an unquoted cell; no UTF-8 text can hold it.
_RETURN = "\udc0d"
_ARROW_ROWS = 1024


def rows_of(
    file: Path, columns: Collection[str], findings: ReadFindings
) -> Iterator[tuple[int, Any]]:
    """Line (a row's number in Parquet) and value of each row; a broken one is a `BadRowError`.

    Args:
        file: What to read.
        columns: Columns that the recipe names, which tell a CSV's separator.
        findings: Receives a table whose quotes are read as they stand.

    Raises:
        UserError: The file as a whole cannot be read.
    """
    suffix = file.suffix.lower()
    try:
        if suffix in (".parquet", ".arrow"):
            yield from enumerate(_table(file), 1)
            return
        with file.open("rb") as stream:
            start = stream.read(4)
            if start.startswith(_WIDE):
                raise UserError(f"{file} is UTF-16 or UTF-32 text; save the file as UTF-8")
            stream.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
            if suffix in (".csv", ".tsv"):
                yield from _csv(stream, file, set(columns), findings)
            else:
                yield from json_rows(stream, file)
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(file)) from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error


def _not_utf8(file: Path) -> str:
    """Where a file has the first bytes that are not UTF-8, and what to do."""
    mend = "is not UTF-8 text; save the file as UTF-8"
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                korean = any("가" <= letter <= "힣" for letter in _as_cp949(line))
                hint = " (Excel saves Korean as cp949 unless CSV UTF-8 is chosen)" * korean
                return f"{file}:{number} {mend}{hint}"
    return f"{file} {mend}"


def _as_cp949(line: bytes) -> str:
    """The line as Korean Windows writes it; nothing where it is not that either."""
    try:
        return line.decode("cp949")
    except UnicodeDecodeError:
        return ""


def _csv(
    stream: io.BufferedReader, file: Path, columns: set[str], findings: ReadFindings
) -> Iterator[tuple[int, Any]]:
    """Records with the line each begins on; a cell may hold any amount of text."""
    csv.field_size_limit(2**31 - 1)
    # newline="" leaves line ends inside cells as they are.
    text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
    place = text.tell()
    header_line = text.readline()
    text.seek(place)
    separator = _separator(header_line, columns, file.suffix.lower() == ".tsv")
    unix = header_line.endswith("\n") and not header_line.endswith("\r\n")
    literal = separator == "\t" and _has_literal_quotes(text, place, unix)
    text.seek(place)
    if literal:
        findings.literal_quotes.append(str(file))
    # Not strict, a quote that is not closed takes the rows after it into its cell without a word.
    reader = csv.reader(
        _lines(text, unix), delimiter=separator, strict=True,
        quoting=csv.QUOTE_NONE if literal else csv.QUOTE_MINIMAL,
    )  # fmt: skip
    line = 1
    try:
        header = next((record for record in reader if record), None)
        if header is None:
            return
        names = [name.strip() for name in header]
        duplicates = sorted({name for name in names if name and names.count(name) > 1})
        if duplicates:
            raise UserError(f"{file}:1 has two columns called {duplicates[0]!r}; rename one")
        line = reader.line_num + 1
        for record in reader:
            # Excel writes separators alone for the lines below a table.
            if len(record) == 1 or any(record):
                yield line, _record(record, names, separator)
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{file}:{line} is not valid CSV: {error}; a cell that begins with a quote ends with "
            "one, and one inside of it is written twice"
        ) from error


def _has_literal_quotes(text: io.TextIOWrapper, place: int, unix: bool) -> bool:
    """Whether a table of tabs is whole only where its quotes are text; many programs quote none.

    It is not: strictly read it is valid, its header has quotes, or lines differ in their cells.
    """
    try:
        for _ in csv.reader(_lines(text, unix), delimiter="\t", strict=True):
            pass
        return False
    except csv.Error:
        text.seek(place)
    try:
        records = csv.reader(_lines(text, unix), delimiter="\t", quoting=csv.QUOTE_NONE)
        counts, header = set[int](), list[str]()
        for record in filter(None, records):
            header = header or record
            counts.add(len(record))
    except csv.Error:
        return False
    return len(counts) == 1 and not any('"' in name for name in header)


def _lines(text: io.TextIOWrapper, unix: bool) -> Iterator[str]:
    """Lines as the file ends its first one."""
    return _without_returns(text) if unix else iter(text)


def _record(record: list[str], names: list[str], separator: str) -> Any:
    if len(record) > len(names) and any(cell for cell in record[len(names) :]):
        return BadRowError(
            f"has more cells than the header has columns; quote cells that hold a "
            f"{_SEPARATORS[separator]}"
        )
    cells = (cell.replace(_RETURN, "\r") if _RETURN in cell else cell for cell in record)
    return {name: cell for name, cell in zip(names, cells, strict=False) if name}


def _separator(header: str, columns: set[str], tabs_first: bool) -> str:
    """The separator under which the header shows known columns, else the most columns."""
    ranked = sorted(_SEPARATORS, key=lambda mark: mark != "\t") if tabs_first else [*_SEPARATORS]
    names_by_mark = {
        mark: {name.strip() for name in next(csv.reader([header], delimiter=mark), [])}
        for mark in ranked
    }
    for mark, names in names_by_mark.items():
        if (columns and columns <= names) or any(required <= names for required in _HEADERS):
            return mark
    if len(names_by_mark[ranked[0]]) > 1:
        return ranked[0]
    return max(ranked, key=lambda mark: len(names_by_mark[mark]))


def _without_returns(text: io.TextIOWrapper) -> Iterator[str]:
    """Lines that end where a line feed stands; pandas quotes no lone carriage return."""
    line = ""
    for part in text:
        line += part
        if not part.endswith("\r"):
            yield _guarded(line)
            line = ""
    if line:
        yield _guarded(line)


def _guarded(line: str) -> str:
    if "\r" not in line:
        return line
    if line.endswith("\r\n"):
        return line[:-2].replace("\r", _RETURN) + "\r\n"
    return line.replace("\r", _RETURN)


def _table(file: Path) -> Iterator[Any]:
    """Rows of a Parquet file, or of an Arrow file as `datasets` saves them."""
    try:
        import pyarrow
    except ImportError:
        raise missing_extra("pyarrow", "parquet") from None
    try:
        integer_columns = _integer_columns(file)
        for batch in _batches(file):
            duplicates = [name for name in batch.schema.names if batch.schema.names.count(name) > 1]
            if duplicates:
                raise UserError(f"{file} has two columns called {duplicates[0]!r}; rename one")
            for row in batch.to_pylist(maps_as_pydicts="lossy"):
                for name in integer_columns & row.keys():
                    if row[name] is not None and math.isfinite(row[name]):
                        row[name] = int(row[name])
                yield {key: _unfilled(value) for key, value in row.items()}
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        reason = first_line(error)
        format_name = "Parquet" if file.suffix.lower() == ".parquet" else "Arrow"
        raise UserError(f"{file} is not valid {format_name}: {reason}") from error


def _batches(file: Path) -> Iterator[Any]:
    import pyarrow.ipc
    import pyarrow.parquet

    if file.suffix.lower() == ".parquet":
        with pyarrow.parquet.ParquetFile(file) as table:
            yield from table.iter_batches(_ARROW_ROWS)
    else:
        with file.open("rb") as stream:
            yield from pyarrow.ipc.open_stream(stream)


def _integer_columns(file: Path) -> set[str]:
    """Columns of whole numbers that pandas made floats because a value was missing."""
    import pyarrow

    integral: dict[str, bool] = {}
    missing: set[str] = set()
    for batch in _batches(file):
        for place, field in enumerate(batch.schema):
            if not pyarrow.types.is_floating(field.type) or not integral.get(field.name, True):
                continue
            numbers = batch.column(place).to_pylist()
            values = [n for n in numbers if n is not None and math.isfinite(n)]
            integral[field.name] = all(n.is_integer() for n in values)
            if len(values) < len(numbers):
                missing.add(field.name)
        if not any(integral.values()):
            break
    return {name for name in missing if integral[name]}


def _unfilled(value: Any) -> Any:
    """Without the keys that Arrow filled in: each object of a column has the keys of all."""
    if isinstance(value, Mapping):
        return {key: _unfilled(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_unfilled(inner) for inner in value]
    return value
