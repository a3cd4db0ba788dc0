"""AdamW whose state waits elsewhere: a few million numbers at a time are brought and moved.

PyTorch's own kernel moves them on the processor, piece by piece, so that results are those of
`torch.optim.AdamW(fused=True)` there, bit for bit. Weights and gradients of a device are copied to
main memory for a piece's time and the new weights back (ZeRO-Offload, arXiv 2101.06840).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from lighten.adapters import dtensors
from lighten.parallel.offloaded.stores import Store

# Numbers that are moved together: 16 MiB of each moment. More is no faster on a disk.
PIECE_NUMBERS = 2**22
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class _Piece:
    """Numbers of a parameter that follow each other, with all that moves them, each [n]."""

    parameter: nn.Parameter
    weight: Tensor
    gradient: Tensor
    moments: tuple[Tensor, Tensor]

    @property
    def lasting(self) -> tuple[Tensor, ...]:
        """What may lie in a store."""
        return self.weight, *self.moments


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW with its moments in a store.

    Args:
        groups: As for `torch.optim.AdamW`.
        store: Where the moments wait.
        options: As of `torch.optim.AdamW`.

    Raises:
        UserError: The store has no room.
    """

    def __init__(self, groups: list[dict[str, Any]], store: Store, **options: Any) -> None:
        super().__init__(groups, fused=False, foreach=False, **options)
        self._store = store
        parameters = [p for group in self.param_groups for p in group["params"]]
        held = [dtensors.local_part(p.detach()) for p in parameters]
        moments = {name: store.zeros_like(held) for name in MOMENTS}
        for place, parameter in enumerate(parameters):
            self.state[parameter] = {
                "step": torch.tensor(0.0),
                **{name: _laid_out(moments[name][place], parameter) for name in MOMENTS},
            }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            batches = list(self._batches(group["params"]))
            for place, batch in enumerate(batches):
                if place + 1 < len(batches):
                    self._store.fetch(t for piece in batches[place + 1] for t in piece.lasting)
                self._move(batch, group)
                self._store.release(t for piece in batch for t in piece.lasting)
            for parameter in {piece.parameter for batch in batches for piece in batch}:
                self.state[parameter]["step"] += 1

    def _move(self, batch: list[_Piece], group: Mapping[str, Any]) -> None:
        # PyTorch's kernel walks through memory, whatever the order of a tensor's numbers in it.
        weights = [piece.weight.cpu().contiguous() for piece in batch]
        adamw(
            weights, [piece.gradient.cpu().contiguous() for piece in batch],
            [piece.moments[0] for piece in batch], [piece.moments[1] for piece in batch], [],
            [self.state[piece.parameter]["step"].clone() for piece in batch],
            foreach=False, fused=True, amsgrad=False, maximize=False,
            beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip
        for piece, moved in zip(batch, weights, strict=True):
            if moved.data_ptr() != piece.weight.data_ptr() or moved.device != piece.weight.device:
                piece.weight.copy_(moved)

    def _batches(self, parameters: list[nn.Parameter]) -> Iterator[list[_Piece]]:
        """Pieces that are moved together, in the parameters' order."""
        batch: list[_Piece] = []
        room = PIECE_NUMBERS
        for parameter in parameters:
            if parameter.grad is None:
                continue
            for piece in self._pieces(parameter):
                if batch and piece.weight.numel() > room:
                    yield batch
                    batch, room = [], PIECE_NUMBERS
                batch.append(piece)
                room -= piece.weight.numel()
        if batch:
            yield batch

    def _pieces(self, parameter: nn.Parameter) -> Iterator[_Piece]:
        assert parameter.grad is not None
        state = self.state[parameter]
        weight, gradient, *moments = (
            dtensors.local_part(tensor)
            for tensor in (parameter.detach(), parameter.grad, *(state[name] for name in MOMENTS))
        )
        if weight.is_contiguous():
            flat = [tensor.reshape(-1) for tensor in (weight, gradient, *moments)]
            for parts in zip(*(tensor.split(PIECE_NUMBERS) for tensor in flat), strict=True):
                yield _Piece(parameter, parts[0], parts[1], (parts[2], parts[3]))
        else:
            yield _Piece(parameter, weight, gradient, (moments[0], moments[1]))


def _laid_out(local: Tensor, like: Tensor) -> Tensor:
    """A rank's rows as a tensor of the whole shape, where the parameter is one."""
    if not isinstance(like, DTensor):
        return local
    return dtensors.spread(local, like, like.device_mesh)
