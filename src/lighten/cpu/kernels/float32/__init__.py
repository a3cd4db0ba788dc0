"""The attention's kernel in float32, for any processor with a C++ compiler beside it."""

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


@functools.cache
def loaded() -> tuple[ctypes.CDLL | None, str | None]:
    """The compiled kernel, or why there is none."""
    if not cpu.enabled():
        return None, cpu.OFF
    flags = processor_flags()
    # What keeps PyTorch's products to AVX2 keeps the kernel to it, too.
    narrow = ("-mno-avx512f",) if "avx2" in flags and "avx512f" not in flags else ()
    return native.loaded(FOLDER, (*FLAGS, *narrow, f"-I{SHARED}"), sorted(flags))
