"""Root-mean-square norms that keep their input alone for the backward pass.

transformers writes them in single operations, of which autograd keeps two copies of the input in
float32: eight bytes per feature where two do. With a backward pass of its own a norm takes two
thirds of the time on a processor and leaves nothing behind but one float32 number per token; in a
kernel (`cpu/kernels`) it takes a tenth.

Dimensions: N tokens, H features. Source: root mean square layer normalisation, arXiv 1910.07467.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lighten import cpu
from lighten.cpu.forwards import Forward, replace_forwards, same_code
from lighten.cpu.kernels import pointwise


def quicken(model: nn.Module) -> int:
    """Give the norms that are known a backward pass of their own, for passes that learn.

    Known are those whose code is that of Llama's or of Gemma's, whatever their class is called.

    Returns:
        How many there are; 0 where `LIGHTEN_CPU` turns it off.
    """
    return replace_forwards(model, _forward_for) if cpu.enabled() else 0


def _forward_for(module: nn.Module) -> Forward | None:
    cls = type(module)
    if same_code(cls.forward, LlamaRMSNorm.forward):
        return _llama
    norm = getattr(cls, "_norm", None)
    if same_code(cls.forward, GemmaRMSNorm.forward) and same_code(norm, GemmaRMSNorm._norm):
        return _gemma
    return None


def _llama(self: Any, hidden_states: Tensor) -> Tensor:
    if _by_itself(hidden_states, self.weight):
        return type(self).forward(self, hidden_states)
    return _RootMeanSquare.apply(hidden_states, self.weight, self.variance_epsilon, False)


def _gemma(self: Any, x: Tensor) -> Tensor:
    if _by_itself(x, self.weight):
        return type(self).forward(self, x)
    return _RootMeanSquare.apply(x, self.weight, self.eps, True)


def _by_itself(x: Tensor, weight: Tensor) -> bool:
    """Whether transformers' code runs: nothing learns, a compiler reads it, or formats mix."""
    return not torch.is_grad_enabled() or torch.compiler.is_compiling() or x.dtype != weight.dtype


class _RootMeanSquare(torch.autograd.Function):
    """x · rsqrt(mean(x²) + ε), times the weight: rounded before (Llama), or after, by 1 + w."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
        ctx.plus_one = plus_one
        if pointwise.takes(x, weight):
            outputs: tuple[Tensor, Tensor] = torch.ops.lighten.rms_norm(x, weight, eps, plus_one)
            ctx.save_for_backward(x, weight, outputs[1])
            return outputs[0]
        normal = x.to(torch.float32, copy=True)
        scale = torch.linalg.vector_norm(normal, dim=-1, keepdim=True)
        scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normal.mul_(scale)
        ctx.save_for_backward(x, weight, scale)
        if plus_one:
            return normal.mul_(1.0 + weight.float()).to(x.dtype)
        return normal.to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        if pointwise.takes(x, weight) and not ctx.needs_input_grad[1]:
            grad_x = torch.ops.lighten.rms_norm_backward(x, weight, scale, grad, ctx.plus_one)
            return grad_x, None, None, None
        normal = x.to(torch.float32, copy=True).mul_(scale)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            rounded = normal if ctx.plus_one else normal.to(x.dtype)
            grad_weight = (grad * rounded).flatten(0, -2).sum(0, dtype=torch.float32)
            grad_weight = grad_weight.to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None, None
        if ctx.plus_one:
            gradient = grad.float() * (1.0 + weight.float())
        else:
            gradient = (grad * weight).to(torch.float32)
        along = torch.linalg.vecdot(gradient, normal).unsqueeze(-1).div_(x.shape[-1])
        gradient = gradient.addcmul_(normal, along, value=-1.0).mul_(scale)
        return gradient.to(x.dtype), grad_weight, None, None
