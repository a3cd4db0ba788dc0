"""Kernels of generation for processors, compiled on the machine that runs them.

Any processor with a C++ compiler beside it has them: with AVX2, FMA and F16C eight numbers go at
a time, elsewhere the compiler decides. Without a compiler callers take PyTorch's operations.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from lighten import cpu
from lighten.cpu import native
from lighten.cpu.kernels import FLAGS
from lighten.cpu.kernels import FOLDER as SHARED
from lighten.machine.hardware import processor_flags

FOLDER = Path(__file__).parent


def takes(x: torch.Tensor) -> bool:
    """Whether the kernels compute on tensors such as this."""
    # Asked for every layer of every step: x.device.type would take ten times as long.
    return x.is_cpu and x.dtype in (torch.float32, torch.bfloat16) and library() is not None


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
    # -ffast-math lets the compiler take the exponentials of several scores at a time; but no sum
    # in another order for one number of rows than for another.
    flags = (*FLAGS, "-ffast-math", "-fno-associative-math", f"-I{SHARED}")
    return native.loaded(FOLDER, flags, sorted(processor_flags()))
