"""Workers that are processes, forked from the one that trains.

Python's interpreter runs one thread at a time, and a step is thousands of small operations that
each ask for it and for the one heap: two threads took half as long again as two processes
(docs/lab-notes.md). The process is forked once the base is loaded and the loss is checked. A child
has the base and all else as it was then, in the same memory until someone writes there; what
learns, and the children's gradients, are put into memory that all of them see beforehand. So a step
sends a child its micro-batches and gets back losses. Worker 0 stays in this process. Bits are those
of threads: which worker trains what is decided alike, and gradients are summed in their order.
"""

from __future__ import annotations

import gc
import mmap
import os
import pickle
import signal
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from lighten.cpu import allocator
from lighten.data.batches import MicroBatch
from lighten.engine.adapter_optimizer import AdapterOptimizer
from lighten.engine.forward_backward import measure
from lighten.engine.loss import Objective
from lighten.engine.workers import GradientSums, Pool, Workers, in_order, shared_out
from lighten.machine import hardware, stops
from lighten.machine.forks import computing, end_with_parent, freeze

possible = computing  # whether workers can be processes at all
ALIGNED = 64  # bytes: a cache line, and the widest vector
START_S = 30.0  # a child starts in milliseconds; after this it never will


def processes_for(
    workers: int, objective: Objective, groups: Sequence[Sequence[AdapterOptimizer]]
) -> Forked:
    """The workers of a training whose loss was checked.

    Args:
        workers: How many, this process included.
        objective: The loss.
        groups: The adapters that share micro-batches, with what of them learns.

    Raises:
        OSError: See `Forked`.
    """
    learning = [[p for adapter in group for p in adapter.parameters.values()] for group in groups]
    return Forked(workers, torch.get_num_threads(), objective, learning)


class SharedTensors:
    """Memory that this process and those forked from it later see alike, as tensors.

    It is no file: a container's `/dev/shm` may have 64 MB.

    Args:
        size: In bytes; pages are taken when they are first written.
    """

    def __init__(self, size: int) -> None:
        self._memory = torch.frombuffer(mmap.mmap(-1, max(size, ALIGNED)), dtype=torch.uint8)

    def like(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of these shapes and formats, one behind the other from the memory's start."""
        views, start = [], 0
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            piece = self._memory[start : start + size].view(tensor.dtype)
            views.append(piece.view(tensor.shape))
            start += _room(tensor)
        return views


def _room(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // ALIGNED) * ALIGNED


@dataclass(frozen=True)
class _Answer:
    """What a child says of one job.

    Attributes:
        result: What the job makes.
        error: Why it makes nothing.
        unshared_bytes: The most that the child held so far and shared with nobody.
    """

    result: Any = None
    error: BaseException | None = None
    unshared_bytes: int = 0


class Forked(Workers):
    """Workers of which all but the first are processes of their own.

    Args:
        count: How many workers.
        threads: Of PyTorch, over all workers.
        objective: The loss, as it will be asked from now on.
        groups: What learns, by what learns at the same time. From now on its memory is shared.

    Raises:
        OSError: The system makes no more processes, or one of them does not come to compute.
    """

    def __init__(
        self,
        count: int,
        threads: int,
        objective: Objective,
        groups: Sequence[Sequence[nn.Parameter]],
    ) -> None:
        super().__init__(count)
        self._objective = objective
        self._parameters = [parameter for group in groups for parameter in group]
        self._places = {id(parameter): place for place, parameter in enumerate(self._parameters)}
        _share(self._parameters)
        largest = max(sum(map(_room, group)) for group in groups)
        threads_each = max(1, threads // count)
        self._children: list[_Child] = []
        self._thaws = freeze()
        allocator.trim()  # a child would copy each free page that it writes to
        try:
            for _ in range(count - 1):
                gradients = SharedTensors(largest)
                self._children.append(_Child(self._serve, gradients, threads_each, self._children))
            for child in self._children:
                child.await_start()
        except OSError:
            self._end_children()
            raise
        self._first = Pool(1, threads_each)

    @property
    def unshared_bytes(self) -> int:
        """The most that the children held beside what they share with this process."""
        return sum(child.unshared_bytes for child in self._children)

    def learn(
        self,
        objective: Objective,
        batches: Sequence[MicroBatch],
        parameters: Sequence[nn.Parameter],
        per_token: Mapping[str, float],
        scales: Mapping[str, float],
    ) -> list[dict[str, float]]:
        """See `Workers`."""
        places = [self._places[id(parameter)] for parameter in parameters]
        first, child_results = self._run_workers(
            lambda share: GradientSums(parameters).learn(share, objective, per_token, scales),
            lambda share: ("learn", share, places, dict(per_token), dict(scales)),
            batches,
        )
        gradients, losses = first
        gradients.give()
        for child, (reached, child_losses) in zip(self._children, child_results, strict=False):
            sums = child.gradients.like(parameters)
            for parameter, total, is_there in zip(parameters, sums, reached, strict=True):
                if is_there and parameter.grad is None:
                    parameter.grad = total.clone()
                elif is_there and parameter.grad is not None:
                    parameter.grad += total
            losses = losses + child_losses
        return losses

    def measure(self, objective: Objective, batches: Sequence[MicroBatch]) -> list[list[float]]:
        """See `Workers`."""
        if not batches:
            return []
        first, child_results = self._run_workers(
            lambda share: [measure(batch, objective) for batch in share],
            lambda share: ("measure", share),
            batches,
        )
        return in_order(batches, [first, *child_results], self.count)

    def give_back(self) -> None:
        """See `Workers`."""
        for child in self._children:
            child.ask(("give_back",))
        for child in self._children:
            child.answer()

    def close(self) -> None:
        """End the processes; what learns stays where it is."""
        self._end_children()
        self._first.close()

    def _end_children(self) -> None:
        for child in self._children:
            child.end()
        if self._thaws:
            gc.unfreeze()

    def _run_workers(
        self,
        work: Callable[[list[MicroBatch]], Any],
        job_for: Callable[[list[MicroBatch]], tuple[Any, ...]],
        batches: Sequence[MicroBatch],
    ) -> tuple[Any, list[Any]]:
        """What this process makes of the first worker, and the children of the others."""
        first, *child_shares = shared_out(batches, self.count)
        busy = self._children[: len(child_shares)]
        for child, share in zip(busy, child_shares, strict=True):
            child.ask(job_for(share))
        future: Future[Any] = self._first.submit(work, first)
        answers = [child.answer() for child in busy]
        future.exception()
        for answer in answers:
            if answer.error is not None:
                raise answer.error
        return future.result(), [answer.result for answer in answers]

    def _serve(self, gradients: SharedTensors, job: tuple[Any, ...]) -> Any:
        """A child's job, in the child."""
        task, *arguments = job
        if task == "measure":
            return [measure(batch, self._objective) for batch in arguments[0]]
        batches, places, per_token, scales = arguments
        parameters = [self._parameters[place] for place in places]
        sums = GradientSums(parameters, gradients.like(parameters))
        _, losses = sums.learn(batches, self._objective, per_token, scales)
        return [total is not None for total in sums.sums], losses


class _Child:
    """A process that answers jobs until its pipe is closed.

    Args:
        work: What it makes of a job.
        gradients: Where it sums gradients.
        threads: That PyTorch uses in it.
        elder: Those forked before, whose pipes this one must not hold open.
    """

    def __init__(
        self,
        work: Callable[[SharedTensors, tuple[Any, ...]], Any],
        gradients: SharedTensors,
        threads: int,
        elder: Sequence[_Child],
    ) -> None:
        self.gradients, self.unshared_bytes = gradients, 0
        self._pipe, child_pipe = Pipe()
        with warnings.catch_warnings():
            # Python 3.12 warns of threads; those of this process wait, and the child uses none.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
        if self._pid == 0:
            try:
                for pipe in (self._pipe, *(child._pipe for child in elder)):
                    pipe.close()
                # Ctrl-C reaches the whole group: the parent finishes its step and closes the pipe.
                for number in stops.STOPS:
                    signal.signal(number, signal.SIG_IGN)
                end_with_parent()
                # A thread of its own: OpenMP's team of the forked one has no members here.
                worker = threading.Thread(
                    target=_answer_all,
                    args=(child_pipe, lambda job: work(gradients, job), threads),
                )
                worker.start()
                worker.join()
            finally:
                os._exit(0)
        child_pipe.close()

    def await_start(self) -> None:
        """Wait until the child has computed something.

        A library's lock that another thread held at the fork stays locked in the child.

        Raises:
            OSError: It has not.
        """
        if not self._pipe.poll(START_S):
            os.kill(self._pid, signal.SIGKILL)
        if (error := self.answer().error) is not None:
            raise OSError(f"it does not compute: {error}")

    def ask(self, job: tuple[Any, ...]) -> None:
        """Send a job."""
        try:
            self._pipe.send_bytes(pickle.dumps(job))
        except OSError as error:
            raise self._ended() from error

    def answer(self) -> _Answer:
        """Wait for what the child says; its end is an answer too."""
        try:
            answer: _Answer = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            return _Answer(error=self._ended())
        self.unshared_bytes = answer.unshared_bytes
        return answer

    def end(self) -> None:
        """End the process, which has nothing to save."""
        self._pipe.close()
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0

    def _ended(self) -> BaseException:
        status = os.waitpid(self._pid, 0)[1] if self._pid else 0
        self._pid = 0
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return MemoryError("a worker's process was killed, as Linux does where memory runs out")
        return RuntimeError(f"a worker's process ended by itself (status {status})")


def _share(parameters: Sequence[nn.Parameter]) -> None:
    """Move parameters, with their values, to memory that children will see."""
    memory = SharedTensors(sum(map(_room, parameters)))
    for parameter, shared in zip(parameters, memory.like(parameters), strict=True):
        parameter.data = shared.copy_(parameter.data)


def _answer_all(pipe: Connection, work: Callable[[tuple[Any, ...]], Any], threads: int) -> None:
    """Answer jobs until the other end is closed."""
    torch.set_num_threads(threads)
    pages, memory = allocator.KeptPages("cpu"), _Memory()
    for dtype in (torch.float32, torch.bfloat16):  # products of different libraries
        torch.ones(64, 64, dtype=dtype).mm(torch.ones(64, 64, dtype=dtype))
    pipe.send_bytes(pickle.dumps(_Answer()))
    while True:
        try:
            job = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        if job[0] == "give_back":
            pages.give_back()
            answer = _Answer()
        else:
            try:
                answer = _Answer(work(job))
            except BaseException as error:  # the parent judges it
                answer = _Answer(error=_portable(error))
            if job[0] == "learn":
                pages.after_step()
        pipe.send_bytes(pickle.dumps(_Answer(answer.result, answer.error, memory.unshared_bytes())))


class _Memory:
    """The most that a child has held and shares with nobody."""

    def __init__(self) -> None:
        self._answers = self._shared = 0

    def unshared_bytes(self) -> int:
        """In bytes."""
        # What is shared shrinks a little as pages are written to; counting it walks all pages.
        if self._answers & (self._answers - 1) == 0:
            memory = psutil.Process().memory_full_info()
            self._shared = memory.rss - memory.uss
        self._answers += 1
        return max(0, hardware.high_water() - self._shared)


def _portable(error: BaseException) -> BaseException:
    """The error without its frames, which hold a step's tensors; another if it cannot travel."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does wrong
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
