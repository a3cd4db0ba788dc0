"""Which layers of a base are in memory, and which comes next.

Two slots take turns: a layer computes in one while the next is read into the other by a thread.
A pass goes up through the layers, and one that learns comes down again; what a layer needs it asks
for when it computes, so that recomputed layers, evaluations and whatever else runs the model find
theirs, in any order.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

SLOTS = 2
ALIGNED = 64  # bytes: a cache line, and the widest vector


@dataclass(frozen=True)
class Piece:
    """A tensor of a layer, and its place in the layer's slot.

    Attributes:
        name: In the model's files.
        dtype: In the slot.
        shape: Its shape.
        start: Its first byte in the slot.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def bytes(self) -> int:
        """In the slot."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def of(self, slot: Tensor) -> Tensor:
        """Its numbers, where the slot holds its layer."""
        return slot[self.start : self.start + self.bytes].view(self.dtype).view(self.shape)


class LayerPieces:
    """What is streamed of one layer: pieces, one behind the other."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.bytes = 0

    def add(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> Piece:
        """A further piece."""
        piece = Piece(name, dtype, tuple(shape), self.bytes)
        self.pieces.append(piece)
        self.bytes += -(-piece.bytes // ALIGNED) * ALIGNED
        return piece


class Slots(Protocol):
    """Memory for a few layers, and how it is filled."""

    def get(self, place: int, piece: Piece) -> Tensor:
        """A piece of the layer that is there."""

    def fill(self, place: int, layer: int) -> None:
        """Put a layer there; in the reading thread."""

    def begin(self, place: int) -> None:
        """What computes from here on reads this slot."""

    def end(self, place: int) -> None:
        """What computes from here on does not."""


class Source(Protocol):
    """The tensors of files."""

    def read(self, name: str, into: Tensor) -> None:
        """Read a tensor into another."""

    def in_place(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """A tensor where it lies, if it can be computed with there; never to be written."""

    def bring(self, name: str) -> None:
        """Have such a tensor in memory."""

    def drop(self, name: str) -> None:
        """Give its memory back."""


class MemorySlots:
    """Slots in main memory, for a processor.

    What lies in its file as products take it is computed with there, in the system's page cache:
    it is not copied, and takes no memory of its slot.

    Args:
        layers: What is streamed.
        source: The model's files.
    """

    def __init__(self, layers: Sequence[LayerPieces], source: Source) -> None:
        self._layers, self._source = layers, source
        self._in_place = [_in_place(layer, source) for layer in layers]
        size = max(layer.bytes for layer in layers)
        self._slots = [torch.empty(size, dtype=torch.uint8) for _ in range(SLOTS)]
        self._held: list[int | None] = [None] * SLOTS

    def get(self, place: int, piece: Piece) -> Tensor:
        """See `Slots`."""
        held = self._held[place]
        assert held is not None
        in_place = self._in_place[held].get(piece.name)
        return piece.of(self._slots[place]) if in_place is None else in_place

    def fill(self, place: int, layer: int) -> None:
        """See `Slots`."""
        if (before := self._held[place]) is not None:
            for name in self._in_place[before]:
                self._source.drop(name)
        self._held[place] = None
        for piece in self._layers[layer].pieces:
            if piece.name in self._in_place[layer]:
                self._source.bring(piece.name)
            else:
                self._source.read(piece.name, piece.of(self._slots[place]))
        self._held[place] = layer

    def begin(self, place: int) -> None:
        """A processor has waited already."""

    def end(self, place: int) -> None:
        """A processor is done with what it has been told."""


def _in_place(layer: LayerPieces, source: Source) -> dict[str, Tensor]:
    tensors = {piece.name: source.in_place(piece.name, piece.dtype) for piece in layer.pieces}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


class Fetch(NamedTuple):
    """A layer on its way into a slot.

    Attributes:
        layer: Which.
        place: Of the slot.
        wait: Returns when it is there.
    """

    layer: int
    place: int
    wait: Callable[[], object]


class LayerTurns:
    """Which layer is in which slot, and which one is on its way.

    Attributes:
        layers: What is brought of each layer, first to last.
        fetches: Layers brought so far.
        fetched_bytes: Their bytes in the slots.
        waited_s: What computing has waited for them, on a processor.
    """

    def __init__(self, layers: Sequence[LayerPieces]) -> None:
        self.layers = layers
        self.fetches, self.fetched_bytes, self.waited_s = 0, 0, 0.0
        self._held: list[int | None] = [None] * SLOTS
        self._now: int | None = None  # the place that computes
        self._coming: Fetch | None = None

    @property
    def base_bytes(self) -> int:
        """Of all layers, in the form in which they are brought."""
        return sum(layer.bytes for layer in self.layers)

    def _free_place(self) -> int:
        """A slot that nothing computes from, its layer forgotten."""
        place = next(place for place in range(SLOTS) if place != self._now)
        self._held[place] = None
        return place

    def _settle(self) -> None:
        """Wait for what is on its way; on a GPU what computes from here on does."""
        if self._coming is None:
            return
        layer, place, wait = self._coming
        self._coming = None
        began = time.perf_counter()
        wait()
        self.waited_s += time.perf_counter() - began
        self._held[place] = layer
        self.fetches += 1
        self.fetched_bytes += self.layers[layer].bytes


class LayerFeed(LayerTurns):
    """Keeps the layer that computes in memory, and has the next one read meanwhile.

    Args:
        layers: What is streamed of each layer, first to last.
        slots: Where to.
    """

    def __init__(self, layers: Sequence[LayerPieces], slots: Slots) -> None:
        super().__init__(layers)
        self._slots = slots
        self._reading: Future[None] | None = None  # of what is on its way
        self._learns = False
        self._lock = threading.Lock()
        # PyTorch's threads belong to what computes.
        self._reader = ThreadPoolExecutor(1, "layers", lambda: torch.set_num_threads(1))

    @property
    def slot_bytes(self) -> int:
        """Of the slots together."""
        return SLOTS * max(layer.bytes for layer in self.layers)

    def facts(self) -> dict[str, Any]:
        """What `run.json` keeps."""
        return {
            "streamed_bytes": self.base_bytes, "resident_layers": SLOTS, "reads": self.fetches,
            "read_bytes": self.fetched_bytes, "waited_s": self.waited_s,
        }  # fmt: skip

    def begin(self, learns: bool) -> None:
        """A pass begins at the first layer.

        Args:
            learns: It will come down again.
        """
        with self._lock:
            self._learns = learns
            self._prefetch(0)

    def get(self, layer: int, piece: Piece) -> Tensor:
        """A tensor of a layer, valid until another layer is asked for."""
        with self._lock:
            if self._now is None or self._held[self._now] != layer:
                self._turn_to(layer)
            assert self._now is not None
            return self._slots.get(self._now, piece)

    def _turn_to(self, layer: int) -> None:
        previous = None if self._now is None else self._held[self._now]
        if self._now is not None:
            self._slots.end(self._now)
        if layer not in self._held:
            if self._coming is None or self._coming.layer != layer:
                self._settle()
                self._read(layer)
            self._settle()
        self._now = self._held.index(layer)
        self._slots.begin(self._now)
        rising = previous is None or layer > previous
        last = len(self.layers) - 1
        if rising and layer < last:
            self._prefetch(layer + 1)
        elif rising and not self._learns:
            self._prefetch(0)  # of the next pass
        elif not rising and layer > 0:
            self._prefetch(layer - 1)

    def _prefetch(self, layer: int) -> None:
        if layer in self._held or (self._coming is not None and self._coming.layer == layer):
            return
        if self._reading is None or self._reading.done():
            self._settle()
            if layer not in self._held:
                self._read(layer)

    def _read(self, layer: int) -> None:
        """Begin to read a layer into a slot that nothing computes from."""
        place = self._free_place()
        self._reading = self._reader.submit(self._slots.fill, place, layer)
        self._coming = Fetch(layer, place, self._reading.result)
