"""Micro-batches side by side: each worker trains its own on its own cores.

A matrix product over all cores waits at its end for the slowest of them, and what is small between
two products (norms, attention of short rows, low-rank updates) hardly gains from more than one.
Micro-batches need nothing of each other until their gradients are summed, so on a processor every
few cores take whole ones. Results do not depend on the threads' speed: which worker trains what is
decided beforehand, and gradients are summed in the workers' order.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from lighten.adapters import Trained
from lighten.data.batches import MicroBatch, even_shares
from lighten.engine.forward_backward import learn, measure
from lighten.engine.loss import Objective
from lighten.machine.hardware import Choice

# A worker of fewer tokens leaves its matrix products unfilled (docs/lab-notes.md).
FULL_TOKENS = 512
Result = TypeVar("Result")


def choose(
    setting: int | str, trained: Trained, *, rows: int, tokens: int, device: str, threads: int
) -> Choice:
    """How many workers, and why.

    Args:
        setting: `auto`, or what the recipe says.
        trained: What learns.
        rows: Of one step on this rank, over all adapters.
        tokens: Of one step on this rank, on average.
        device: `cpu` or `cuda`.
        threads: That PyTorch may use.
    """
    if device != "cpu":
        return Choice("1", "a GPU is filled by one micro-batch")
    if (obstacle := trained.no_workers) is not None:
        return Choice("1", obstacle)
    if isinstance(setting, int):
        # A rank may have no row in most steps: a run keeps them when it goes on as more ranks.
        return Choice(str(max(1, min(setting, rows))), "workers of the recipe")
    most = max(1, min(threads, rows, tokens // FULL_TOKENS))
    count = max(n for n in range(1, most + 1) if threads % n == 0)
    if count == 1:
        who = "one thread takes" if threads == 1 else f"{threads} threads share"
        return Choice("1", f"{who} a step of about {tokens} tokens")
    return Choice(str(count), "micro-batches side by side keep every core busy")


class Workers(ABC):
    """What shares out the micro-batches of a step, or of an evaluation.

    Args:
        count: How many workers there are.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    @property
    def unshared_bytes(self) -> int:
        """The most that workers held beside this process: nothing, where they are its threads."""
        return 0

    @abstractmethod
    def learn(
        self,
        objective: Objective,
        batches: Sequence[MicroBatch],
        parameters: Sequence[nn.Parameter],
        per_token: Mapping[str, float],
        scales: Mapping[str, float],
    ) -> list[dict[str, float]]:
        """`forward_backward.learn` on every micro-batch, added to the parameters' gradients.

        The first exception of a worker is raised here once all workers have ended.
        """

    @abstractmethod
    def measure(self, objective: Objective, batches: Sequence[MicroBatch]) -> list[list[float]]:
        """`forward_backward.measure` of every micro-batch, in the batches' order."""

    @abstractmethod
    def give_back(self) -> None:
        """Workers that hold free memory of their own give it back to the system."""

    @abstractmethod
    def close(self) -> None:
        """End what the workers run in."""


class Pool:
    """Threads that each compute with a few of PyTorch's own.

    Args:
        count: How many.
        threads: Of PyTorch, for each.
    """

    def __init__(self, count: int, threads: int) -> None:
        self._ids: list[int] = []
        self._pool = ThreadPoolExecutor(count, "worker", self._begin, (threads,))

    def submit(self, work: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Have a thread do the work."""
        return self._pool.submit(work, *arguments)

    def close(self) -> None:
        """End the threads.

        One that has ended for Python still frees what libraries kept for it, and holds their locks
        meanwhile. A process forked then would inherit them locked for ever, so this waits (Linux).
        """
        self._pool.shutdown()
        while any(Path(f"/proc/self/task/{thread}").exists() for thread in self._ids):
            time.sleep(0.001)

    def _begin(self, threads: int) -> None:
        self._ids.append(threading.get_native_id())
        torch.set_num_threads(threads)  # their number is each calling thread's own


class Threads(Workers):
    """Workers that are threads of this process.

    Args:
        count: How many.
        threads: Of PyTorch, over all workers.
    """

    def __init__(self, count: int, threads: int) -> None:
        super().__init__(count)
        self._pool = Pool(count, max(1, threads // count))

    def learn(
        self,
        objective: Objective,
        batches: Sequence[MicroBatch],
        parameters: Sequence[nn.Parameter],
        per_token: Mapping[str, float],
        scales: Mapping[str, float],
    ) -> list[dict[str, float]]:
        """See `Workers`."""
        losses: list[dict[str, float]] = []
        for gradients, worker_losses in self._run_workers(
            lambda share: GradientSums(parameters).learn(share, objective, per_token, scales),
            batches,
        ):
            gradients.give()
            losses += worker_losses
        return losses

    def measure(self, objective: Objective, batches: Sequence[MicroBatch]) -> list[list[float]]:
        """See `Workers`."""
        by_worker = self._run_workers(
            lambda share: [measure(batch, objective) for batch in share], batches
        )
        return in_order(batches, by_worker, self.count)

    def give_back(self) -> None:
        """Threads hold nothing of their own."""

    def close(self) -> None:
        """End the threads."""
        self._pool.close()

    def _run_workers(
        self, work: Callable[[list[MicroBatch]], Result], batches: Sequence[MicroBatch]
    ) -> list[Result]:
        """What the work makes of each worker's micro-batches, by worker."""
        futures = [self._pool.submit(work, share) for share in shared_out(batches, self.count)]
        for future in futures:
            future.exception()
        return [future.result() for future in futures]


def shared_out(batches: Sequence[MicroBatch], count: int) -> list[list[MicroBatch]]:
    """The micro-batches of each worker."""
    shares = even_shares([batch.input_ids.numel() for batch in batches], count)
    return [[batches[place] for place in places] for places in shares]


def in_order(
    batches: Sequence[MicroBatch], by_worker: Sequence[Sequence[Result]], count: int
) -> list[Result]:
    """What the workers found of each micro-batch, back in the batches' order."""
    places = {id(batch): place for place, batch in enumerate(batches)}
    results_of: dict[int, Result] = {}
    for share, results in zip(shared_out(batches, count), by_worker, strict=True):
        results_of |= {
            places[id(batch)]: result for batch, result in zip(share, results, strict=True)
        }
    return [results_of[place] for place in range(len(batches))]


class GradientSums:
    """The summed gradients of one worker's micro-batches.

    Args:
        parameters: Whose.
        into: Tensors of the parameters' shapes to sum in; None: memory is taken as it is needed.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        into: Sequence[Tensor] | None = None,
    ) -> None:
        self.parameters = parameters
        self.sums: list[Tensor | None] = [None] * len(parameters)
        self._into = into

    def learn(
        self,
        batches: Sequence[MicroBatch],
        objective: Objective,
        per_token: Mapping[str, float],
        scales: Mapping[str, float],
    ) -> tuple[Self, list[dict[str, float]]]:
        """Sum the gradients of a worker's micro-batches; itself, and what `learn` says."""
        return self, [
            learn(batch, objective, per_token, scales, self.backward) for batch in batches
        ]

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients; parameters that it does not depend on are left out."""
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for place, (total, gradient) in enumerate(zip(self.sums, gradients, strict=True)):
            if total is not None and gradient is not None:
                total += gradient
            elif gradient is not None:
                # A fused optimiser reads gradients in the order of their memory, which has to be
                # the parameter's; a product's may be transposed.
                total = (
                    self._into[place] if self._into else torch.empty_like(self.parameters[place])
                )
                self.sums[place] = total.copy_(gradient)

    def give(self) -> None:
        """Add the sums to the parameters' own gradients, and let go of them."""
        for parameter, total in zip(self.parameters, self.sums, strict=True):
            if parameter.grad is None:
                parameter.grad = total
            elif total is not None:
                parameter.grad += total
        self.sums = []
