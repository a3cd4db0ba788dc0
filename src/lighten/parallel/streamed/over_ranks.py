"""Layers of which each rank holds an equal part, gathered into slots when a pass comes to them.

A layer's bytes, whatever they are, are cut evenly. All ranks gather the same layers in the same
order, up and down, whatever each of them asks for: one whose rows have no gradient in the lower
layers gathers them all the same, or the others would wait for it for ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from lighten.parallel.streamed.feed import SLOTS, Fetch, LayerPieces, LayerTurns, Piece


def part_of(
    layer: LayerPieces, read: Callable[[str, Tensor], None], rank: int, count: int
) -> Tensor:
    """A rank's part of a layer, uint8 in main memory; the last one is filled up with zeros.

    Args:
        layer: What it consists of.
        read: Reads a piece by its name into a tensor.
        rank: Whose part.
        count: Of the ranks.
    """
    size = -(-layer.bytes // count)
    room = torch.zeros(size * count, dtype=torch.uint8)
    for piece in layer.pieces:
        read(piece.name, piece.of(room))
    return room[rank * size : (rank + 1) * size].clone()


class RankFeed(LayerTurns):
    """Brings layers together from all ranks: one computes in a slot while the next one comes.

    Collectives are begun by the thread that computes, and those of a pass end with it, so that they
    are in the same order among all others on every rank.

    Attributes:
        parts: What this rank holds of each layer, uint8.

    Args:
        layers: What is streamed of each layer, first to last.
        parts: What this rank holds of each.
        count: Of the ranks.
    """

    def __init__(self, layers: Sequence[LayerPieces], parts: Sequence[Tensor], count: int) -> None:
        super().__init__(layers)
        self.parts, self._count = parts, count
        size = count * max(len(part) for part in parts)
        self._slots = [
            torch.empty(size, dtype=torch.uint8, device=parts[0].device) for _ in range(SLOTS)
        ]
        self._order: deque[int] = deque()  # what is left of the pass

    @property
    def held_bytes(self) -> int:
        """Of this rank's parts."""
        return sum(part.untyped_storage().nbytes() for part in self.parts)

    @property
    def slot_bytes(self) -> int:
        """Of the slots together."""
        return sum(slot.nbytes for slot in self._slots)

    def facts(self) -> dict[str, Any]:
        """What `run.json` keeps."""
        return {
            "spread_bytes": self.base_bytes, "held_bytes": self.held_bytes,
            "slot_bytes": self.slot_bytes, "gathers": self.fetches,
            "gathered_bytes": self.fetched_bytes, "waited_s": self.waited_s,
        }  # fmt: skip

    def begin(self, learns: bool) -> None:
        """A pass begins at the first layer.

        Args:
            learns: It will come down again.
        """
        self.end()
        last = len(self.layers) - 1
        self._order.extend(range(last + 1))
        if learns:
            self._order.extend(reversed(range(last)))
        self._fetch()

    def get(self, layer: int, piece: Piece) -> Tensor:
        """A tensor of a layer, valid until another layer is asked for."""
        while self._now is None or self._held[self._now] != layer:
            # A gathering that the others do not make would never end.
            assert self._order, f"layer {layer} is asked for where no pass comes to it"
            self._turn()
        return piece.of(self._slots[self._now])

    def end(self) -> None:
        """A pass is over, its backward pass too: gather what other ranks may be waiting for."""
        while self._order:
            self._turn()

    def _turn(self) -> None:
        """Go on to the pass's next layer, and have the one after it gathered meanwhile."""
        layer = self._order.popleft()
        self._settle()
        self._now = self._held.index(layer)
        self._fetch()

    def _fetch(self) -> None:
        """Begin to gather the next layer into the slot that nothing computes from."""
        if not self._order or self._order[0] in self._held:
            return
        layer = self._order[0]
        place = self._free_place()
        part = self.parts[layer]
        # On a GPU it begins when everything is done that was begun until here, the layer before
        # this one among it, whose slot it takes.
        work = _gather(self._slots[place][: self._count * len(part)], part, async_op=True)
        self._coming = Fetch(layer, place, work.wait)


# Its name since PyTorch 2.13, and before.
_gather: Callable[..., Any] = (
    distributed.all_gather_single
    if hasattr(distributed, "all_gather_single")
    else distributed.all_gather_into_tensor
)
