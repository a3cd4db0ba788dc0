"""Where tensors wait that the device is not to hold: main memory, or a file on a disk.

The file is mapped, so that its tensors are used as they lie. What was touched of it counts as the
process's memory until it is let go; then it waits in the system's page cache, which is written out
and taken back wherever memory is short. Letting go costs time when it comes too early, and never a
number: the mapping is shared with the file.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lighten.adapters import dtensors
from lighten.machine.disk import require_on_disk
from lighten.whole_files import cannot_write


class Store(Protocol):
    """Where tensors wait."""

    def zeros_like(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors on the processor of the same shapes and formats, all zero.

        Raises:
            UserError: There is no room for them.
        """

    def fetch(self, tensors: Iterable[Tensor]) -> None:
        """They are needed soon."""

    def release(self, tensors: Iterable[Tensor]) -> None:
        """They are not needed for a while."""

    def release_all(self) -> None:
        """None of them is needed at once."""


class MainMemory:
    """Main memory, beside a device that has its own."""

    def zeros_like(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See `Store`."""
        return [torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in tensors]

    def fetch(self, tensors: Iterable[Tensor]) -> None:
        """They are there."""

    def release(self, tensors: Iterable[Tensor]) -> None:
        """They stay."""

    def release_all(self) -> None:
        """They stay."""


class _Place(NamedTuple):
    """Where a tensor lies in a mapped file."""

    mapped: mmap.mmap
    start: int
    size: int


class Scratch:
    """Unnamed files in a folder, gone when the process is, however it ends.

    Args:
        folder: On a disk; it is created.
        setting: What the user calls the folder, for errors.

    Raises:
        UserError: The folder is in memory, or nothing can be written there.
    """

    def __init__(self, folder: Path, setting: str) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise cannot_write(error, folder) from error
        require_on_disk(folder, setting)
        self.folder, self.bytes = folder, 0
        self._files: list[mmap.mmap] = []
        self._places: dict[int, _Place] = {}  # by address
        _OPEN.add(self)

    def zeros_like(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """See `Store`; one file for all of them.

        Raises:
            DiskFull: The disk is.
        """
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + _whole_pages(size))
        mapped = self._file(starts[-1]) if starts[-1] else None
        zeros = []
        for tensor, start, size in zip(tensors, starts, sizes, strict=False):
            if mapped is None or not size:
                zeros.append(torch.zeros(tensor.shape, dtype=tensor.dtype))
                continue
            flat = torch.frombuffer(mapped, dtype=tensor.dtype, count=tensor.numel(), offset=start)
            self._places[flat.data_ptr()] = _Place(mapped, start, size)
            zeros.append(flat.view(tensor.shape))
        return zeros

    def fetch(self, tensors: Iterable[Tensor]) -> None:
        """Let the system begin to read."""
        self._advise("MADV_WILLNEED", tensors)

    def release(self, tensors: Iterable[Tensor]) -> None:
        """Give the pages to the page cache."""
        self._advise("MADV_DONTNEED", tensors)

    def release_all(self) -> None:
        """Give all pages to the page cache."""
        for mapped in self._files:
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def _advise(self, what: str, tensors: Iterable[Tensor]) -> None:
        if not hasattr(mmap, what):  # Windows
            return
        for tensor in tensors:
            local = dtensors.local_part(tensor)
            address = local.untyped_storage().data_ptr() if local.numel() else 0
            place = self._places.get(address)
            if place is None:
                continue
            inside = local.data_ptr() - address
            first = place.start + inside - inside % mmap.PAGESIZE
            size = place.start + inside + local.numel() * local.element_size() - first
            place.mapped.madvise(getattr(mmap, what), first, size)

    def _file(self, size: int) -> mmap.mmap:
        """A file of zeros whose room on the disk is taken: a mapping has no way to say it is full.

        Raises:
            DiskFull: The disk is.
        """
        try:
            with tempfile.TemporaryFile(dir=self.folder, prefix="lighten-") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
                mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise cannot_write(error, self.folder, size) from error
        self._files.append(mapped)
        self.bytes += size
        return mapped


_OPEN: weakref.WeakSet[Scratch] = weakref.WeakSet()


def release_all() -> None:
    """Give the pages of all mapped files back: something has read through them, as saving does."""
    for scratch in list(_OPEN):
        scratch.release_all()


def _whole_pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
