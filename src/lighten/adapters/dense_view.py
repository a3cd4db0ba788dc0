"""Quantised layers in the guise of plain ones, for PEFT's modules.

PEFT's own layers for bitsandbytes dequantise in ways of their own (a DoRA magnitude off by a tenth,
IA3 not at all) and merge into the quantised weight, which loses much of the update (trap 30). Given
plain layers whose weight is the dequantised one, every method computes what it would on the dense
twin of the base, and merging makes the base dense.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lighten.adapters.frozen import (
    dense_copy,
    dequantised_to,
    forget_quantization,
    is_conv1d,
    is_quantized,
    out_in_features,
    weight_of,
)


class DenseView(nn.Linear):
    """A quantised layer that looks like a plain one.

    Its weight [O, I] is dequantised at each look; what is written into it is lost. Its product is
    the quantised layer's own, and a deep copy is a dense layer, which can learn.

    Attributes:
        quantized: The quantised layer, no part of the model meanwhile: PEFT adapts whatever linear
            layers it finds there.
    """

    quantized: nn.Module

    def __init__(self, quantized: nn.Module) -> None:
        nn.Module.__init__(self)  # a linear layer's own would make a weight
        object.__setattr__(self, "quantized", quantized)
        self.out_features, self.in_features = out_in_features(quantized)

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """The dequantised weight, [O, I], made for the asker."""
        return nn.Parameter(weight_of(self.quantized), requires_grad=False)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The layer's bias, [O]."""
        bias: Tensor | None = self.quantized.bias  # type: ignore[assignment]
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """The quantised layer's own product."""
        out: Tensor = self.quantized(x)
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """A dense layer."""
        return dense_copy(self.quantized)


def put_on(model: PreTrainedModel) -> None:
    """Dress every quantised layer of the model."""
    for path, layer in list(model.named_modules()):
        if is_quantized(layer):
            model.set_submodule(path, DenseView(layer))


def take_off(model: PreTrainedModel) -> None:
    """Put the quantised layers back."""
    for path, view in list(model.named_modules()):
        if isinstance(view, DenseView):
            model.set_submodule(path, view.quantized)


def settle(model: PreTrainedModel) -> str | None:
    """Make every dressed layer a plain linear one, into which an update can be merged.

    Returns:
        What was dequantised to what, or None if nothing was quantised.
    """
    sentence = None
    for path, view in list(model.named_modules()):
        if isinstance(view, DenseView):
            sentence = dequantised_to(view.quantized)
            with torch.device("meta"):
                plain = nn.Linear(view.in_features, view.out_features, view.bias is not None)
            plain.weight = view.weight
            if view.bias is not None:
                plain.bias = nn.Parameter(view.bias.detach().clone(), requires_grad=False)
            plain.turns = is_conv1d(view.quantized)  # type: ignore[assignment]
            model.set_submodule(path, plain.eval())
    if sentence is not None:
        forget_quantization(model)
    return sentence


def turn(model: PreTrainedModel) -> None:
    """Make settled layers what the architecture has: GPT-2's hold their weight as [I, O]."""
    for path, plain in list(model.named_modules()):
        if getattr(plain, "turns", False):
            with torch.device("meta"):
                conv = Conv1D(plain.out_features, plain.in_features)
            weight: Tensor = plain.weight.detach()
            conv.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)
            conv.bias = plain.bias
            model.set_submodule(path, conv.eval())
