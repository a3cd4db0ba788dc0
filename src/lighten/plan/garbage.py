"""Python's search for garbage that refers to itself, kept away from where it only costs time.

Each full search walks through every object there is, and importing PyTorch and transformers makes a
million that stay. Whoever makes many more at a stretch sets off one search after another.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unsearched() -> Iterator[None]:
    """Nobody looks for garbage meanwhile; what nothing refers to goes at once, as ever."""
    searching = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if searching:
            gc.enable()
