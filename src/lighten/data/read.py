"""Read examples from the files people have, recognising their shape without configuration.

Shapes: Alpaca (`instruction`, `input`, `output`, with `system` and `history`), chat (`messages`),
ShareGPT (`conversations`), prompt-completion, `text`, and ready tokens (`input_ids`). Files: JSON
lines, JSON, CSV, Parquet, or a folder that holds `train`, `valid` and `test` files.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lighten.data.examples import Example, Message
from lighten.errors import UserError, missing_extra

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SPLITS = {"train": ("train",), "valid": ("valid", "validation", "val", "dev", "eval"),
          "test": ("test",)}  # fmt: skip
SHAPES = "instruction/output, messages, conversations, prompt/completion, text, or input_ids/labels"
_ROLES = {"human": "user", "gpt": "assistant", "bard": "assistant", "model": "assistant",
          "chatgpt": "assistant", "function_call": "assistant", "observation": "tool",
          "function": "tool"}  # fmt: skip
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")
# As many broken rows are told before the rest is only counted.
SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class BadRow:
    """A row that could not be read: where and why."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class Dataset:
    """What a file held.

    Attributes:
        examples: The rows that are whole.
        bad_rows: The others.
        format: The shape that most rows have.
        path: The file read.
        sha256: Of the file's bytes.
    """

    examples: list[Example]
    bad_rows: list[BadRow]
    format: str
    path: Path
    sha256: str


class _BadRowError(ValueError):
    """A row is broken: the reason."""


def read(
    path: str, *, split: str = "train", limit: int | None = None, skip_bad_rows: bool = False
) -> Dataset:
    """Read a file, or one split of a folder.

    Args:
        path: File or folder; `name#500` takes the first 500 rows.
        split: Which file of a folder: `train`, `valid` or `test`.
        limit: Rows at most.
        skip_bad_rows: Go on without broken rows.

    Raises:
        UserError: Nothing there, an unknown shape, or broken rows (each with its line).
    """
    name, _, count = path.partition("#")
    if count:
        if not count.isdigit():
            raise UserError(f"{path}: what follows # must be a number of rows")
        limit = min(int(count), limit) if limit else int(count)
    file = _file_of(Path(name), split)
    examples: list[Example] = []
    bad: list[BadRow] = []
    shapes: dict[str, int] = {}
    for line, row in _rows(file):
        if limit is not None and len(examples) >= limit:
            break
        try:
            if isinstance(row, _BadRowError):
                raise row
            shape, example = _example(row, str(file), line)
        except _BadRowError as error:
            bad.append(BadRow(str(file), line, str(error)))
            continue
        shapes[shape] = shapes.get(shape, 0) + 1
        examples.append(example)
    if bad and not skip_bad_rows:
        more = f"\n… and {len(bad) - SHOWN_PROBLEMS} more" if len(bad) > SHOWN_PROBLEMS else ""
        told = "\n".join(str(row) for row in bad[:SHOWN_PROBLEMS])
        raise UserError(f"{told}{more}\nmend these rows, or go on without them: --skip-bad-rows")
    if not examples:
        raise UserError(f"{file} holds no example; it needs rows of {SHAPES}")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Dataset(examples, bad, max(shapes, key=lambda s: shapes[s]), file, digest)


def has_split(path: str, split: str) -> bool:
    """Whether the path is a folder with a file for that split."""
    folder = Path(path.partition("#")[0])
    return folder.is_dir() and _split_file(folder, split) is not None


def _file_of(path: Path, split: str) -> Path:
    if path.is_dir():
        found = _split_file(path, split)
        if found is None:
            wanted = " or ".join(f"{split}{suffix}" for suffix in SUFFIXES)
            raise UserError(f"the folder {path} has no {split} file ({wanted})")
        return found
    if not path.is_file():
        raise UserError(f"the dataset {path} does not exist")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} is not one of {', '.join(SUFFIXES)}")
    return path


def _split_file(folder: Path, split: str) -> Path | None:
    for stem in SPLITS[split]:
        for suffix in SUFFIXES:
            if (folder / f"{stem}{suffix}").is_file():
                return folder / f"{stem}{suffix}"
    return None


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Line (or row) number and value; a broken line's value is a `_BadRowError`."""
    if file.suffix == ".parquet":
        yield from enumerate(_parquet(file), 1)
        return
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{file}:{line} is not UTF-8 text; save the file as UTF-8") from error
    if file.suffix == ".csv":
        yield from _csv(text, file)
    elif file.suffix == ".json" and text.lstrip().startswith("["):
        try:
            yield from enumerate(json.loads(text), 1)
        except ValueError as error:
            raise UserError(f"{file} is not valid JSON: {error}") from error
    else:
        yield from _json_lines(text)


def _csv(text: str, file: Path) -> Iterator[tuple[int, Any]]:
    """Records with the line each begins on; a cell may hold any amount of text."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(text.splitlines(keepends=True))
    line = 2
    try:
        for row in reader:
            if None in row:
                yield line, _BadRowError("has more cells than the header has columns; quote commas")
            else:
                yield line, {key: value for key, value in row.items() if value}
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{file}:{line} is not valid CSV: {error}") from error


def _json_lines(text: str) -> Iterator[tuple[int, Any]]:
    # Not splitlines(): JSON strings may hold U+2028 and its like.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            yield number, _BadRowError(f"not valid JSON ({error})")


def _parquet(file: Path) -> Iterable[Any]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise missing_extra("pyarrow", "parquet") from None
    rows: list[Any] = pyarrow.parquet.read_table(file).to_pylist()
    return [{k: v for k, v in row.items() if v is not None} for row in rows]


def _example(row: Any, file: str, line: int) -> tuple[str, Example]:
    """Shape and example of a row."""
    if not isinstance(row, Mapping):
        raise _BadRowError(f"a row must be an object, not {type(row).__name__}")
    if "input_ids" in row:
        return "tokens", _tokens(row, file, line)
    if "messages" in row or "conversations" in row:
        shape = "messages" if "messages" in row else "conversations"
        messages = _messages(row[shape], shape)
        if row.get("system") and messages[0].role != "system":
            messages = (Message("system", _text(row["system"], "system")), *messages)
        return shape, Example(file, line, messages, tools=row.get("tools"))
    if "instruction" in row or "output" in row:
        return "alpaca", Example(file, line, _alpaca(row), single_turn=not row.get("history"))
    if "prompt" in row and "completion" in row:
        return "prompt-completion", _prompt_completion(row, file, line)
    if "text" in row:
        text = _text(row["text"], "text")
        if not text.strip():
            raise _BadRowError("text is empty")
        return "text", Example(file, line, text=text)
    raise _BadRowError(
        f"unknown shape, its columns are {', '.join(map(str, row))}; a row needs {SHAPES}"
    )


def _alpaca(row: Mapping[str, Any]) -> tuple[Message, ...]:
    for key in ("instruction", "output"):
        if key not in row:
            raise _BadRowError(f"{key} is missing beside {', '.join(map(str, row))}")
    asked = [_text(row["instruction"], "instruction"), _text(row.get("input") or "", "input")]
    messages: list[Message] = []
    if row.get("system"):
        messages.append(Message("system", _text(row["system"], "system")))
    for pair in row.get("history") or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise _BadRowError("history must hold [question, answer] pairs")
        messages += [
            Message("user", _text(pair[0], "history")),
            Message("assistant", _text(pair[1], "history")),
        ]
    messages.append(Message("user", "\n".join(part for part in asked if part)))
    messages.append(Message("assistant", _text(row["output"], "output")))
    return tuple(messages)


def _prompt_completion(row: Mapping[str, Any], file: str, line: int) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        asked = _messages(prompt, "prompt") if isinstance(prompt, list) else (
            Message("user", _text(prompt, "prompt")),
        )  # fmt: skip
        answer = _messages(completion, "completion") if isinstance(completion, list) else (
            Message("assistant", _text(completion, "completion")),
        )  # fmt: skip
        asked = tuple(Message(m.role, m.content, False, m.extra) for m in asked)
        return Example(file, line, asked + answer, single_turn=True, tools=row.get("tools"))
    pair = (
        Message("user", _text(prompt, "prompt")),
        Message("assistant", _text(completion, "completion")),
    )
    return Example(file, line, pair, single_turn=True)


def _messages(value: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _BadRowError(f"{name} must be a list of at least one message")
    messages = []
    for place, raw in enumerate(value, 1):
        if not isinstance(raw, Mapping):
            raise _BadRowError(f"{name}: message {place} must be an object")
        role = raw.get("role", raw.get("from"))
        role = _ROLES.get(str(role), role)
        if role not in KNOWN_ROLES:
            raise _BadRowError(
                f"{name}: message {place} has the role {role!r}, not one of {KNOWN_ROLES}"
            )
        content = raw.get("content", raw.get("value"))
        if content is None and raw.get("tool_calls"):
            content = ""
        wanted = _trained(raw, f"{name}: message {place}")
        extra = tuple(
            (key, raw[key])
            for key in ("tool_calls", "tool_call_id", "name", "reasoning_content")
            if raw.get(key) is not None
        )
        text = _text(content, f"{name}: message {place}")
        messages.append(Message(str(role), text, wanted, extra))
    return tuple(messages)


def _trained(raw: Mapping[str, Any], name: str) -> bool | None:
    """What `train: false` or `weight: 0` say of a message."""
    train, weight = raw.get("train"), raw.get("weight")
    if train is not None and not isinstance(train, bool):
        raise _BadRowError(f"{name}: train must be true or false, not {train!r}")
    if weight is not None and weight not in (0, 1):
        raise _BadRowError(f"{name}: weight must be 0 or 1, not {weight!r}")
    if train is None and weight is not None:
        return bool(weight)
    return train


def _text(value: Any, name: str) -> str:
    """Text, or the text parts of a list of parts."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _BadRowError(f"{name} holds half of a surrogate pair, no character") from None
        return value
    if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        other = [part.get("type") for part in value if part.get("type", "text") != "text"]
        if other:
            raise _BadRowError(
                f"{name} holds a part of type {other[0]!r}; only text can be trained here"
            )
        return "".join(str(part.get("text", "")) for part in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise _BadRowError(
        f"{name} must be text, not {'nothing' if value is None else type(value).__name__}"
    )


def _tokens(row: Mapping[str, Any], file: str, line: int) -> Example:
    ids, labels = row["input_ids"], row.get("labels", row["input_ids"])
    if not isinstance(ids, list) or not all(isinstance(i, int) and i >= 0 for i in ids):
        raise _BadRowError("input_ids must be a list of token ids")
    if not isinstance(labels, list) or len(labels) != len(ids):
        raise _BadRowError(f"labels must be as long as input_ids ({len(ids)})")
    if not all(isinstance(label, int) for label in labels):
        raise _BadRowError("labels must be token ids, or -100 where a token is not supervised")
    return Example(file, line, input_ids=tuple(ids), labels=tuple(labels))
