"""Slots on a GPU: layers come from pinned main memory, on a stream of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lighten.parallel.streamed.feed import SLOTS, LayerPieces, Piece

# PyTorch rounds pinned memory up to the next power of two: blocks of one waste nothing.
BLOCK_BYTES = 4 * 2**20
Read = Callable[[str, Tensor], None]


class CudaSlots:
    """See `feed.Slots`. A copy into a slot waits for what still computes from it, on the GPU.

    Args:
        layers: What is streamed.
        read: Reads a tensor of the model's files into another.
        device: The GPU.
        all_pinned: All layers are read at once and wait in pinned memory; else each is read from
            its file when it is needed, and passes through a pinned buffer.
    """

    def __init__(
        self, layers: Sequence[LayerPieces], read: Read, device: torch.device, *, all_pinned: bool
    ) -> None:
        self._layers, self._read, self._device = layers, read, device
        size = max(layer.bytes for layer in layers)
        self._slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._stream = torch.cuda.Stream(device)
        for slot in self._slots:
            slot.record_stream(self._stream)  # a copy may be under way when they are let go of
        self._filled = [torch.cuda.Event() for _ in range(SLOTS)]
        self._released = [torch.cuda.Event() for _ in range(SLOTS)]
        self._pinned: list[list[Tensor]] = []
        self._buffers: list[Tensor] = []
        if all_pinned:
            room = torch.empty(size, dtype=torch.uint8)
            self._pinned = [self._blocks(layer, room) for layer in layers]
        else:
            self._buffers = [
                torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(SLOTS)
            ]

    def get(self, place: int, piece: Piece) -> Tensor:
        """See `feed.Slots`."""
        return piece.of(self._slots[place])

    def fill(self, place: int, layer: int) -> None:
        """Begin the copy; in the reading thread."""
        # A thread begins with the first GPU, to which the block below would return: it may be
        # full, or not to be used.
        torch.cuda.set_device(self._stream.device)
        if self._pinned:
            blocks = self._pinned[layer]
        else:
            self._filled[place].synchronize()  # the buffer's last copy
            self._gather(self._layers[layer], self._buffers[place])
            blocks = [self._buffers[place][: self._layers[layer].bytes]]
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._released[place])
            start = 0
            for block in blocks:
                self._slots[place][start : start + len(block)].copy_(block, non_blocking=True)
                start += len(block)
            self._filled[place].record(self._stream)

    def begin(self, place: int) -> None:
        """What is computed from here on waits for the copy."""
        torch.cuda.current_stream(self._device).wait_event(self._filled[place])

    def end(self, place: int) -> None:
        """The next copy waits for what was computed until here."""
        self._released[place].record(torch.cuda.current_stream(self._device))

    def _gather(self, layer: LayerPieces, into: Tensor) -> None:
        for piece in layer.pieces:
            self._read(piece.name, piece.of(into))

    def _blocks(self, layer: LayerPieces, room: Tensor) -> list[Tensor]:
        """A layer in pinned memory."""
        self._gather(layer, room)
        blocks = []
        for part in room[: layer.bytes].split(BLOCK_BYTES):
            block = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)[: len(part)]
            blocks.append(block.copy_(part))
        return blocks
