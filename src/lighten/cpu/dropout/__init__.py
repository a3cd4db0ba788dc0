"""What LoRA's dropout keeps of activations, in one pass: `dropout.cpp` as operations of PyTorch's.

PyTorch's operations form a mask in some twenty passes through memory, each layer its own. Any
processor with a C++ compiler beside it has the kernel; elsewhere callers take those operations,
which draw the same masks. Dimensions: N rows, I features.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from lighten import cpu
from lighten.cpu import native
from lighten.cpu.kernels import FLAGS
from lighten.cpu.kernels import FOLDER as SHARED
from lighten.machine.hardware import processor_flags

FOLDER = Path(__file__).parent


def takes(x: Tensor) -> bool:
    """Whether the kernel computes on tensors such as this."""
    on_processor = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    return on_processor and library() is not None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None where there is none."""
    if not cpu.enabled():
        return None
    # A product and a sum are rounded one after the other, as PyTorch's operations round.
    flags = (*FLAGS, "-ffp-contract=off", f"-I{SHARED}")
    return native.loaded(FOLDER, flags, sorted(processor_flags()))[0]


@torch.library.custom_op("lighten::dropped", mutates_args=())
def dropped(x: Tensor, rows: Tensor, salt: int, threshold: int, scale: float) -> Tensor:
    """X times its mask.

    Args:
        x: [N, I], float32 or bfloat16.
        rows: A number for each row, [N], int32.
        salt: Of the layer.
        threshold: A feature whose 16 drawn bits, as a signed number, are below it is kept.
        scale: What is kept is multiplied with.

    Returns:
        [N, I], in x's format.
    """
    x, out = x.contiguous(), x.new_empty(x.shape)
    _call("lighten_dropped", x, rows, out, salt, threshold, scale)
    return out


@dropped.register_fake
def _(x: Tensor, rows: Tensor, salt: int, threshold: int, scale: float) -> Tensor:
    del rows, salt, threshold, scale
    return x.new_empty(x.shape)


@torch.library.custom_op("lighten::add_dropped_", mutates_args=("total",))
def add_dropped_(
    total: Tensor, x: Tensor, rows: Tensor, salt: int, threshold: int, scale: float
) -> None:
    """Add x times its mask to a contiguous total, in place; the rest as of `dropped`."""
    _call("lighten_add_dropped", x.contiguous(), rows, total, salt, threshold, scale)


@add_dropped_.register_fake
def _(total: Tensor, x: Tensor, rows: Tensor, salt: int, threshold: int, scale: float) -> None:
    del total, x, rows, salt, threshold, scale


def _call(
    name: str, x: Tensor, rows: Tensor, out: Tensor, salt: int, threshold: int, scale: float
) -> None:
    dll = library()
    assert dll is not None
    assert out.is_contiguous()
    assert rows.dtype == torch.int32
    rows = rows.contiguous()
    dll[name](
        ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(rows.data_ptr()),
        ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(x.shape[0]), ctypes.c_int64(x.shape[1]),
        ctypes.c_uint32(salt), ctypes.c_int32(threshold), ctypes.c_float(scale),
        ctypes.c_int(x.dtype == torch.bfloat16), ctypes.c_int64(torch.get_num_threads()),
    )  # fmt: skip
