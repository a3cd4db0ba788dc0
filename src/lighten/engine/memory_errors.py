"""Errors that say that memory ran out, whatever library raised them."""

from __future__ import annotations

import re

import torch

# What PyTorch, oneDNN and the C++ library say when a processor's memory is short, and cuBLAS, cuDNN
# and cuSOLVER of a GPU's, beside PyTorch's own error: their handles take memory of their own.
_SAID = re.compile(
    r"can't allocate memory|not enough memory|std::bad_alloc|out of memory|"
    r"could not create a (memory|primitive)|cannot allocate memory|"
    r"CU[A-Z]+_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)


class ShortOfMemory(RuntimeError):
    """Memory ran out on a rank before anything moved, and every rank knows."""


def ended_by_it(code: int, last_line: str) -> bool:
    """Whether memory ran out in a process that has ended.

    Args:
        code: Its exit code, or minus the signal that ended it: the kernel takes 9 where memory is
            short.
        last_line: Of what it said as errors.
    """
    return code == -9 or "MemoryError" in last_line or _SAID.search(last_line) is not None


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on a processor."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _SAID.search(str(error)) is not None
