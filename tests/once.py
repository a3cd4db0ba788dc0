"""What takes long to make is made once for all workers of a test run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def folder(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first who asks fills. Tests only read there: others read beside them.

    Args:
        factory: pytest's.
        name: Of the folder, which no other test has.
        make: Fills it; where that fails the next who asks tries again, in a folder of its own.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # which all workers have
    link = root / f"once-{name}"
    with FileLock(root / f"once-{name}.lock"):
        if not link.exists():
            made = factory.mktemp(name)
            make(made)
            link.symlink_to(made)
    return link.resolve()
