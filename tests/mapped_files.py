"""What a process has in memory of the files that it maps (Linux)."""

from __future__ import annotations

from pathlib import Path


def resident_bytes(path: Path) -> int:
    """How much of a mapped file this process has in memory."""
    lines = Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines()
    total, counts = 0, False
    for line in lines:
        if "-" in line.split(" ", 1)[0]:  # a mapping's first line, with its addresses
            counts = line.endswith(str(path))
        elif counts and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total
