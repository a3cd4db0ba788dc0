"""Micro-batches side by side: each lane is a thread that trains its own on its own cores.

A matrix product over all cores waits at its end for the slowest of them, and what is small between
two products (norms, attention of short rows, low-rank updates) hardly gains from more than one.
Micro-batches need nothing of each other until their gradients are summed, so on a processor every
few cores take whole ones. Results do not depend on the threads' speed: which lane trains what is
decided beforehand, and gradients are summed in the lanes' order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn

from lighten.adapters import Trained
from lighten.data.batches import MicroBatch
from lighten.hardware import Choice

# A lane of fewer tokens leaves its matrix products unfilled (docs/lab-notes.md).
FULL_TOKENS = 512
Result = TypeVar("Result")


def choose(
    wanted: int | str, trained: Trained, *, rows: int, tokens: int, device: str, threads: int
) -> Choice:
    """How many lanes, and why.

    Args:
        wanted: `auto`, or what the recipe says.
        trained: What learns.
        rows: Of one step on this rank, over all adapters.
        tokens: Of one step on this rank, on average.
        device: `cpu` or `cuda`.
        threads: That PyTorch may use.
    """
    if device != "cpu":
        return Choice("1", "a GPU is filled by one micro-batch")
    if (obstacle := trained.no_lanes) is not None:
        return Choice("1", obstacle)
    if isinstance(wanted, int):
        return Choice(str(min(wanted, rows)), "lanes of the recipe")
    most = max(1, min(threads, rows, tokens // FULL_TOKENS))
    count = max(n for n in range(1, most + 1) if threads % n == 0)
    if count == 1:
        return Choice("1", f"{threads} threads share a step of about {tokens} tokens")
    return Choice(str(count), "micro-batches side by side keep every core busy")


class Lanes:
    """Threads that share out the micro-batches of a step.

    Args:
        count: How many.
        threads: Of PyTorch, over all lanes.
    """

    def __init__(self, count: int, threads: int) -> None:
        self.count = count
        own = max(1, threads // count)
        # The number of threads that PyTorch uses is each calling thread's own.
        self._pool = ThreadPoolExecutor(count, "lane", lambda: torch.set_num_threads(own))

    def each(
        self, work: Callable[[list[MicroBatch]], Result], batches: Sequence[MicroBatch]
    ) -> list[Result]:
        """What the work makes of each lane's micro-batches, by lane.

        The first exception of a lane is raised here once all lanes have ended.
        """
        futures = [self._pool.submit(work, own) for own in shared_out(batches, self.count)]
        for future in futures:
            future.exception()
        return [future.result() for future in futures]


def shared_out(batches: Sequence[MicroBatch], count: int) -> list[list[MicroBatch]]:
    """The micro-batches of each lane: every one goes where the fewest tokens are."""
    lanes: list[list[MicroBatch]] = [[] for _ in range(min(count, len(batches)))]
    filled = [0] * len(lanes)
    for batch in sorted(batches, key=lambda batch: -batch.input_ids.numel()):
        place = min(range(len(lanes)), key=lambda lane: filled[lane])
        lanes[place].append(batch)
        filled[place] += batch.input_ids.numel()
    return lanes


class Slopes:
    """The summed gradients of one lane's micro-batches."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.sums: list[Tensor | None] = [None] * len(parameters)

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients; parameters that it does not depend on are left out."""
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for place, (total, more) in enumerate(zip(self.sums, found, strict=True)):
            if total is not None and more is not None:
                total += more
            elif more is not None:
                # A fused optimiser reads gradients in the order of their memory, which has to be
                # the parameter's; a product's may be transposed.
                self.sums[place] = torch.empty_like(self.parameters[place]).copy_(more)

    def give(self) -> None:
        """Add the sums to the parameters' own gradients, and let go of them."""
        for parameter, own in zip(self.parameters, self.sums, strict=True):
            if parameter.grad is None:
                parameter.grad = own
            elif own is not None:
                parameter.grad += own
        self.sums = []
