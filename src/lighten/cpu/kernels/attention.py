"""Causal attention in one kernel per pass: `attention.cpp` as operations of PyTorch's.

There are two, one of bfloat16 for processors that multiply it, and one of float32 for any.

Dimensions: B rows, K key-value heads, H = K · G query heads, T tokens, D features of a head.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lighten.cpu.kernels import formats

MOST_FEATURES = 256
NO_WINDOW = 2**40  # tokens


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a kernel attends to these."""
    return (
        fits(query)
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == value.shape[-1]
    )


def fits(query: Tensor) -> bool:
    """Whether there is a kernel that attends with such queries."""
    here = query.device.type == "cpu" and query.shape[-1] <= MOST_FEATURES
    return here and formats.available(query.dtype)


class _View(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [
        (name, ctypes.c_int64) for name in ("batch", "head", "token")
    ]

    @classmethod
    def of(cls, x: Tensor) -> _View:
        return cls(x.data_ptr(), *x.stride()[:3])


class _Row(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "start", "length", "before")]


class _Job(ctypes.Structure):
    """`Job` in `attention.cpp`."""

    _fields_ = [
        *((name, _View) for name in ("q", "k", "v", "out", "grad", "grad_q", "grad_k", "grad_v")),
        ("sums", ctypes.c_void_p), ("rows", ctypes.c_void_p),
        *((name, ctypes.c_int64)
          for name in ("row_count", "tokens", "heads", "key_heads", "D", "window")),
        ("scale", ctypes.c_float), ("threads", ctypes.c_int64),
    ]  # fmt: skip


def _run(
    function: str, views: Sequence[Tensor | None], sums: Tensor, scale: float,
    starts: Sequence[int], window: int,
) -> None:  # fmt: skip
    query, key = views[0], views[1]
    assert query is not None
    assert key is not None
    if starts:
        rows = [_Row(0, start, stop - start, start) for start, stop in pairwise(starts)]
    else:
        tokens = query.shape[2]
        rows = [_Row(row, 0, tokens, row * tokens) for row in range(query.shape[0])]
    array = (_Row * len(rows))(*rows)
    job = _Job(
        *(_View() if view is None else _View.of(view) for view in views),
        sums.data_ptr(), ctypes.addressof(array), len(rows), sums.shape[1], query.shape[1],
        key.shape[1], query.shape[3], window or NO_WINDOW, scale, torch.get_num_threads(),
    )  # fmt: skip
    if formats.library(query.dtype)[function](ctypes.byref(job)):
        raise MemoryError("the attention's kernel found no memory for its blocks")


@torch.library.custom_op("lighten::attention", mutates_args=())
def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, starts: list[int], window: int = 0
) -> tuple[Tensor, Tensor]:
    """softmax(scale · Q Kᵀ + causal) V.

    Args:
        query: [B, H, T, D], bfloat16 or float32, as `key` and `value`.
        key: [B, K, T, D].
        value: [B, K, T, D].
        scale: Factor on the scores.
        starts: Where each of the packed rows begins that the T tokens are (B is 1), and T; empty:
            rows are not packed.
        window: How many keys a query sees, its own last; 0: all before it.

    Returns:
        [B, H, T, D], whose memory is [B, T, H, D], and [H, B · T] float32: the logarithms of each
        query's sum of exponentials.
    """
    out, sums = outputs(query)
    views = (*_dense(query, key, value), out, *[None] * 4)
    _run("lighten_attention", views, sums, scale, starts, window)
    return out, sums


@attention.register_fake
def _(query: Tensor, *rest: Any) -> Any:
    del rest
    return outputs(query)


@torch.library.custom_op("lighten::attention_backward", mutates_args=())
def attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    grad: Tensor,
    scale: float,
    starts: list[int],
    window: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the three inputs of `attention`.

    Args:
        query: As it was given.
        key: As it was given.
        value: As it was given.
        out: As it was returned.
        sums: As it was returned.
        grad: Of `out`.
        scale: As it was given.
        starts: As it was given.
        window: As it was given.
    """
    grads = gradients(query, key, value)
    views = (*_dense(query, key, value), out, *_dense(grad), *grads)
    _run("lighten_attention_backward", views, sums, scale, starts, window)
    return grads


@attention_backward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Any:
    del rest
    return gradients(query, key, value)


def outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the results of `attention`."""
    batch, heads, tokens, features = query.shape
    out = query.new_empty(batch, tokens, heads, features).transpose(1, 2)
    return out, query.new_empty(heads, batch * tokens, dtype=torch.float32)


def gradients(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for gradients: the heads of a token side by side, as the projections before want."""
    query, key, value = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in inputs)
    return query, key, value


def _dense(*inputs: Tensor) -> list[Tensor]:
    """With the features of a head side by side."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in inputs]


@register_flop_formula(torch.ops.lighten.attention)
def _flops(
    query: Any, key: Any, value: Any, scale: float, starts: Any, window: int = 0, **_: Any
) -> int:
    """Two products over half the square of each row, or its window; shapes in place of tensors."""
    del key, value, scale
    batch, heads, tokens, features = query
    lengths = [b - a for a, b in pairwise(starts)] if starts else [tokens] * batch
    return sum(2 * 2 * heads * features * _pairs(length, window) for length in lengths)


def _pairs(length: int, window: int) -> int:
    """Of a query and a key that it sees."""
    beyond = max(0, length - window) if window else 0
    return (length * (length + 1) - beyond * (beyond + 1)) // 2


@register_flop_formula(torch.ops.lighten.attention_backward)
def _backward_flops(
    query: Any, key: Any, value: Any, out: Any, sums: Any, grad: Any, scale: float, starts: Any,
    window: int = 0, **_: Any,
) -> int:  # fmt: skip
    """Five products where the forward pass has two."""
    del out, sums, grad
    return _flops(query, key, value, scale, starts, window) * 5 // 2


class Attention(torch.autograd.Function):
    """`attention` with its gradients; arguments and the first result are the same."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, starts: list[int],
        window: int = 0,
    ) -> Tensor:  # fmt: skip
        """Compute, and keep what the backward pass reads."""
        out, sums = torch.ops.lighten.attention(query, key, value, scale, starts, window)
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.settings = scale, starts, window
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs."""
        grads = torch.ops.lighten.attention_backward(*ctx.saved_tensors, grad, *ctx.settings)
        return *grads, None, None, None
