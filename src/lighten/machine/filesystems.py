"""Which file system holds a folder: what is written to one that lies in memory saves none."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

IN_MEMORY = ("tmpfs", "ramfs")


def kind_of(folder: Path) -> str:
    """Kind of the file system that holds a folder, empty if the system does not say."""
    where = os.path.realpath(folder)
    mounts = [
        part
        for part in psutil.disk_partitions(all=True)
        if os.path.commonpath([where, part.mountpoint]) == part.mountpoint
    ] if os.name == "posix" else []  # fmt: skip
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else ""
