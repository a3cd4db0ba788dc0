"""Data sets larger than memory should hold: examples and encoded rows, on disk beyond some size.

A Python object per token or per word takes ten to thirty times the bytes of the file that it came
from. Examples are kept as text in a temporary file and made anew whenever one is looked at; encoded
rows are one array of ids and one of marks, in a file that the system maps: pages that nobody needs
are its to take back. Both behave as sequences. Small data sets stay in memory.
"""

from __future__ import annotations

import marshal
import mmap
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import IO, Any, overload

import numpy as np

from lighten.data.examples import Example, Message

# Data sets below this stay in memory: a file would cost more than it saves.
IN_MEMORY_BYTES = 4 * 2**20
# Arrays are gone through in pieces of this size.
PIECE_BYTES = 4 * 2**20
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Row:
    """An encoded example.

    Attributes:
        input_ids: Token ids.
        supervised: Per token whether it is a target; the first never is.
        example: Where it came from. Rows of an `EncodedRows` know its file and line alone, and of
            one that came as tokens that it did (its `input_ids` are empty, not None).
    """

    input_ids: list[int]
    supervised: list[bool]
    example: Example

    @property
    def supervised_tokens(self) -> int:
        """How many tokens are targets."""
        return sum(self.supervised)


class Spool:
    """Bytes that are appended and later read at any place: in memory, beyond some size on disk.

    The file has no name (`tempfile.TemporaryFile`): whatever happens to the process, it is gone
    with it. It lies in `TMPDIR`. Forked processes may read it side by side.

    Args:
        in_memory_bytes: Where the file begins.
    """

    def __init__(self, in_memory_bytes: int = IN_MEMORY_BYTES) -> None:
        self._limit = in_memory_bytes
        self._memory: bytearray | None = bytearray()
        self._file: IO[bytes] | None = None
        self._flushed = True
        self.length = 0

    def append(self, data: bytes) -> None:
        """Add bytes at the end."""
        self.length += len(data)
        if self._memory is not None:
            self._memory += data
            if self.length <= self._limit:
                return
            self._file = tempfile.TemporaryFile(prefix="lighten-")  # noqa: SIM115  # lives with self
            data, self._memory = bytes(self._memory), None
        assert self._file is not None
        self._file.write(data)
        self._flushed = False

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop)."""
        if self._memory is not None:
            return bytes(self._memory[start:stop])
        self.flush()
        assert self._file is not None
        if not hasattr(os, "pread"):  # Windows, which forks no process either
            self._file.seek(start)
            data = self._file.read(stop - start)
            self._file.seek(0, 2)
            return data
        pieces = []
        while start < stop:
            # Without moving the place in the file, which forked processes share.
            piece = os.pread(self._file.fileno(), stop - start, start)
            if not piece:
                raise EOFError(f"the temporary file ends {stop - start} bytes early")
            pieces.append(piece)
            start += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def flush(self) -> None:
        """Hand what was appended to the system, so that other processes see it."""
        if self._file is not None and not self._flushed:
            self._file.flush()
            self._flushed = True

    def mapped(self, dtype: type) -> np.ndarray[Any, Any]:
        """All bytes as an array of numbers; of a file, mapped."""
        if self._file is None or not self.length:
            return np.frombuffer(bytes(self._memory or b""), dtype=dtype)
        self.flush()
        return np.memmap(self._file, dtype=dtype, mode="r")


class ExampleStore(Sequence[Example]):
    """The examples of a data set, appended while it is read.

    Args:
        in_memory_bytes: Text beyond which they go to a temporary file.
    """

    def __init__(self, in_memory_bytes: int = IN_MEMORY_BYTES) -> None:
        self._objects: dict[int, Example] = {}
        self._size, self._limit = 0, in_memory_bytes
        self._spool: Spool | None = None
        self._ends = array("q", [0])
        self._files: dict[str, int] = {}
        self._names: list[str] = []

    def append(self, example: Example) -> None:
        """Add an example at the end."""
        if self._spool is None:
            self._objects[len(self._objects)] = example
            self._size += sum(len(message.content) for message in example.messages)
            self._size += len(example.text or "") + 8 * len(example.input_ids or ())
            if self._size > self._limit:
                objects, self._objects, self._spool = list(self._objects.values()), {}, Spool(0)
                for earlier in objects:
                    self._write(earlier)
            return
        self._write(example)

    def _write(self, example: Example) -> None:
        assert self._spool is not None
        if example.file not in self._files:
            self._files[example.file] = len(self._names)
            self._names.append(example.file)
        messages = [(m.role, m.content, m.train, m.extra) for m in example.messages]
        values = (
            self._files[example.file], example.line, messages, example.text, example.input_ids,
            example.labels, example.single_turn, example.tools,
        )  # fmt: skip
        try:
            # Python's own format for plain values; JSON took three times as long.
            data = marshal.dumps(values)
        except ValueError:  # Parquet has values, a date say, that are none
            self._objects[len(self)] = example
            data = b""
        self._spool.append(data)
        self._ends.append(self._spool.length)

    def flush(self) -> None:
        """Let forked processes see what was appended."""
        if self._spool is not None:
            self._spool.flush()

    def __len__(self) -> int:
        return len(self._objects) if self._spool is None else len(self._ends) - 1

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | Sequence[Example]:
        if isinstance(place, slice):
            return chosen(self, range(*place.indices(len(self))))
        at = range(len(self))[place]
        if at in self._objects:
            return self._objects[at]
        assert self._spool is not None
        return self._example(self._spool.read(self._ends[at], self._ends[at + 1]))

    def _example(self, data: bytes) -> Example:
        file, line, messages, text, ids, labels, single, tools = marshal.loads(data)
        return Example(
            self._names[file], line,
            tuple(Message(*message) for message in messages),
            text, ids, labels, single, tools,
        )  # fmt: skip


class _Chosen(Sequence[Example]):
    """Some examples of a store, by their places."""

    def __init__(self, store: Sequence[Example], places: Sequence[int]) -> None:
        self._store = store
        self._places: Sequence[int] = places if isinstance(places, range) else array("q", places)

    def flush(self) -> None:
        """See `ExampleStore`."""
        if isinstance(self._store, ExampleStore | _Chosen):
            self._store.flush()

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | Sequence[Example]:
        if isinstance(place, slice):
            return _Chosen(self._store, self._places[place])
        return self._store[self._places[place]]


def flush(examples: Sequence[Example]) -> None:
    """Let forked processes see all examples."""
    if isinstance(examples, ExampleStore | _Chosen):
        examples.flush()


def chosen(examples: Sequence[Example], places: Iterable[int]) -> Sequence[Example]:
    """Some of the examples, by their places; those of a store stay where they are."""
    if isinstance(examples, ExampleStore | _Chosen):
        return _Chosen(examples, places if isinstance(places, range) else list(places))
    return [examples[place] for place in places]


def spread_evenly(most: int, count: int) -> Sequence[int]:
    """Places of up to `most` of `count` rows, spread over all of them, in order; always the same.

    Each is one of an equal stretch of the rows. Where in its stretch differs from one to the next,
    by the golden ratio: a fixed stride would take rows of one kind where kinds take turns.
    """
    if most >= count:
        return range(count)
    starts = [number * count // most for number in range(most)]
    return [
        start + int((end - start) * (number * _GOLDEN % 1.0))
        for number, (start, end) in enumerate(pairwise([*starts, count]))
    ]


class EncodedRows(Sequence[Row]):
    """Encoded rows in a few arrays: a little over four bytes a token, and some thirty a row.

    Attributes:
        ids: All rows' ids behind each other, int32.
        supervised: All rows' marks, a bit each, every row from a byte of its own: uint8.
        starts: Where each row begins, and the end of the last: [rows + 1] int64.
        lines: Line of each row in its file, int64.
        files: Which of `names` each row's file is, int32.
        ready: Whether a row came as tokens, bool.
        names: File names.
    """

    def __init__(self, arrays: dict[str, np.ndarray[Any, Any]], names: Sequence[str]) -> None:
        self.ids, self.supervised = arrays["ids"], arrays["supervised"]
        self.starts, self.lines = arrays["starts"], arrays["lines"]
        self.files, self.ready = arrays["files"], arrays["ready"]
        self.names = list(names)
        # Where each row's marks begin.
        self._marks = np.concatenate([[0], np.cumsum(-(-self.lengths // 8))])

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """Tokens of each row."""
        return np.diff(self.starts)

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """The arrays by name, as the constructor takes them."""
        return {
            name: getattr(self, name)
            for name in ("ids", "supervised", "starts", "lines", "files", "ready")
        }

    @property
    def highest(self) -> int:
        """The highest id of all rows; -1 without any."""
        return max((int(part.max()) for part in pieces(self.ids)), default=-1)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        at = range(len(self))[place]
        tokens = slice(int(self.starts[at]), int(self.starts[at + 1]))
        origin = Example(
            self.names[self.files[at]],
            int(self.lines[at]),
            input_ids=() if self.ready[at] else None,
        )
        marks = np.unpackbits(
            self.supervised[self._marks[at] : self._marks[at + 1]], count=tokens.stop - tokens.start
        )
        return Row(self.ids[tokens].tolist(), marks.astype(np.bool_).tolist(), origin)


def pieces(array: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    """An array piece by piece; of a mapped one no more than a piece is in this process's memory."""
    size = max(1, PIECE_BYTES // array.itemsize)
    mapping = getattr(array, "_mmap", None)  # of NumPy's memmap
    for start in range(0, len(array), size):
        yield array[start : start + size]
        if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapping.madvise(mmap.MADV_DONTNEED)


class RowWriter:
    """Takes encoded rows one by one and hands them over as `EncodedRows`."""

    def __init__(self) -> None:
        self._ids, self._supervised = Spool(), Spool(IN_MEMORY_BYTES // 32)
        self._starts, self._lines = array("q", [0]), array("q")
        self._files, self._ready = array("i"), array("b")
        self._names: dict[str, int] = {}

    def append(
        self, ids: np.ndarray[Any, Any], supervised: np.ndarray[Any, Any], example: Example
    ) -> None:
        """Add a row: ids [T] as int32, marks [T] as bool."""
        self._ids.append(ids.tobytes())
        self._supervised.append(np.packbits(supervised).tobytes())
        self._starts.append(self._starts[-1] + len(ids))
        self._lines.append(example.line)
        self._files.append(self._names.setdefault(example.file, len(self._names)))
        self._ready.append(example.input_ids is not None)

    def extend(self, rows: EncodedRows) -> None:
        """Add rows that another writer wrote."""
        self._ids.append(rows.ids.tobytes())
        self._supervised.append(rows.supervised.tobytes())
        self._starts.extend((rows.starts[1:] + self._starts[-1]).tolist())
        self._lines.extend(rows.lines.tolist())
        places = [self._names.setdefault(name, len(self._names)) for name in rows.names]
        self._files.extend(places[file] for file in rows.files)
        self._ready.extend(rows.ready.tolist())

    @property
    def tokens(self) -> int:
        """Of all rows so far."""
        return self._starts[-1]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def rows(self) -> EncodedRows:
        """All rows; nothing may be appended any more."""
        arrays = {
            "ids": self._ids.mapped(np.int32),
            "supervised": self._supervised.mapped(np.uint8),
            "starts": np.frombuffer(self._starts, dtype=np.int64),
            "lines": np.frombuffer(self._lines, dtype=np.int64),
            "files": np.frombuffer(self._files, dtype=np.int32),
            "ready": np.frombuffer(self._ready, dtype=np.bool_),
        }
        return EncodedRows(arrays, list(self._names))


def lengths_of(rows: Sequence[Any]) -> list[int]:
    """Tokens of each row, without making the rows."""
    if isinstance(rows, EncodedRows):
        lengths: list[int] = rows.lengths.tolist()
        return lengths
    return [len(row.input_ids) for row in rows]
