"""Kernels of a processor, written in C++ and compiled on the machine that runs them.

What PyTorch does in a dozen operations, each through memory, a kernel does in one pass through the
caches. A compiler makes them for this very processor the first time that they are wanted, in a few
seconds, and the user's cache keeps them. These are of bfloat16; those of float32 are in `float32`,
and `formats` knows both. Where there is no compiler, or no bfloat16 arithmetic, callers fall back
to PyTorch's operations, and `obstacle` says why.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from lighten import cpu
from lighten.cpu import native
from lighten.machine.hardware import processor_flags

FOLDER = Path(__file__).parent
# GCC's own headers have values that are undefined on purpose.
FLAGS = ("-O3", "-march=native", "-Wall", "-Wextra",
         "-Wno-uninitialized", "-Wno-maybe-uninitialized")  # fmt: skip
NEEDED = "avx512_bf16"
TILES_REFUSED = "the system does not let processes use the processor's tiles"


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
    if NEEDED not in flags:
        return None, f"the processor has no {NEEDED}"
    dll, obstacle = native.loaded(FOLDER, FLAGS, sorted(flags))
    if dll is not None and not dll.lighten_allowed():
        return None, TILES_REFUSED
    return dll, obstacle
