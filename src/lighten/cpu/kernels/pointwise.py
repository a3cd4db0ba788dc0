"""Norms, gates and losses in one pass each: `pointwise.cpp` as operations of PyTorch's.

There are two, one of bfloat16 for processors that multiply it, and one of float32 for any.

Dimensions: H features of a token.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from lighten.cpu.kernels import formats


def takes(*tensors: Tensor) -> bool:
    """Whether a kernel computes on these."""
    dtype = tensors[0].dtype
    return all(x.device.type == "cpu" and x.dtype == dtype for x in tensors) and formats.available(
        dtype
    )


def _call(name: str, *args: Any) -> None:
    """Run a kernel of the first tensor's format; tensors are given as their addresses."""
    function = formats.library(args[0].dtype)[name]
    function(*(_in_c(arg) for arg in args))


def _in_c(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return ctypes.c_void_p(arg.data_ptr())
    if isinstance(arg, bool):
        return ctypes.c_int(arg)
    if isinstance(arg, int):
        return ctypes.c_int64(arg)
    return ctypes.c_float(arg)


@torch.library.custom_op("lighten::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> tuple[Tensor, Tensor]:
    """X over its root mean square, rounded, times the weight; or times 1 + weight, then rounded.

    Args:
        x: [..., H], bfloat16 or float32.
        weight: [H], of the same format.
        eps: Added to the mean square.
        plus_one: As Gemma does.

    Returns:
        [..., H], and [..., 1] float32: one over the root mean square.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"a norm of {weight.numel()} features got {x.shape[-1]}")
    x = x.contiguous()
    y, scales = _norm_outputs(x)
    _call(
        "lighten_rms_norm", x, weight.contiguous(), y,
        scales, scales.numel(), x.shape[-1], eps, plus_one, torch.get_num_threads(),
    )  # fmt: skip
    return y, scales


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> tuple[Tensor, Tensor]:
    del weight, eps, plus_one
    return _norm_outputs(x)


def _norm_outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@torch.library.custom_op("lighten::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    x: Tensor, weight: Tensor, scales: Tensor, grad: Tensor, plus_one: bool
) -> Tensor:
    """The gradient of x.

    Args:
        x: As it was given.
        weight: As it was given.
        scales: As they were returned.
        grad: Of the result.
        plus_one: As it was given.
    """
    x, grad, grad_x = x.contiguous(), grad.contiguous(), x.new_empty(x.shape)
    _call(
        "lighten_rms_norm_backward", x, weight.contiguous(), scales,
        grad, grad_x, scales.numel(), x.shape[-1], plus_one,
        torch.get_num_threads(),
    )  # fmt: skip
    return grad_x


@rms_norm_backward.register_fake
def _(x: Tensor, weight: Tensor, scales: Tensor, grad: Tensor, plus_one: bool) -> Tensor:
    del weight, scales, grad, plus_one
    return x.new_empty(x.shape)


@torch.library.custom_op("lighten::gated", mutates_args=())
def gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """activation(gate) · up.

    Args:
        gate: bfloat16 or float32, of any shape.
        up: The same.
        gelu: The activation is GELU by its tanh approximation, else SiLU.
    """
    gate, up, out = gate.contiguous(), up.contiguous(), gate.new_empty(gate.shape)
    _call(
        "lighten_gated", gate, up, out, gate.numel(), gelu,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


@gated.register_fake
def _(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    del up, gelu
    return gate.new_empty(gate.shape)


@torch.library.custom_op("lighten::gated_backward", mutates_args=())
def gated_backward(gate: Tensor, up: Tensor, grad: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up.

    Args:
        gate: As it was given.
        up: As it was given.
        grad: Of the result.
        gelu: As it was given.
    """
    gate, up, grad = gate.contiguous(), up.contiguous(), grad.contiguous()
    of_gate, of_up = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    _call(
        "lighten_gated_backward", gate, up, grad, of_gate,
        of_up, gate.numel(), gelu, torch.get_num_threads(),
    )  # fmt: skip
    return of_gate, of_up


@gated_backward.register_fake
def _(gate: Tensor, up: Tensor, grad: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    del up, grad, gelu
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def cross_entropy_(logits: Tensor, labels: Tensor, scale: float, softcap: float) -> Tensor:
    """As `engine.fused_loss.cross_entropy_`, where `takes` says so."""
    assert logits.is_contiguous()
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    _call(
        "lighten_cross_entropy", logits, labels.contiguous(), losses,
        *logits.shape, float(scale), float(softcap), torch.get_num_threads(),
    )  # fmt: skip
    return losses


class Gated(torch.autograd.Function):
    """`gated` with its gradients: it keeps its two inputs alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
        """Compute, and keep what the backward pass reads."""
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        out: Tensor = torch.ops.lighten.gated(gate, up, gelu)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs."""
        return *torch.ops.lighten.gated_backward(*ctx.saved_tensors, grad, ctx.gelu), None
