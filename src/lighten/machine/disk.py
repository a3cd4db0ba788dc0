"""Room on the disk for what will be written, and whether it is a disk at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil

from lighten.errors import DiskFull, UserError

_SPARE_BYTES = 2**30  # left on the disk beside a kept copy
_IN_MEMORY = ("tmpfs", "ramfs")  # file systems


def require_room(
    folder: Path, nbytes: int, what: str, *,
    way_out: str = "free some space or choose another --output_dir",
) -> None:  # fmt: skip
    """A disk has room for what will be written.

    Args:
        folder: Where.
        nbytes: How much.
        what: Its name in the error.
        way_out: What the error says to do.

    Raises:
        DiskFull: It has not.
    """
    if (shortage := _shortage(folder, nbytes, what)) is not None:
        raise DiskFull(f"{shortage}; {way_out}")


def require_cache_room(folder: Path, nbytes: int, what: str) -> None:
    """The disk of the cache has room for a copy that is kept there, and some is left beside it.

    Args:
        folder: Of the copy.
        nbytes: Of the copy.
        what: Its name in the error.

    Raises:
        UserError: It has not.
    """
    if (shortage := _shortage(folder, nbytes + _SPARE_BYTES, what)) is not None:
        raise UserError(f"{shortage}; set LIGHTEN_CACHE to a folder with more room")


def _shortage(folder: Path, nbytes: int, what: str) -> str | None:
    free = free_bytes(folder)
    if free >= nbytes:
        return None
    return (
        f"{what} needs {size_text(nbytes)} in {_existing_parent(folder)} and the disk has "
        f"{size_text(free)} left"
    )


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk of a folder that may not be there yet."""
    return shutil.disk_usage(_existing_parent(folder)).free


def _existing_parent(folder: Path) -> Path:
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def size_text(nbytes: int) -> str:
    """Bytes as people write them."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def require_on_disk(folder: Path, setting: str, *, other: str = "a folder") -> None:
    """What is written to a folder leaves memory.

    Args:
        folder: Where.
        setting: That writes there, for the error.
        other: What the error says to choose on a disk.

    Raises:
        UserError: It lies in memory, where nothing would be saved.
    """
    if (kind := file_system(folder)) in _IN_MEMORY:
        raise UserError(
            f"{setting}: {folder} is in memory ({kind}), where nothing would be saved; choose "
            f"{other} on a disk"
        )


def file_system(folder: Path) -> str:
    """Kind of the file system that holds a folder, empty if the system does not say."""
    where = os.path.realpath(folder)
    mounts = [
        part
        for part in psutil.disk_partitions(all=True)
        if os.path.commonpath([where, part.mountpoint]) == part.mountpoint
    ] if os.name == "posix" else []  # fmt: skip
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else ""
