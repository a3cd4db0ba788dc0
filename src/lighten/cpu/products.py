"""Products of float32 by oneDNN, where the library that PyTorch takes for them is slow.

PyTorch multiplies float32 with Intel's MKL, which keeps its quickest code for Intel's processors.
On AMD's, oneDNN takes 0.9 of its time with AVX2 and 0.45 with AVX512, with weights as they lie and
of an adapter's thin products too. With AVX2 alone MKL is the quicker one where a wide weight is
read the other way around, as in backward passes (docs/lab-notes.md).

Dimensions: N rows, I input features, O output features.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lighten import cpu
from lighten.cpu.forwards import Forward, replace_forwards
from lighten.machine.hardware import processor_name

# Multiplications of a product; with fewer, the call costs what it saves.
FEWEST = 2**20
# Rows and columns of a weight up to which it is thin, as an adapter's factors are.
THIN = 64

_LIBRARY = torch.library.Library("lighten", "FRAGMENT")
_LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


@functools.cache
def is_slow_on_mkl() -> bool:
    """Whether this is a processor that MKL is slow on, and oneDNN is there."""
    return (
        "AMD" in processor_name()
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
    )


@functools.cache
def has_avx512() -> bool:
    """Whether libraries take 512-bit vectors: the processor has them, no setting forbids it."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def quicken(model: nn.Module) -> int:
    """Let a model's own linear layers multiply float32 by oneDNN, there and back.

    Returns:
        How many do; 0 where PyTorch's own is as quick, or `LIGHTEN_CPU` turns it off.
    """
    return replace_forwards(model, _forward_for) if cpu.enabled() and is_slow_on_mkl() else 0


def _forward_for(module: nn.Module) -> Forward | None:
    if type(module) is not nn.Linear or "forward" in vars(module):
        return None
    if hasattr(module.weight, "tensor_data_names"):  # torchao's, which knows few operations
        return None
    return _forward if module.weight.device.type == "cpu" else None


def _forward(self: Any, x: Tensor) -> Tensor:
    weight: Tensor = self.weight
    if not _wants_gradient(x, weight):
        return linear(x, weight, self.bias)
    compiled = torch.compiler.is_compiling() and x.dtype == weight.dtype == torch.float32
    if not (compiled or takes(x, weight)):
        return F.linear(x, weight, self.bias)
    flat = x.reshape(-1, x.shape[-1])
    return shaped(_Linear.apply(flat, weight, self.bias), x)


class _Linear(torch.autograd.Function):
    """X Wᵀ + b of x [N, I], whose products are those of `linear` there and back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return opaque(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.T
        if of_weight and (torch.compiler.is_compiling() or takes(rows, x.T)):
            rows = rows.contiguous()  # oneDNN copies rows that are turned; here a plan sees it
        return (
            opaque(grad, weight.T) if of_x else None,
            opaque(rows, x.T) if of_weight else None,
            grad.sum(0) if of_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X Wᵀ + b: [..., I] → [..., O]; by PyTorch's own where a gradient is to go through it."""
    if _wants_gradient(x, weight) or not takes(x, weight):
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    product: Tensor = torch.ops.mkldnn._linear_pointwise(flat, weight, bias, "none", [], "")
    return shaped(product, x)


def shaped(out: Tensor, x: Tensor) -> Tensor:
    """Outputs [N, O] of a layer as its input [..., I] lies: [..., O].

    They are no view to autograd, as of any linear layer: Gemma 3n changes one in place.
    """
    outputs: Tensor = torch.ops.aten._unsafe_view(out, (*x.shape[:-1], out.shape[-1]))
    return outputs


def linear_into(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """Set out [N, O] to x Wᵀ."""
    if takes(x, weight):
        out.copy_(linear(x, weight))
    else:
        torch.mm(x, weight.T, out=out)


def add_linear(total: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
    """X Wᵀ [N, O], added in place to a total where there is one."""
    if total is None or takes(x, weight):
        product = linear(x, weight)
        return product if total is None else total.add_(product)
    return total.addmm_(x, weight.T)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN multiplies x [..., I] with a weight [O, I]."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and is_slow_on_mkl()
        and cpu.enabled()
        and x.numel() * weight.shape[0] >= FEWEST
        and (weight.is_contiguous() or min(weight.shape) <= THIN or has_avx512())
        and not torch.is_autocast_enabled("cpu")
    )


def _wants_gradient(x: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def opaque(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` of [N, I], of which a compiler is not shown whose product it is."""
    if x.device.type != "cpu" or not torch.compiler.is_compiling():
        return linear(x, weight, bias)
    product: Tensor = torch.ops.lighten.linear(x, weight, bias)
    return product


@torch.library.impl(_LIBRARY, "linear", "CompositeExplicitAutograd")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(x, weight, bias)


@torch.library.register_fake("lighten::linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    del bias
    return x.new_empty(x.shape[0], weight.shape[0])
