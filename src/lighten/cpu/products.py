"""Products of float32 by oneDNN, where the library that PyTorch takes for them is slow.

PyTorch multiplies float32 with Intel's MKL, which keeps its quickest code for Intel's processors.
On AMD's, oneDNN takes 0.85 of its time with AVX2 and 0.45 with AVX512, from some rows on and with
weights as they lie (docs/lab-notes.md).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lighten import cpu
from lighten.machine.hardware import processor_name

# With fewer, the call costs what the product saves.
FEWEST_ROWS = 16
_wanted: ContextVar[bool] = ContextVar("products_by_onednn", default=False)


@functools.cache
def is_slow_on_mkl() -> bool:
    """Whether this is a processor that MKL is slow on, and oneDNN is there."""
    return (
        "AMD" in processor_name()
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
    )


@contextmanager
def by_onednn(model: nn.Module) -> Iterator[None]:
    """Let `linear`, and a model's own linear layers, multiply float32 by oneDNN inside.

    For passes that nothing learns from: no gradient goes through such a product.
    """
    if not (cpu.enabled() and is_slow_on_mkl()):
        yield
        return
    layers = [
        module for module in model.modules()
        if type(module) is nn.Linear and "forward" not in vars(module)
    ]  # fmt: skip
    for layer in layers:
        layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]
    token = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(token)
        for layer in layers:
            del layer.forward


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X Wᵀ + b: [..., I] → [..., O]."""
    rows = x.numel() // x.shape[-1]
    if (
        _wanted.get()
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and rows >= FEWEST_ROWS
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    ):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return F.linear(x, weight, bias)


def _forward(self: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, self.weight, self.bias)
