"""What works here when one device's memory is not enough.

Strategies are known by what is installed, and the rest is tried in child processes. A library that
crashes, a disk that stands still or two processes that do not meet cost a line of
`lighten doctor`, and no more than the time limit. On Linux without a GPU the children are forked
from a process that has imported PyTorch, so that all of them together take a second or two.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import distributed, nn

from lighten.errors import UserError
from lighten.machine import forks
from lighten.parallel.offloaded.adamw import OffloadedAdamW
from lighten.parallel.offloaded.stores import Scratch
from lighten.parallel.spawn import free_port
from lighten.parallel.streamed.shards import Shards
from lighten.safetensors_header import WHOLE

LIMIT_S = 20.0
IMPORTING_S = 40.0  # more for a child that has to import PyTorch, and the GPU's libraries, itself
NUMBERS = 2**20  # of the weight that AdamW moves
READ_BYTES = 64 * 2**20
PINNED_BYTES = 64 * 2**20
RANKS = 2
# What to do where an operation did not come to its end.
ADVICE = {
    "offload_optimizer: nvme": "name another folder with nvme_path",
    "offload_base: disk": "put the models on another disk and name it with LIGHTEN_CACHE",
    "offload_base: cpu": "update the GPU's driver, or raise the limit of locked memory (ulimit -l)",
    "ranks over gloo": "let processes connect to 127.0.0.1, or name an interface with "
                       "GLOO_SOCKET_IFNAME",
}  # fmt: skip


@dataclass(frozen=True)
class Tried:
    """What became of an operation.

    Attributes:
        works: None: it was not tried.
        detail: How well, or what is missing and how to get it.
        bytes_per_s: At which rate it reads or copies, where that is what it does.
    """

    works: bool | None
    detail: str
    bytes_per_s: float | None = None

    def sentence(self) -> str:
        """For a table."""
        return f"{ {True: 'yes', False: 'no', None: 'not tried'}[self.works] }: {self.detail}"


def strategies() -> dict[str, str]:
    """For each strategy `yes`, or what is missing."""
    if not distributed.is_available():
        none = "no: this PyTorch was built without torch.distributed"
        return dict.fromkeys(("ddp", "zero1", "zero2", "zero3", "fsdp"), none)
    from torch.distributed.fsdp import FSDPModule  # not of every build

    gpu = torch.cuda.is_available()
    engine = "NCCL" if gpu and distributed.is_nccl_available() else "gloo"
    sharded = (
        f"yes, PyTorch's fully_shard over {engine}"
        if hasattr(FSDPModule, "reset_iter_state")
        else f"no: it needs PyTorch 2.13 or later, and this is {torch.__version__}"
    )
    return {
        "ddp": f"yes, over {engine}", "zero1": f"yes, over {engine}",
        "zero2": f"of adapters yes; of the base's weights: {sharded}",
        "zero3": sharded, "fsdp": sharded,
    }  # fmt: skip


def operations(run_folder: Path, models_folder: Path) -> dict[str, Tried]:
    """Try each operation.

    Args:
        run_folder: Where runs are written, and with them the state of optimisers.
        models_folder: Where the files of models lie; it need not be there yet.
    """
    models_folder = next(path for path in (models_folder, *models_folder.parents) if path.is_dir())
    results = {
        "offload_optimizer: nvme": tried("offload_optimizer: nvme", _nvme, str(run_folder)),
        "offload_base: disk": tried(
            "offload_base: disk", _read, str(models_folder), scratch=models_folder
        ),
        "offload_base: cpu": Tried(None, "pinned memory is for a GPU, and there is none"),
        "ranks over gloo": tried("ranks over gloo", _meet, str(free_port())),
    }
    if torch.cuda.is_available():
        results["offload_base: cpu"] = tried("offload_base: cpu", _pinned, "cuda")
    return results


def tried(
    name: str, work: Callable[[str], Tried], word: str, *, scratch: Path | None = None,
    limit_s: float | None = None,
) -> Tried:  # fmt: skip
    """What work gives in a child process, or why it gives nothing.

    Args:
        name: Of the operation, in `ADVICE`.
        work: A function of a module.
        word: Its argument.
        scratch: Where the child has a folder of its own, which goes with it; None: anywhere.
        limit_s: It is ended after so long; None: after `LIMIT_S`, and what importing takes.
    """
    try:
        # Made here: a child that is ended leaves nothing behind.
        folder = tempfile.TemporaryDirectory(prefix="lighten-tried-", dir=scratch)
    except OSError as error:
        return Tried(False, f"{error}; {ADVICE[name]}")
    with folder as path:
        result = _in_child(work, word, path, limit_s)
    if result.works is False:
        return Tried(False, f"{result.detail}; {ADVICE[name]}")
    return result


def _in_child(work: Callable[[str], Tried], word: str, folder: str, limit_s: float | None) -> Tried:
    context = _context()
    if limit_s is None:
        limit_s = LIMIT_S + (0.0 if forks.computing() else IMPORTING_S)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(work, word, folder, sender))
    with warnings.catch_warnings():
        # Python 3.12 warns of threads; those of this process wait, and the child uses none.
        warnings.simplefilter("ignore", DeprecationWarning)
        child.start()
    sender.close()
    try:
        if not receiver.poll(limit_s):
            return Tried(False, f"it took more than {limit_s:g} s")
        result: Tried = receiver.recv()
    except EOFError:
        child.join()
        return Tried(False, f"its process ended with exit code {child.exitcode}")
    finally:
        child.kill()
        child.join()
    return result


def _context() -> Any:
    kind = "fork" if forks.computing() else "spawn"
    context: BaseContext = multiprocessing.get_context(kind)
    return context


def _child(work: Callable[[str], Tried], word: str, folder: str, sender: Connection) -> None:
    if forks.possible():
        forks.end_with_parent()
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries say is not the answer
    torch.set_num_threads(1)  # OpenMP's team of the parent has no members here
    try:
        result = work(word)
    except UserError as error:
        result = Tried(False, str(error))
    except Exception as error:  # whatever it is, it is what the user wants to know
        line = (str(error).strip() or "no message").splitlines()[0]
        result = Tried(False, f"{type(error).__name__}: {line}")
    sender.send(result)


def _nvme(folder: str) -> Tried:
    """A step of AdamW with its moments in a mapped file, beside one with them in memory."""
    expected = nn.Parameter(torch.linspace(-1.0, 1.0, NUMBERS))
    moved = nn.Parameter(expected.detach().clone())
    in_memory = torch.optim.AdamW([expected], fused=True)
    in_file = OffloadedAdamW([{"params": [moved]}], Scratch(Path(folder), "nvme_path"))
    for _ in range(2):
        for parameter, optimizer in ((expected, in_memory), (moved, in_file)):
            parameter.grad = parameter.detach().sin()
            optimizer.step()
    if not torch.equal(expected, moved):
        return Tried(False, "AdamW's state in a mapped file gives other weights")
    return Tried(True, f"AdamW's state in a mapped file in {folder}")


def _read(folder: str) -> Tried:
    """The rate at which the reader of streamed layers reads a file that is not in memory."""
    name, layer = "weight", torch.arange(READ_BYTES // 4, dtype=torch.float32)
    save_file({name: layer}, WHOLE)
    forgotten = _forget(WHOLE)
    target = torch.zeros_like(layer)  # its memory is there already
    began = time.perf_counter()
    Shards.of(Path.cwd()).read(name, target)
    seconds = time.perf_counter() - began
    if not torch.equal(layer, target):
        return Tried(False, f"what was read in {folder} is not what was written")
    rate = READ_BYTES / seconds
    how = "" if forgotten else ", from the system's cache"
    return Tried(True, f"layers are read in {folder} at {rate / 1e6:,.0f} MB/s{how}", rate)


def _forget(path: str) -> bool:
    """Let the system's cache forget a file, so that the disk is read; whether it can be told to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return True


def _pinned(device: str) -> Tried:
    """The rate of a copy from pinned memory to the GPU."""
    source = torch.empty(PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(PINNED_BYTES, dtype=torch.uint8, device=device)
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    began = time.perf_counter()
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    rate = PINNED_BYTES / (time.perf_counter() - began)
    return Tried(True, f"pinned memory is copied to the GPU at {rate / 1e6:,.0f} MB/s", rate)


def _meet(port: str) -> Tried:
    """Two processes that sum a tensor over gloo."""
    if not distributed.is_available():
        return Tried(False, "this PyTorch was built without torch.distributed")
    context = _context()
    other = context.Process(target=_rank, args=(1, port), daemon=True)
    other.start()
    try:
        total = _rank(0, port)
    finally:
        other.kill()
    if total != sum(range(1, RANKS + 1)):
        return Tried(False, f"two processes summed 1 and 2 over gloo to {total}")
    return Tried(True, "two processes met and summed a tensor")


def _rank(rank: int, port: str) -> float:
    if forks.possible():
        forks.end_with_parent()
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS
    )
    value = torch.tensor(rank + 1.0)
    distributed.all_reduce(value)
    distributed.barrier()  # none leaves before the other has its sum
    return float(value)
