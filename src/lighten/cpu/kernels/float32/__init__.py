"""The kernels in float32, for any processor with a C++ compiler beside it."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from lighten import cpu
from lighten.cpu import native
from lighten.cpu.kernels import FLAGS
from lighten.cpu.kernels import FOLDER as SHARED
from lighten.machine.hardware import processor_flags

FOLDER = Path(__file__).parent


def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there are none, for the reason that `obstacle` gives."""
    return _loaded()[0]


def obstacle() -> str | None:
    """Why there are no kernels here; None where there are."""
    return _loaded()[1]


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str | None]:
    if not cpu.enabled():
        return None, cpu.OFF
    flags = processor_flags()
    # What keeps PyTorch's products to AVX2 keeps the kernels to it, too.
    narrow = ("-mno-avx512f",) if "avx2" in flags and "avx512f" not in flags else ()
    return native.loaded(FOLDER, (*FLAGS, *narrow, f"-I{SHARED}"), sorted(flags))
