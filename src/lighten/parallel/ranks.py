"""What ranks say to each other, and what happens where one of them is gone."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, check_cuda_p2p_ib_support
from torch import Tensor

from lighten.errors import UserError
from lighten.machine.stops import STOPS
from lighten.parallel import meeting
from lighten.parallel.foreign import set_aside
from lighten.parallel.launch import Launch
from lighten.wording import counted, first_line

Value = TypeVar("Value")
_BOTH = "cuda:nccl,cpu:gloo"  # as accelerate has it for FSDP with weights in main memory
# What gloo says of a rank that is gone, in a plain RuntimeError.
_NETWORK = re.compile(r"gloo|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)


class PeerLost(UserError):
    """Another rank has ended, so that this one cannot go on; the other one's message says why."""


def connect(
    launch: Launch, device: str, recipe: str, *, gathers: bool = False, offloads: bool = False,
    **options: Any,
) -> Accelerator:  # fmt: skip
    """Meet the other ranks, and make sure that all see each other and train the same.

    Args:
        launch: What the launcher says of this process.
        device: `cpu`, or a CUDA device.
        recipe: The completed recipe.
        gathers: Layers are gathered in a pass: one process is a group of ranks too.
        offloads: Weights or state wait outside of the device: ranks on GPUs gather them in main
            memory, for norms and checkpoints.
        options: More arguments of `Accelerator`.

    Raises:
        UserError: This rank has no device, is alone against the launcher's word, or has another
            recipe than the first; not all have come; or the port where they meet is another
            program's.
        PeerLost: A rank has ended meanwhile.
    """
    if device != "cpu" and launch.world_size > 1:
        _require_gpus(launch, device, torch.cuda.device_count())
    if device != "cpu" and not check_cuda_p2p_ib_support():
        # Two RTX 40 under an old driver: accelerate refuses them unless NCCL is told.
        os.environ.setdefault("NCCL_P2P_DISABLE", "1")
        os.environ.setdefault("NCCL_IB_DISABLE", "1")
    _forget_run_before(torch.device(device))
    backend = _BOTH if offloads and device != "cpu" and launch.world_size > 1 else None
    group = InitProcessGroupKwargs(backend=backend, timeout=meeting.PATIENCE)
    threads = torch.get_num_threads()
    with lost_peers(launch.rank, launch.world_size), set_aside(os.environ):
        if gathers and launch.world_size == 1:
            _meet_oneself()
        # A process that has trained alone before is refused below.
        if launch.world_size > 1 and not PartialState._shared_state:
            _meet_others(launch, "gloo" if device == "cpu" else backend or "nccl")
        accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=[group], **options)
    # accelerate shares out the cores of the host, whatever a container or SLURM leaves of them.
    torch.set_num_threads(threads)
    if accelerator.device.type == "cpu":
        # accelerate says `cpu:0` to ranks, and whatever is moved there is copied: a base that is
        # mapped from its files would be in memory once for every rank.
        accelerator.state.device = torch.device("cpu")
    if accelerator.num_processes != launch.world_size:
        raise UserError(
            f"{launch.launcher} started {launch.world_size} ranks, but rank {launch.rank} sees "
            f"{accelerator.num_processes}: each would train alone and write the same files; start "
            "again with: lighten train RECIPE --processes N (or --gpus N)"
        )
    if launch.world_size > 1:
        answers = gather(accelerator, (launch.rank, _digest(recipe), accelerator.device.type))
        if sorted(rank for rank, *_ in answers) != list(range(launch.world_size)):
            raise UserError(
                f"of {launch.world_size} ranks these answered: "
                f"{sorted(answer[0] for answer in answers)}; every rank needs a RANK of its own"
            )
        for rank, *same in answers:
            if same != list(answers[0][1:]):
                raise UserError(
                    f"rank {rank} was started with another recipe or device than rank 0; start all "
                    "ranks with the same words"
                )
    return accelerator


def _forget_run_before(device: torch.device) -> None:
    """Drop what accelerate keeps of a run that has ended in this process, where it no longer holds.

    It would refuse another device, or take the former one without a word.
    """
    state = PartialState._shared_state
    if not state or torch.distributed.is_initialized():
        return
    if state.get("num_processes", 1) > 1 or state["device"].type != device.type:
        AcceleratorState._reset_state(reset_partial_state=True)


def _meet_oneself() -> None:
    """A group of this process alone; nothing is sent."""
    if torch.distributed.is_initialized():
        return  # by a run that failed before it began
    from torch._C._distributed_c10d import HashStore  # not of every build

    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)


def _meet_others(launch: Launch, backend: str) -> None:
    """A group of all ranks; accelerate takes what is there."""
    if torch.distributed.is_initialized():
        return
    torch.distributed.init_process_group(
        backend, rank=launch.rank, world_size=launch.world_size, store=meeting.meet(launch),
        timeout=meeting.PATIENCE,
    )  # fmt: skip


def _require_gpus(launch: Launch, device: str, gpus: int) -> None:
    """Every rank of this machine has a GPU of its own.

    Raises:
        UserError: There are too few, or all ranks were told the same one.
    """
    if not gpus:
        raise UserError("PyTorch sees no GPU on this machine; use: lighten train --processes N")
    named = torch.device(device)
    if named.index is not None and launch.local_world_size > 1 and not launch.own_gpu:
        raise UserError(
            f"LIGHTEN_DEVICE={named} is one GPU for {launch.local_world_size} ranks of this "
            "machine; set LIGHTEN_DEVICE=cuda, and CUDA_VISIBLE_DEVICES to the GPUs to use"
        )
    if launch.local_world_size > gpus and not launch.own_gpu:
        raise UserError(
            f"{launch.local_world_size} ranks were started on a machine with "
            f"{counted(gpus, 'GPU')}; start {gpus} of them, or train on the processor with "
            "LIGHTEN_DEVICE=cpu"
        )


def _digest(recipe: str) -> str:
    return hashlib.sha256(recipe.encode()).hexdigest()


def total(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The sum of all ranks' tensors, in the place of this one: a copy of a model's has no room.

    Raises:
        PeerLost: A rank has ended.
    """
    if accelerator.num_processes > 1:
        with _together(accelerator):
            torch.distributed.all_reduce(tensor)
    return tensor


def wait(accelerator: Accelerator) -> None:
    """Wait until every rank is here.

    Raises:
        PeerLost: A rank has ended.
    """
    with _together(accelerator):
        accelerator.wait_for_everyone()


def gather(accelerator: Accelerator, value: Value) -> list[Value]:
    """Every rank's value, by rank.

    Raises:
        PeerLost: A rank has ended.
    """
    if accelerator.num_processes == 1:
        return [value]
    values: list[Any] = [None] * accelerator.num_processes
    with _together(accelerator):
        torch.distributed.all_gather_object(values, value)
    return values


def of_main(accelerator: Accelerator, value: Value) -> Value:
    """The main rank's value, on every rank.

    Raises:
        PeerLost: A rank has ended.
    """
    if accelerator.num_processes == 1:
        return value
    values = [value]
    with _together(accelerator):
        torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def agreed_stop(accelerator: Accelerator, received: signal.Signals | None) -> signal.Signals | None:
    """The signal that any rank was told to stop by: all stop after the same step.

    Raises:
        PeerLost: A rank has ended.
    """
    if accelerator.num_processes == 1:
        return received
    flags = torch.tensor([received == number for number in STOPS], dtype=torch.int32)
    counts = total(accelerator, flags.to(accelerator.device)).tolist()
    return next((number for number, count in zip(STOPS, counts, strict=True) if count), None)


def agreed_all(accelerator: Accelerator, *held: bool) -> list[bool]:
    """For each statement whether it holds on every rank.

    Raises:
        PeerLost: A rank has ended.
    """
    if accelerator.num_processes == 1:
        return list(held)
    against = torch.tensor([not holds for holds in held], dtype=torch.int32)
    return [not count for count in total(accelerator, against.to(accelerator.device)).tolist()]


@contextlib.contextmanager
def lost_peers(rank: int, world_size: int) -> Iterator[None]:
    """Say in words what a collective's error means: gloo and NCCL tell of sockets and files.

    That this rank's own memory ran out is no other's end.

    Raises:
        PeerLost: A rank has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if world_size == 1 or isinstance(error, torch.OutOfMemoryError):
            raise
        raise _lost(rank, world_size, error) from error


@contextlib.contextmanager
def lost_within(rank: int, world_size: int) -> Iterator[None]:
    """`lost_peers` around work that gathers in its midst, and may fail for reasons of its own.

    Raises:
        PeerLost: A rank has ended.
    """
    try:
        yield
    except RuntimeError as error:
        of_network = isinstance(error, torch.distributed.DistError) or _NETWORK.search(str(error))
        if world_size == 1 or not of_network:
            raise
        raise _lost(rank, world_size, error) from error


def _lost(rank: int, world_size: int, error: RuntimeError) -> PeerLost:
    detail = first_line(error)
    return PeerLost(
        f"rank {rank} of {world_size} stopped because another rank has ended or cannot be "
        f"reached; that one's own message says why ({detail[:200]})"
    )


def _together(accelerator: Accelerator) -> contextlib.AbstractContextManager[None]:
    return lost_peers(accelerator.process_index, accelerator.num_processes)
