"""The rows of one step that take the same adapter, and what adapters add to layers on them.

Dimensions: N tokens of a step, I input features, R ranks of all layers that read the same input
side by side, r ranks and O output features of one of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lighten.generation import kernels


class _Layer(ctypes.Structure):
    """`Layer` in `low_rank.cpp`."""

    _fields_ = [
        ("B", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("first", "ranks", "column", "outs")),
        ("scale", ctypes.c_float),
    ]


class _Adapter(ctypes.Structure):
    """`Adapter` in `low_rank.cpp`."""

    _fields_ = [
        ("A", ctypes.c_void_p),
        ("ranks", ctypes.c_int64),
        ("layers", ctypes.c_void_p),
        ("layer_count", ctypes.c_int64),
    ]


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to one linear layer: scale · x Aᵀ Bᵀ.

    Attributes:
        A: [r, I].
        B: [O, r].
        scale: Factor before the product.
    """

    A: Tensor
    B: Tensor
    scale: float


@dataclass(frozen=True)
class _Part:
    B: Tensor  # [r, O]
    ranks: slice
    columns: slice
    scale: float


class Update:
    """What an adapter adds to the layers that read one input.

    Factors are kept as float16, each over its largest number, so that nothing overflows or
    vanishes; half the bytes of float32 are read in every step, and 11 bits of each number stay.

    Args:
        factors: By the place of the layer among those that read the input.
        columns: Which of the outputs side by side are each layer's.
        inputs: Features of the input.
        device: Where the base is.
    """

    def __init__(
        self,
        factors: Mapping[int, Factors],
        columns: Sequence[slice],
        inputs: int,
        device: torch.device,
    ) -> None:
        self._parts: list[_Part] = []
        inner: list[Tensor] = []
        rank = 0
        for place, pair in sorted(factors.items()):
            A, scale_A = _normalise(pair.A)
            B, scale_B = _normalise(pair.B.T)
            inner.append(A)
            ranks = slice(rank, rank + len(A))
            scale = pair.scale * scale_A * scale_B
            self._parts.append(_Part(B.to(device), ranks, columns[place], scale))
            rank += len(A)
        stacked = torch.cat(inner) if inner else torch.empty(0, inputs, dtype=torch.float16)
        self._A = stacked.to(device)
        self._layers = (_Layer * len(self._parts))(
            *(
                _Layer(
                    part.B.data_ptr(), part.ranks.start, len(part.B), part.columns.start,
                    part.columns.stop - part.columns.start, part.scale,
                )
                for part in self._parts
            )
        )  # fmt: skip
        self._struct = _Adapter(
            self._A.data_ptr(), rank, ctypes.addressof(self._layers), len(self._parts)
        )

    @property
    def address(self) -> int:
        """Where the kernel reads it; it lives as long as this object."""
        return ctypes.addressof(self._struct)

    @property
    def size_bytes(self) -> int:
        """Memory of the factors."""
        return self._A.nbytes + sum(part.B.nbytes for part in self._parts)

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Y += the update of x, in place, by PyTorch's operations: [n, O of all] and [n, I]."""
        if not self._parts:
            return
        low = x @ self._A.to(x.dtype).T
        for part in self._parts:
            y[:, part.columns].addmm_(low[:, part.ranks], part.B.to(x.dtype), alpha=part.scale)


def _normalise(x: Tensor) -> tuple[Tensor, float]:
    """A matrix over its largest number as float16, and that number."""
    x = x.detach().float()
    largest = float(x.abs().max()) if x.numel() else 0.0
    largest = largest or 1.0
    return (x / largest).to(torch.float16).contiguous(), largest


@dataclass(eq=False)
class Segments:
    """Which rows of a step take which adapter; rows in none take the base alone.

    Attributes:
        names: Of each segment's adapter: what its updates are looked up by.
        starts: First row of each.
        stops: One past its last row.
    """

    names: tuple[Any, ...] = ()
    starts: tuple[int, ...] = ()
    stops: tuple[int, ...] = ()
    _tables: dict[int, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        numbers = ctypes.c_int64 * len(self.names)
        self._starts, self._stops = numbers(*self.starts), numbers(*self.stops)

    def add(self, y: Tensor, x: Tensor, updates: Mapping[Any, Update]) -> None:
        """Add each segment's update to the outputs, in place.

        Args:
            y: [N, O of all layers that read x], in x's format.
            x: [N, I].
            updates: By adapter.
        """
        if not self.names:
            return
        if not kernels.takes(x):
            for name, start, stop in zip(self.names, self.starts, self.stops, strict=True):
                updates[name].add_to(y[start:stop], x[start:stop])
            return
        table = self._tables.get(id(updates))
        if table is None:
            table = (ctypes.c_void_p * len(self.names))(
                *(updates[name].address for name in self.names)
            )
            self._tables[id(updates)] = table
        library = kernels.library()
        assert library is not None
        failed = library.lighten_low_rank(
            ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.stride(0)),
            ctypes.c_void_p(y.data_ptr()), ctypes.c_int64(y.stride(0)),
            ctypes.c_int64(x.shape[1]), table, self._starts, self._stops,
            ctypes.c_int64(len(self.names)), ctypes.c_int(x.dtype == torch.bfloat16),
            ctypes.c_int64(torch.get_num_threads()),
        )  # fmt: skip
        if failed:
            raise MemoryError("the low-rank kernel found no memory for its products")
