"""Linear layers whose weight is somewhere else until a product needs it.

They have a method `dense_weight`, as quantised layers do: whatever computes with a frozen layer
fetches its weight in the forward pass and again in the backward pass, and keeps neither. Their
parameter `weight` has the weight's shape and format and no memory; it is not a number anywhere, so
that code which reads it by mistake is found out.

Dimensions: I input features, O output features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lighten.models.quantized import Storage, WeightFetched, dense_of_4bit, dense_of_int8
from lighten.parallel.streamed.feed import Piece


class Feed(Protocol):
    """What brings the pieces of layers."""

    def get(self, layer: int, piece: Piece) -> Tensor:
        """A piece's numbers, valid until another layer is asked for."""


class Absent:
    """Where a layer's pieces come from, once there is a feed.

    Attributes:
        layer: Of the model, from 0.
        feed: What to ask.
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.feed: Feed | None = None

    def get(self, piece: Piece) -> Tensor:
        """A piece's numbers, valid until another layer is asked for."""
        assert self.feed is not None
        return self.feed.get(self.layer, piece)


@dataclass(frozen=True)
class Replaced:
    """What a linear layer was.

    Attributes:
        source: `nn.Linear`, or `Conv1D`, whose weight is kept as [I, O].
        features: (O, I).
        bias: It stays in memory; None: there is none.
        compute: The format of the products, and of a dense weight in its slot.
        device: Where it computes.
    """

    source: type[nn.Module]
    features: tuple[int, int]
    bias: nn.Parameter | None
    compute: torch.dtype
    device: torch.device


class StreamedLinear(nn.Linear):
    """A frozen linear layer, dense in its files.

    Args:
        was: The layer that it stands for.
        absent: Where the weight comes from.
        piece: Which piece that is.
    """

    storage: Storage | None = None

    def __init__(self, was: Replaced, absent: Absent, piece: Piece) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = was.features
        self.source_cls, self.compute_dtype = was.source, was.compute
        hole = torch.full((1, 1), torch.nan, dtype=was.compute, device=was.device)
        self.weight = nn.Parameter(hole.expand(was.features), requires_grad=False)
        self.bias = was.bias  # type: ignore[assignment]
        self._absent, self._piece = absent, piece

    @property
    def streamed_bytes(self) -> int:
        """Of the weight, where it is in its slot."""
        return self._piece.bytes

    def dense_weight(self) -> Tensor:
        """The weight [O, I] in the format of the products."""
        weight = self._absent.get(self._piece)
        return weight.T if self.source_cls is Conv1D else weight

    def forward(self, x: Tensor) -> Tensor:
        """The product, x Wᵀ + b."""
        product: Tensor = WeightFetched.apply(x, self)
        return product


class StreamedLinear8bit(StreamedLinear):
    """A frozen linear layer in 8 bits: whole numbers and one scale per output are streamed.

    Args:
        was: The layer that it stands for.
        absent: Where its pieces come from.
        piece: The numbers, int8 [O, I].
        scales: The largest number of each output, float32 [O].
    """

    storage = Storage("int8")

    def __init__(self, was: Replaced, absent: Absent, piece: Piece, scales: Piece) -> None:
        super().__init__(was, absent, piece)
        self._scales = scales

    @property
    def streamed_bytes(self) -> int:
        """Of the numbers and their scales."""
        return self._piece.bytes + self._scales.bytes

    def dense_weight(self) -> Tensor:
        """The weight [O, I] in the format of the products."""
        numbers, scales = self._absent.get(self._piece), self._absent.get(self._scales)
        return dense_of_int8(numbers, scales, self.compute_dtype)


class StreamedLinear4bit(StreamedLinear):
    """A frozen linear layer in 4 bits: packed numbers and their scales are streamed.

    Args:
        was: The layer that it stands for.
        absent: Where its pieces come from.
        piece: The packed weight.
        scales: `absmax` of its blocks.
        state: bitsandbytes' `QuantState` with all but these.
    """

    def __init__(
        self, was: Replaced, absent: Absent, piece: Piece, scales: Piece, state: Any
    ) -> None:
        super().__init__(was, absent, piece)
        self._scales, self._state = scales, state
        self.storage = Storage(state.quant_type, state.nested)

    @property
    def streamed_bytes(self) -> int:
        """Of the packed weight and its scales."""
        return self._piece.bytes + self._scales.bytes

    def dense_weight(self) -> Tensor:
        """The weight [O, I] in the format of the products."""
        packed, absmax = self._absent.get(self._piece), self._absent.get(self._scales)
        shape = torch.Size((self.out_features, self.in_features))
        return dense_of_4bit(packed, absmax, self._state, shape, self.compute_dtype)
