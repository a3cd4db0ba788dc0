"""Work that forked processes share: what each makes, in the order it was asked for.

Python's interpreter runs one thread at a time. A forked process has all that this one has, in the
same memory until someone writes there, so nothing needs to be sent to it but which piece is next.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from lighten.machine import containers

PR_SET_PDEATHSIG = 1  # linux/prctl.h
# The launcher whose variables were translated into PyTorch's (`lighten.parallel.launch`).
TRANSLATED = "LIGHTEN_LAUNCHER"
# Pieces that a process has been asked for, so that it never waits for the next.
AHEAD = 2
# Pieces that are made and not yet taken, for each process: memory that a slow one may cost.
WAITING = 4
Made = TypeVar("Made")


def possible() -> bool:
    """Whether this system forks a process that computes: macOS's frameworks do not survive it."""
    return sys.platform.startswith("linux")


def computing() -> bool:
    """Whether a forked process can compute with PyTorch, too: not on a machine with a GPU.

    PyTorch's autograd has a thread for every GPU that it sees, whatever computes, and its
    optimisers ask CUDA whether a graph is being captured. Neither is passed on: a forked process
    would fail at its first backward pass or its first step, on the processor as well.
    """
    import torch

    return possible() and not torch.cuda.is_available()


def end_with_parent() -> None:
    """Let this forked process end when the one that forked it does, however that ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def freeze() -> bool:
    """Keep the search for garbage away from all that there is, which forks are to share.

    It writes to every object, and each page that one side writes to is there twice from then on.

    Returns:
        Whether it is the caller's to thaw. Where somebody froze something before, all stays as it
        is: only everything can be thawed, and what is frozen with theirs for good is never freed.
    """
    if gc.get_freeze_count():
        return False
    gc.collect()
    gc.freeze()
    return True


def processors() -> int:
    """Processors that this process may use, its share where a launcher started several.

    A task that SLURM has bound to some of the node's has its share already.
    """
    cores = containers.cores()
    if os.environ.get(TRANSLATED) == "srun" and cores < _number("SLURM_CPUS_ON_NODE"):
        return cores
    return max(1, cores // max(1, _number("LOCAL_WORLD_SIZE")))


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else 0


def in_order(
    work: Callable[[int], Made], pieces: int, processes: int, patience_s: float
) -> Iterator[Made]:
    """`work(0)`, `work(1)` and so on, made by forked processes.

    A piece that a process does not come to make, or fails at, is made here: nothing is lost with a
    process that the system ends, and errors are raised where they can be read.

    Args:
        work: Makes a piece, which must be picklable. It changes nothing that others see.
        pieces: How many there are.
        processes: How many make them.
        patience_s: After so many seconds without any piece, the processes are given up.
    """
    crew = _Crew(work, pieces, processes)
    try:
        yield from crew.results(patience_s)
    finally:
        crew.end()


class _Crew:
    """Forked processes and what each was asked for."""

    def __init__(self, work: Callable[[int], Any], pieces: int, processes: int) -> None:
        self._work, self._pieces, self._next = work, pieces, 0
        self._pending: dict[Connection, deque[int]] = {}
        self._pids: dict[Connection, int] = {}
        self._thaws = freeze()
        try:
            for _ in range(processes):
                self._fork()
        except OSError:  # no room for more processes
            self._thaw()

    def _thaw(self) -> None:
        """Once nobody shares what is here."""
        if self._thaws and not self._pids:
            gc.unfreeze()

    def _fork(self) -> None:
        parent_end, child_end = Pipe()
        with warnings.catch_warnings():
            # Python 3.12 warns of threads; those of this process wait, and the child uses none.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            try:
                for pipe in (parent_end, *self._pids):
                    pipe.close()
                # Ctrl-C reaches the whole group, and it is the parent's to tell of.
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                end_with_parent()
                _make_all(self._work, child_end)
            finally:
                os._exit(0)
        child_end.close()
        self._pids[parent_end], self._pending[parent_end] = pid, deque()

    def results(self, patience_s: float) -> Iterator[Any]:
        """Every piece in order."""
        ready: dict[int, Any] = {}
        for place in range(self._pieces):
            while place not in ready:
                self._ask(most=place + len(self._pids) * WAITING)
                if not any(place in pending for pending in self._pending.values()):
                    ready[place] = self._work(place)  # nobody makes it
                    self._next = max(self._next, place + 1)
                    break
                answered = wait(
                    [pipe for pipe, pending in self._pending.items() if pending], patience_s
                )
                if not answered:
                    self.end()
                for pipe in answered:
                    assert isinstance(pipe, Connection)
                    self._take(pipe, ready)
            yield ready.pop(place)

    def _ask(self, most: int) -> None:
        """Ask each process for more, up to the piece `most`."""
        for _ in range(AHEAD):
            for pipe, pending in list(self._pending.items()):
                if len(pending) < AHEAD and self._next < min(most, self._pieces):
                    try:
                        pipe.send(self._next)
                    except OSError:
                        self._give_up(pipe)
                        continue
                    pending.append(self._next)
                    self._next += 1

    def _take(self, pipe: Connection, ready: dict[int, Any]) -> None:
        try:
            well, piece = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):  # the system has ended it
            self._give_up(pipe)
            return
        place = self._pending[pipe].popleft()
        if well:
            ready[place] = piece

    def _give_up(self, pipe: Connection) -> None:
        """End one process; what it was asked for is made here."""
        pid = self._pids.pop(pipe)
        del self._pending[pipe]
        pipe.close()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self._thaw()

    def end(self) -> None:
        """End all processes, which have nothing to save."""
        for pipe in list(self._pids):
            self._give_up(pipe)


def _make_all(work: Callable[[int], Any], pipe: Connection) -> None:
    """A process's life: a number in, its piece out, until the pipe is closed."""
    while True:
        try:
            place = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = True, work(place)
        except Exception:  # whatever it is, the parent meets it too, and raises it there
            answer = False, None
        pipe.send_bytes(pickle.dumps(answer, protocol=pickle.HIGHEST_PROTOCOL))
