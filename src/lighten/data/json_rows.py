"""Rows of JSON text: a value a line, values over several lines, a list, or a table as an object."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lighten.data.values import JSON, BadRowError, is_missing
from lighten.errors import UserError

_SPACE = re.compile(r"[ \t\r\n]*")
# Columns by which an object is a row itself, not a table of rows.
_ROW = ("messages", "conversations", "instruction", "output", "prompt", "completion", "text",
        "input_ids")  # fmt: skip
# Keys of a message: a list of messages is a conversation, no table.
_TURN = {"role", "from"}


def json_rows(stream: io.BufferedReader, file: Path) -> Iterator[tuple[int, Any]]:
    """Line and value of each row; a broken one is a `BadRowError`.

    Raises:
        UserError: The file is one JSON value, and it is broken or holds no rows.
    """
    number, line = _next_line(stream, 0)
    if line is None:
        return
    try:
        value = JSON.decode(line)
    except (ValueError, RecursionError):
        yield from _over_lines(line + stream.read().decode(), number, file, first=True)
        return
    after, following = _next_line(stream, number)
    if following is not None:
        yield number, value
        yield from _lines(stream, after, following, file)
    elif isinstance(value, list):
        yield from enumerate(value, 1)
    else:
        rows, _ = _table(value, file)
        yield from [(number, value)] if rows is None else enumerate(rows, 1)


def _next_line(stream: io.BufferedReader, number: int) -> tuple[int, str | None]:
    """The next line that is not blank, with its number.

    Lines are split at line feeds alone: JSON text may hold U+2028 and its like.
    """
    for raw in stream:
        number += 1
        line = raw.decode()
        if line.strip():
            return number, line
    return number, None


def _lines(
    stream: io.BufferedReader, number: int, line: str | None, file: Path
) -> Iterator[tuple[int, Any]]:
    """A value a line, from this line on."""
    while line is not None:
        try:
            value = JSON.decode(line)
        except (ValueError, RecursionError):
            # A broken line, or the first of a value over several lines: the rest tells which.
            yield from _over_lines(line + stream.read().decode(), number, file, first=False)
            return
        yield number, value
        number, line = _next_line(stream, number)


def _over_lines(text: str, line: int, file: Path, *, first: bool) -> Iterator[tuple[int, Any]]:
    """Values that may go over several lines; the first of a file may be all that it holds."""
    at = _after_space(text, 0)
    if first and text.startswith("[", at):
        yield from _elements(text, at, line, file)
        return
    while at < len(text):
        value, end = _value_at(text, at)
        following = _after_space(text, end)
        if first:
            if isinstance(value, BadRowError):
                _refuse_document(text, at, line, file)
            elif following == len(text):
                yield from _document(value, text, line, file)
                return
            first = False
        if isinstance(value, BadRowError):
            end = text.find("\n", at)
            following = len(text) if end < 0 else _after_space(text, end)
        yield line, value
        line += text.count("\n", at, following)
        at = following


def _document(value: Any, text: str, line: int, file: Path) -> Iterator[tuple[int, Any]]:
    """The rows of the one value that a file holds over several lines."""
    rows, key = _table(value, file)
    if rows is None:
        yield line, value
        return
    if key is not None:
        name = re.escape(json.dumps(key, ensure_ascii=False))
        for place in re.finditer(rf"{name}\s*:\s*(?=\[)", text):
            if JSON.raw_decode(text, place.end())[0] == rows:
                begin = line + text.count("\n", 0, place.end())
                text = text[: JSON.raw_decode(text, place.end())[1]]
                yield from _elements(text, place.end(), begin, file)
                return
    yield from enumerate(rows, 1)


def _value_at(text: str, at: int) -> tuple[Any, int]:
    """The value that begins there and ends with its line, and where it ends."""
    try:
        value, end = JSON.raw_decode(text, at)
    except json.JSONDecodeError as error:
        return BadRowError(f"not valid JSON ({_reason(text, at, error)})"), at
    except (ValueError, RecursionError) as error:
        return BadRowError(f"not valid JSON ({_describe(error)})"), at
    stop = text.find("\n", end)
    trailing = text[end : len(text) if stop < 0 else stop].strip()
    if trailing:
        return BadRowError(f"not valid JSON (after the value stands {trailing[:20]!r})"), at
    return value, end


def _elements(text: str, at: int, line: int, file: Path) -> Iterator[tuple[int, Any]]:
    """The elements of the list that begins there, which is all that the file holds."""
    begin = line
    counted_to = at

    def broken(place: int, why: str) -> UserError:
        line_number = line + text.count("\n", counted_to, place)
        return UserError(
            f"{file}:{line_number} is not valid JSON: {why}, in the list that begins on line "
            f"{begin}"
        )

    at = _after_space(text, at + 1)
    if not text.startswith("]", at):
        while True:
            line, counted_to = line + text.count("\n", counted_to, at), at
            try:
                value, end = JSON.raw_decode(text, at)
            except json.JSONDecodeError as error:
                raise broken(error.pos, error.msg) from error
            except (ValueError, RecursionError) as error:
                raise broken(at, _describe(error)) from error
            yield line, value
            at = _after_space(text, end)
            if text.startswith("]", at):
                break
            if not text.startswith(",", at):
                raise broken(at, "a comma or ] is missing")
            at = _after_space(text, at + 1)
    at = _after_space(text, at + 1)
    if at < len(text):
        raise broken(at, f"{text[at : at + 20]!r} follows the list")


def _refuse_document(text: str, at: int, line: int, file: Path) -> None:
    """Raise if the file is one broken value, not JSON lines of which the first is broken."""
    lines = [text_line for text_line in text.split("\n") if text_line.strip()]
    if 2 * sum(map(_is_object, lines)) >= len(lines):
        return
    try:
        JSON.raw_decode(text, at)
    except json.JSONDecodeError as error:
        place, why = error.pos, error.msg
    except (ValueError, RecursionError) as error:
        place, why = at, _describe(error)
    else:
        place, why = at, "after the value stands more"
    line_number = line + text.count("\n", at, place)
    raise UserError(
        f"{file}:{line_number} is not valid JSON: {why}; a file holds one object a line, or one "
        "list"
    )


def _is_object(line: str) -> bool:
    try:
        return isinstance(JSON.decode(line), dict)
    except (ValueError, RecursionError):
        return False


def _table(value: Any, file: Path) -> tuple[list[Any] | None, str | None]:
    """The rows of a table that is all a file holds, and the key of their list if they have one.

    No rows: the value is a row itself.

    Raises:
        UserError: There are several lists of rows.
    """
    if not isinstance(value, Mapping) or not value:
        return None, None
    columns = _columns(value)
    if columns is not None or any(key in value for key in _ROW):
        return columns, None
    if _is_split(value):  # pandas' orient="split"
        return [dict(zip(value["columns"], cells, strict=True)) for cells in value["data"]], None
    lists = [
        key for key, part in value.items()
        if key != "schema" and isinstance(part, list) and part
        and all(isinstance(row, Mapping) and not _TURN & row.keys() for row in part)
    ]  # fmt: skip
    if len(lists) == 1:
        return value[lists[0]], lists[0]
    if len(lists) > 1:
        raise UserError(
            f"{file} is an object with the lists {', '.join(lists)}; keep one list of rows in a "
            "file, or a file for each split"
        )
    objects = list(value.values())
    if all(isinstance(part, Mapping) and any(key in part for key in _ROW) for part in objects):
        return objects, None  # pandas' orient="index"
    return None, None


def _columns(value: Mapping[str, Any]) -> list[Any] | None:
    """Rows of a table of columns, `{"a": {"0": …}}` or `{"a": […]}`; None if it is none."""
    parts = list(value.values())
    if not parts:
        return None
    if all(isinstance(part, Mapping) for part in parts):
        keys = list(parts[0])
        if len(parts) > 1 and any(list(part) != keys for part in parts):
            return None
        if not keys or any(not str(key).lstrip("-").isdigit() for key in keys):
            return None
        if any(key in part for part in parts[0].values() if isinstance(part, Mapping)
               for key in _ROW):  # fmt: skip
            return None
        return [{name: part[key] for name, part in value.items()} for key in keys]
    if not all(isinstance(part, list) and 0 < len(part) == len(parts[0]) for part in parts):
        return None
    plain = not any(key in value for key in _ROW) and all(map(_is_plain, parts))
    if plain or any(map(_is_column, value.items())):
        return [dict(zip(value, cells, strict=True)) for cells in zip(*parts, strict=True)]
    return None


def _is_plain(cells: list[Any]) -> bool:
    return all(is_missing(cell) or isinstance(cell, str | int | float) for cell in cells)


def _is_column(item: tuple[str, Any]) -> bool:
    """Whether a known column holds a list of what one row has."""
    name, cells = item
    if name in ("messages", "conversations", "input_ids"):
        return bool(cells) and all(isinstance(cell, list) for cell in cells)
    return name in _ROW and _is_plain(cells)


def _is_split(value: Mapping[str, Any]) -> bool:
    names, cells = value.get("columns"), value.get("data")
    return (
        isinstance(names, list)
        and isinstance(cells, list)
        and all(isinstance(name, str) for name in names)
        and all(isinstance(row, list) and len(row) == len(names) for row in cells)
    )


def _after_space(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    assert space is not None
    return space.end()


def _reason(text: str, at: int, error: json.JSONDecodeError) -> str:
    """What is wrong where, counted on the value's first line as an editor counts."""
    begin = text.rfind("\n", 0, at) + 1
    stop = text.find("\n", at)
    stop = len(text) if stop < 0 else stop
    if error.pos > stop:
        return "it does not end on its line"
    return f"{error.msg} at column {error.pos - begin + 1}"


def _describe(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
