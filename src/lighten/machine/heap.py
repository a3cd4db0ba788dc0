"""The C library's heap, of which free memory can be given back to the system."""

from __future__ import annotations

import ctypes
import sys
from typing import Any


def glibc() -> Any:
    """The C library if it is glibc, else None."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL(None)
    except OSError:
        return None
    return library if hasattr(library, "gnu_get_libc_version") else None


def trim() -> bool:
    """Give free memory back to the system; say whether there was any (glibc only)."""
    library = glibc()
    return bool(library is not None and library.malloc_trim(0))
