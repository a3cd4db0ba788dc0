"""Tensors of safetensors files: read into memory that is there already, or where they lie.

Files are mapped: that reads faster than `preadv`, and pages go back to the system as soon as they
are not needed (`MADV_DONTNEED`), while its page cache keeps them for as long as it has room.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lighten.errors import UserError
from lighten.safetensors_header import INDEX, WHOLE, Stored, index_of, read_header

# Of a tensor so much is in memory twice at any time.
STRETCH_BYTES = 4 * 2**20
# Linux maps so much around a page that is looked at, where it lies in the page cache
# (`fault_around_bytes`): of many small tensors that is more than the tensors.
AROUND_BYTES = 64 * 1024
DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8,
    "I8": torch.int8,
}  # fmt: skip


class RateLimit:
    """Holds reading down to a rate, as a slower disk would. For benchmarks.

    Args:
        bytes_per_s: The rate.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._free_at = 0.0

    def after(self, size: int) -> None:
        """Wait until so many more bytes may have been read."""
        self._free_at = max(self._free_at, time.monotonic()) + size / self.bytes_per_s
        time.sleep(max(0.0, self._free_at - time.monotonic()))


# What benchmarks set; None: as fast as the disk is.
limit: RateLimit | None = None


class _Mapped:
    """A file's bytes as one tensor; nothing of it is in memory before it is read."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # By its address: tensors over memory that Python knows to be read-only come with a warning.
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)
        self._address = self._bytes.ctypes.data

    def tensor(self, start: int, size: int, dtype: torch.dtype) -> Tensor:
        """Numbers of the file, [n]; never to be written."""
        place = ctypes.cast(self._address + start, ctypes.POINTER(ctypes.c_uint8))
        return torch.from_numpy(np.ctypeslib.as_array(place, (size,))).view(dtype)

    def fetch(self, start: int, size: int) -> None:
        """Let the system begin to read."""
        self._advise("MADV_WILLNEED", start, size)

    def drop_pages(self, start: int, size: int) -> None:
        """Give the pages back, and those around them that came with them."""
        place = self._address + start  # the system counts from addresses, not in the file
        before, after = min(start, place % AROUND_BYTES), -(place + size) % AROUND_BYTES
        self._advise("MADV_DONTNEED", start - before, before + size + after)

    def touch(self, start: int, size: int) -> None:
        """Look at a byte of each page: the system reads and maps what is not there."""
        self.tensor(start, size, torch.uint8)[:: mmap.PAGESIZE].sum()

    def _advise(self, what: str, start: int, size: int) -> None:
        if not hasattr(mmap, what):  # Windows
            return
        first = start - start % mmap.PAGESIZE
        self._map.madvise(getattr(mmap, what), first, min(start + size, len(self._map)) - first)


class Shards(Mapping[str, Stored]):
    """The tensors of a model's files by name.

    Args:
        files: In whose names' order later ones win.

    Raises:
        UserError: One is torn.
    """

    def __init__(self, files: list[Path]) -> None:
        self._stored: dict[str, Stored] = {}
        for path in files:
            self._stored |= read_header(path)
        self._mapped: dict[Path, _Mapped] = {}
        self._lock = threading.Lock()

    @classmethod
    def of(cls, folder: Path) -> Shards:
        """Those that transformers would read of a model's folder.

        Raises:
            UserError: It has none, or one is torn.
        """
        index = index_of(folder)
        if index is not None:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return cls([folder / name for name in sorted(set(places.values()))])
        if not (folder / WHOLE).is_file():
            raise UserError(f"{folder} holds neither {WHOLE} nor {INDEX}; fetch the model anew")
        return cls([folder / WHOLE])

    def __getitem__(self, name: str) -> Stored:
        return self._stored[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def mapped(self, name: str) -> Tensor:
        """A tensor where it lies: what is not looked at is not in memory. Never to be written."""
        stored = self._stored[name]
        dtype = DTYPES[stored.kind]
        return self._file(stored).tensor(stored.start, stored.bytes, dtype).view(stored.shape)

    def in_place(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """A tensor where it lies; None: not in this format, or where numbers must not begin."""
        stored = self._stored[name]
        fits = DTYPES[stored.kind] == dtype and stored.start % dtype.itemsize == 0
        return self.mapped(name) if fits else None

    def bring(self, name: str) -> None:
        """Have a tensor in memory where it is mapped."""
        stored = self._stored[name]
        for start, size in _stretches(stored, file := self._file(stored)):
            file.touch(start, size)

    def drop(self, name: str) -> None:
        """Give back the memory of a tensor that is mapped."""
        stored = self._stored[name]
        self._file(stored).drop_pages(stored.start, stored.bytes)

    def read(self, name: str, into: Tensor) -> None:
        """Read a tensor into one of as many numbers, in that one's format.

        Args:
            name: Which.
            into: Contiguous, in main memory.
        """
        stored, flat = self._stored[name], into.view(-1)
        dtype = DTYPES[stored.kind]
        for start, size in _stretches(stored, file := self._file(stored)):
            first = (start - stored.start) // dtype.itemsize
            flat[first : first + size // dtype.itemsize].copy_(file.tensor(start, size, dtype))
            file.drop_pages(start, size)

    def _file(self, stored: Stored) -> _Mapped:
        with self._lock:
            if stored.path not in self._mapped:
                self._mapped[stored.path] = _Mapped(stored.path)
            return self._mapped[stored.path]


def _stretches(stored: Stored, file: _Mapped) -> Iterator[tuple[int, int]]:
    """A tensor's bytes in turns, (start, size), of which the system reads the next one ahead."""
    for first in range(0, stored.bytes, STRETCH_BYTES):
        start, size = stored.start + first, min(STRETCH_BYTES, stored.bytes - first)
        file.fetch(start, min(2 * STRETCH_BYTES, stored.bytes - first))
        yield start, size
        if limit is not None:
            limit.after(size)


class Loaded(Mapping[str, Stored]):
    """Tensors in memory, as `Shards` has those of files.

    Args:
        tensors: By name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._kinds = {dtype: kind for kind, dtype in DTYPES.items()}

    def __getitem__(self, name: str) -> Stored:
        tensor = self._tensors[name]
        return Stored(Path(), self._kinds[tensor.dtype], tuple(tensor.shape), 0, tensor.nbytes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def read(self, name: str, into: Tensor) -> None:
        """See `Shards.read`."""
        into.copy_(self._tensors[name].reshape(into.shape))
