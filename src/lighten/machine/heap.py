"""Memory that is given back to the system: the C library's free heap, and pages of mapped files."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

_PAGEOUT = 21  # MADV_PAGEOUT of Linux 5.4: clean pages of a file are dropped, nothing is lost


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


def drop_mapped_weights() -> None:
    """Give back pages of weight files that are mapped: what is still in use is read in again.

    A loader that maps a file and then stores weights in another layout (bitsandbytes on a
    processor) leaves pages behind that nothing reads any more, and that the system takes when it
    wants them. Does nothing where the system cannot.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in Path("/proc/self/maps").read_text("utf-8", errors="replace").splitlines():
        if line.endswith(".safetensors"):
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            library.madvise(start, end - start, _PAGEOUT)  # refused by older systems: then it stays
