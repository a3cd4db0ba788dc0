"""Kernels by format: bfloat16 on processors that multiply it, float32 on any."""

from __future__ import annotations

import ctypes

import torch

from lighten.cpu import kernels
from lighten.cpu.kernels import float32


@torch.compiler.assume_constant_result
def available(dtype: torch.dtype) -> bool:
    """Whether there are kernels of a format here; a compiler takes it for settled."""
    return obstacle(dtype) is None


def obstacle(dtype: torch.dtype) -> str | None:
    """Why there are no kernels of a format here; None where there are."""
    if dtype == torch.bfloat16:
        return kernels.obstacle()
    if dtype == torch.float32:
        return float32.obstacle()
    return f"{str(dtype).removeprefix('torch.')} has no kernel"


def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The kernels of a format, where there are some."""
    compiled = kernels.library() if dtype == torch.bfloat16 else float32.library()
    assert compiled is not None
    return compiled
