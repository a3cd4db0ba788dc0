"""What a container leaves this process of the machine: cores and memory, from its control groups.

A container sees the host's processors and the host's memory; what it may use of them stands in the
files of its control groups. Version 2 has one tree; version 1 one tree for each kind of resource.
Limits hold for a group and all below it, so the tightest one on the way up counts.

Sources: the kernel's Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst, and
scheduler/sched-bwc.rst.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def cores() -> int:
    """Processor cores that this process may use: its affinity, the group's cpuset and its quota.

    A part of a core beyond whole ones is left out: a thread more than the quota feeds makes all
    others wait for it at every matrix product.
    """
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    for group in _groups("cpuset"):
        for name in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"):
            if (named := _cpus(_text(group / name))) > 0:
                count = min(count, named)
                break
    for group in _groups("cpu"):
        quota = _quota(group)
        if quota is not None:
            count = min(count, int(quota))
    return max(1, count)


def memory_limit() -> int | None:
    """Bytes that the group may hold at most; None: as many as the machine has."""
    limits = [limit for group in _groups("memory") if (limit := _memory_limit(group)) is not None]
    return min(limits, default=None)


def memory_bytes() -> int:
    """Main memory of the machine, or of the container."""
    total, limit = psutil.virtual_memory().total, memory_limit()
    return total if limit is None else min(total, limit)


def free_memory_bytes() -> int:
    """Main memory that can still be taken without swapping, by the machine and by the group.

    File contents that the group was the first to read count as held, but go when room is wanted,
    those that were read again too: the kernel's own figure for a machine (MemAvailable) has both.
    """
    room = psutil.virtual_memory().available
    for group in _groups("memory"):
        limit = _memory_limit(group)
        held = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes")
        if limit is not None:
            room = min(room, max(0, limit - max(0, (held or 0) - _file_contents(group))))
    return room


def _memory_limit(group: Path) -> int | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        if (limit := _number(group / name)) is not None:
            # Version 1 writes the largest multiple of a page for "no limit".
            return limit if limit < 2**62 else None
    return None


def _quota(group: Path) -> float | None:
    """Cores' worth of time that the group has; None: no limit."""
    words = _text(group / "cpu.max").split()
    if not words:
        words = [_text(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    try:
        quota, period = int(words[0]), int(words[1])
    except (ValueError, IndexError):
        return None  # "max", or no such file
    return quota / period if quota > 0 and period > 0 else None


def _file_contents(group: Path) -> int:
    values = {}
    for line in _text(group / "memory.stat").splitlines():
        key, _, value = line.partition(" ")
        values[key] = int(value) if value.strip().isdecimal() else 0
    return sum(
        values.get(f"total_{name}", values.get(name, 0))
        for name in ("inactive_file", "active_file")
    )


def _groups(resource: str) -> Iterator[Path]:
    """Folders of this process's groups that limit a kind of resource, up to the root.

    Where the tree is the container's own, the path in the membership is the host's and not there:
    then the root is the group.
    """
    for line in _text(MEMBERSHIP).splitlines():
        _, _, rest = line.partition(":")
        resources, _, path = rest.partition(":")
        if resources and resource not in resources.split(","):
            continue
        tops = (ROOT,) if not resources else (ROOT / resource, ROOT / resources)
        for top in dict.fromkeys(tops):
            if not top.is_dir():
                continue
            group = top.joinpath(*(part for part in path.split("/") if part not in ("", "..")))
            while group != top:
                if group.is_dir():
                    yield group
                group = group.parent
            yield top


def _cpus(listed: str) -> int:
    """How many processors a list such as `0-3,8` names."""
    count = 0
    for part in listed.strip().split(","):
        first, _, last = part.partition("-")
        if first.strip().isdecimal():
            count += int(last or first) - int(first) + 1
    return count


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None  # "max": no limit


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""  # no such limit, or not Linux
