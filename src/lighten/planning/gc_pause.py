"""Python's search for garbage that refers to itself, kept away from where it only costs time.

Each full search walks through every object there is, and importing PyTorch and transformers makes a
million that stay.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unsearched() -> Iterator[None]:
    """Nobody looks for garbage meanwhile: for imports, which make next to none."""
    searching = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if searching:
            gc.enable()


@contextmanager
def spared() -> Iterator[None]:
    """Garbage is looked for only among what is made meanwhile, and so never lies about for long."""
    if gc.get_freeze_count():  # what somebody froze before is theirs to thaw
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
