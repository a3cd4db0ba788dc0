"""A job of `lighten.jobs` that takes as much memory as it is told to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from lighten.machine.hardware import PeakMemory


def run(*, mib: int) -> Iterator[dict[str, Any]]:
    """Write to each page of so many MiB."""
    memory = PeakMemory()
    block = np.ones(mib * 2**20, dtype=np.uint8)
    del block
    yield memory.read()
