"""Weight files that are mapped into this process."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

_PAGEOUT = 21  # MADV_PAGEOUT of Linux 5.4: clean pages of a file are dropped, nothing is lost


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
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        if line.endswith(".safetensors"):
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            library.madvise(start, end - start, _PAGEOUT)  # refused by older systems: then it stays
