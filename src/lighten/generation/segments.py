"""The rows of one step that take the same adapter, and what adapters add to layers on them.

Dimensions: N tokens of a step, I input features, R ranks of all layers that read the same input
side by side, r ranks and O output features of one of them.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lighten.generation import kernels

# Of A's and of B's tiles: `RANKS` and `OUTS` in `low_rank.cpp`.
TILE_RANKS = 4
TILE_INPUTS = 8
TILE_OUTPUTS = 32


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


class _Segments(ctypes.Structure):
    """`Segments` in `low_rank.cpp`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("adapters", "starts", "stops")),
        *((name, ctypes.c_int64) for name in ("count", "inputs")),
    ]


# Of `lighten_low_rank`: segments, x and its stride, y and its stride, whether they are bfloat16,
# threads.
_ARGUMENTS = (
    ctypes.POINTER(_Segments), ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64,
    ctypes.c_int, ctypes.c_int64,
)  # fmt: skip


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
    B: Tensor  # [r, O], or tiles of it
    ranks: slice
    columns: slice
    scale: float


class Update:
    """What an adapter adds to the layers that read one input.

    Factors are kept as float16, each over its largest number, so that nothing overflows or
    vanishes; half the bytes of float32 are read in every step, and 11 bits of each number stay.
    For the kernel they lie in the order in which it reads them: few rows wait for memory, which
    comes twice as fast from one end to the other as from many places in turn.

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
        self._inputs, self._ranks = inputs, 0
        self._tiled = device.type == "cpu" and kernels.library() is not None
        matrices = [torch.empty(0, inputs, dtype=torch.float16)]
        places: list[tuple[slice, slice, float]] = []
        for place, pair in sorted(factors.items()):
            A, scale_A = _normalise(pair.A)
            B, scale_B = _normalise(pair.B.T)
            matrices[0] = torch.cat([matrices[0], A])
            matrices.append(B)
            ranks = slice(self._ranks, self._ranks + len(A))
            self._ranks = ranks.stop
            places.append((ranks, columns[place], pair.scale * scale_A * scale_B))
        if self._tiled:
            A, *others = matrices
            matrices = _behind_each_other([_tiles("A", A), *(_tiles("B", B) for B in others)])
        self._A, *outer = (matrix.to(device) for matrix in matrices)
        self._parts = [_Part(B, *place) for B, place in zip(outer, places, strict=True)]
        self._layers = (_Layer * len(self._parts))(
            *(
                _Layer(
                    part.B.data_ptr(), part.ranks.start, part.ranks.stop - part.ranks.start,
                    part.columns.start, part.columns.stop - part.columns.start, part.scale,
                )
                for part in self._parts
            )
        )  # fmt: skip
        self._struct = _Adapter(
            self._A.data_ptr(), self._ranks, ctypes.addressof(self._layers), len(self._parts)
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
        low = x @ self._matrix(self._A, self._ranks, self._inputs).to(x.dtype).T
        for part in self._parts:
            outputs = part.columns.stop - part.columns.start
            B = self._matrix(part.B, part.ranks.stop - part.ranks.start, outputs).to(x.dtype)
            y[:, part.columns].addmm_(low[:, part.ranks], B, alpha=part.scale)

    def _matrix(self, kept: Tensor, rows: int, columns: int) -> Tensor:
        if not self._tiled:
            return kept
        ordered = kept.transpose(1, 2)  # [rows / tile's, tile's, columns / tile's, tile's]
        return ordered.flatten(0, 1).flatten(1)[:rows, :columns]


def numbers_of(factor: str, ranks: int, columns: int) -> int:
    """How many numbers a layer's factor takes on a processor, the zeros that fill tiles among them.

    Where layers read one input and a rank is no multiple of a tile's, it may be a few less.

    Args:
        factor: `A`, [r, I], or `B`, [r, O].
        ranks: Its r.
        columns: Its I or O.
    """
    return _tiles(factor, torch.empty(ranks, columns, device="meta")).numel()


def _tiles(factor: str, x: Tensor) -> Tensor:
    """A factor `A` or `B`, [r, c], in tiles of rows and columns, zeros where it ends.

    Its shape is [r / rows, c / columns, rows, columns]; of B a tile has all rows.
    """
    rows, columns = (TILE_RANKS, TILE_INPUTS) if factor == "A" else (len(x), TILE_OUTPUTS)
    padded = F.pad(x, (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))
    down, across = padded.shape[0] // rows, padded.shape[1] // columns
    return padded.view(down, rows, across, columns).transpose(1, 2)


def _behind_each_other(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors in one piece of memory."""
    memory = torch.cat([x.flatten() for x in tensors])
    parts = memory.split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]


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
    _prepared: dict[int, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        numbers = ctypes.c_int64 * len(self.names)
        self._rows = numbers(*self.starts), numbers(*self.stops)

    def move(self, starts: Sequence[int], stops: Sequence[int]) -> None:
        """Let the same adapters' segments lie elsewhere in the next step."""
        self.starts, self.stops = tuple(starts), tuple(stops)
        self._rows[0][:] = list(starts)
        self._rows[1][:] = list(stops)

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
        # Made once for each group of layers: a step calls as many as it has groups.
        call = self._prepared.get(id(updates))
        if call is None:
            call = self._prepared[id(updates)] = self._prepare(updates, x.shape[1])
        failed = call(
            x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), x.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("the low-rank kernel found no memory for its products")

    def _prepare(self, updates: Mapping[Any, Update], inputs: int) -> Callable[..., int]:
        """The kernel for one group of layers."""
        count = len(self.names)
        adapters = (ctypes.c_void_p * count)(*(updates[name].address for name in self.names))
        addresses = (ctypes.addressof(array) for array in (adapters, *self._rows))
        segments = _Segments(*addresses, count, inputs)
        segments.adapters_array = adapters  # lives as long
        library = kernels.library()
        assert library is not None
        library.lighten_low_rank.argtypes = _ARGUMENTS
        return functools.partial(library.lighten_low_rank, segments)
