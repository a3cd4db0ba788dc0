"""A frozen linear layer of the base, whatever its format: its weight and its product.

Dimensions: N rows, I input features, O output features.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D


def is_linear(module: nn.Module) -> bool:
    """Whether a low-rank update can be added to the module (`nn.Linear` or GPT-2's `Conv1D`)."""
    return isinstance(module, nn.Linear | Conv1D)


def is_dense(module: nn.Module) -> bool:
    """Whether the module holds its weights as they are used: nothing to dequantise."""
    return all(p.is_floating_point() for p in module.parameters(recurse=False))


def weight_of(base: nn.Module) -> Tensor:
    """The layer's weight as [O, I], fetched anew: a gathered or streamed weight may come late."""
    weight: Tensor = base.weight  # type: ignore[assignment]
    return weight.T if isinstance(base, Conv1D) else weight


def product(base: nn.Module, x: Tensor) -> Tensor:
    """The layer's own x Wᵀ + b: [N, I] → [N, O]."""
    return F.linear(x, weight_of(base), base.bias)  # type: ignore[arg-type]
