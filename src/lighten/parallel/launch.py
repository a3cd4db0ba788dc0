"""How this process was started: alone, or as one rank of several by whichever launcher.

torchrun, `accelerate launch`, `deepspeed` and `lighten train --processes` say it in PyTorch's own
environment variables; SLURM's `srun` and `mpirun` (Open MPI's, MPICH's, Intel's) have theirs, which
are translated here. Nothing heavy is imported: the command line asks before it loads anything.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lighten.errors import UserError
from lighten.machine.forks import TRANSLATED
from lighten.parallel.foreign import ITS_OWN, configured_in
from lighten.wording import counted

ERROR_FILE = "LIGHTEN_ERROR_FILE"
PORTS = range(20_000, 30_000)  # below those that systems give to connections
# What names a job of Open MPI's, so that two of them on one machine do not meet each other.
_MPI_JOBS = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")
# Counts of those that start a command again: `torchrun --max-restarts`, `sbatch --requeue`.
_RESTARTS = {"TORCHELASTIC_RESTART_COUNT": "torchrun", "SLURM_RESTART_COUNT": "SLURM"}
# What names a job of theirs, the same whenever it is started again.
_JOBS = {"TORCHELASTIC_RUN_ID": "torchrun", "SLURM_JOB_ID": "SLURM"}
# How `mpirun` tells of the ranks: Open MPI's, and Hydra, which is MPICH's and Intel's.
_MPI = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
     "OMPI_COMM_WORLD_LOCAL_RANK", "-x MASTER_ADDR=HOST"),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID", "-genv MASTER_ADDR HOST"),
)  # fmt: skip


# What makes a process a rank, to PyTorch, accelerate or here.
_OF_RANKS = frozenset({
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_PROCID",
    "MV2_COMM_WORLD_SIZE", TRANSLATED, ERROR_FILE, *ITS_OWN,
    *(name for names in _MPI for name in names[:4]),
})  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One process's place among those that train together.

    Attributes:
        launcher: What started them, as a user knows it.
        rank: This one's number, from 0.
        world_size: How many there are, on all machines.
        local_rank: Its number on this machine.
        local_world_size: How many there are on this machine.
        configured: What the launcher was configured for, as recipes of other tools say it.
        own_gpu: Whether it sees one GPU alone, which no other rank of this machine has.
    """

    launcher: str = "none"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    configured: Mapping[str, Any] = field(default_factory=dict)
    own_gpu: bool = False

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes files and speaks."""
        return self.rank == 0


def recognise(environment: MutableMapping[str, str] | None = None) -> Launch:
    """The place of this process; where SLURM or MPI gave it, PyTorch's own names are set too.

    Args:
        environment: The environment variables; None: this process's.

    Raises:
        UserError: The launcher asks for something that is not built, or contradicts itself.
    """
    variables = os.environ if environment is None else environment
    configured = configured_in(variables)
    launch = None
    # Scripts of SLURM jobs set WORLD_SIZE for their tasks. Where this was asked before, PyTorch's
    # names are ours.
    if "RANK" not in variables or TRANSLATED in variables:
        # Of several machines mpirun reaches the others by srun, with a task for each.
        typed = _in_shell_of_task(variables)
        launch = None if typed else _from_mpi(variables) or _from_slurm(variables)
        if not (typed or launch) and (count := _number(variables, "PMI_SIZE", 1)) > 1:
            raise UserError(
                f"PMI_SIZE is {count}, so an MPI launcher started several ranks, but "
                "MPI_LOCALRANKID does not say which device is this one's; start with torchrun"
            )
    if launch is None and ("RANK" in variables or "WORLD_SIZE" in variables):
        return replace(_from_torch(variables), configured=configured)
    if launch is None:
        return Launch()
    variables.update(
        RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size),
        LOCAL_RANK=str(launch.local_rank), LOCAL_WORLD_SIZE=str(launch.local_world_size),
        **{TRANSLATED: launch.launcher},
    )  # fmt: skip
    return launch


def alone() -> dict[str, str]:
    """The environment of a process that is no rank, though a rank may start it."""
    return {name: value for name, value in os.environ.items() if name not in _OF_RANKS}


def require_alone(what: str, command: str) -> None:
    """See to it that no launcher has started several processes, each of which would do all of it.

    Args:
        what: Is done in one process, in words.
        command: What does it.

    Raises:
        UserError: One has.
    """
    if (place := recognise()).world_size > 1:
        raise UserError(
            f"{what} runs in one process, and {place.launcher} started {place.world_size}; start "
            f"it with: {command}"
        )


def restarted_by() -> str | None:
    """What has started this command a second time, after its processes or its machine had ended."""
    return next((name for count, name in _RESTARTS.items() if _number(os.environ, count, 0)), None)


def is_elastic(place: Launch) -> bool:
    """Whether torchrun has started several ranks, and starts them again where one has ended.

    On some machines it may have started them again while its count is 0 on this one.
    """
    return place.world_size > 1 and "TORCHELASTIC_RESTART_COUNT" in os.environ


def jobs() -> dict[str, str]:
    """The job that this process belongs to, by the name of the launcher that may start it again."""
    named = {launcher: os.environ.get(variable, "") for variable, launcher in _JOBS.items()}
    if named["torchrun"] == "none":  # as it is without --rdzv-id
        named["torchrun"] = _parent()
    return {launcher: job for launcher, job in named.items() if job}


def _parent() -> str:
    import psutil

    try:
        parent = psutil.Process(os.getppid())
        return f"process {parent.pid} since {parent.create_time():.0f}"
    except psutil.Error:  # outside of this container
        return ""


def rank_count(place: Launch, *, processes: int | None, gpus: int | None) -> int:
    """How many ranks to start here; 1 trains in this process.

    GPUs are counted, which loads PyTorch, before anything is begun on them.

    Raises:
        UserError: The numbers contradict each other, or where this process stands already.
    """
    if processes is not None and gpus is not None:
        raise UserError("give --processes (on the processor) or --gpus, not both")
    name, count = ("--processes", processes) if processes is not None else ("--gpus", gpus)
    if count is None:
        return 1
    if count < 1:
        raise UserError(f"{name} is {count}; give 1 or more")
    if count > 1 and place.world_size > 1:
        raise UserError(
            f"{name} starts ranks, but this is rank {place.rank} of {place.world_size} that "
            f"{place.launcher} has started; leave {name} out"
        )
    if gpus is not None:
        from torch import cuda

        if (there := cuda.device_count()) < gpus:
            raise UserError(
                f"--gpus is {gpus}, and PyTorch sees {counted(there, 'GPU')} on this machine; "
                + (f"use --gpus {there}" if there else "use --processes N, for its processor")
            )
    return count


@contextmanager
def one_process_on(processes: int | None, gpus: int | None) -> Iterator[None]:
    """Inside, the one process that `--processes 1` or `--gpus 1` asks for computes there."""
    kind = "cpu" if processes is not None else "cuda" if gpus is not None else None
    named = os.environ.get("LIGHTEN_DEVICE")
    if kind is None or (named or "").strip().lower().startswith(kind):  # maybe which GPU, too
        yield
        return
    os.environ["LIGHTEN_DEVICE"] = kind
    try:
        yield
    finally:
        if named is None:
            del os.environ["LIGHTEN_DEVICE"]
        else:
            os.environ["LIGHTEN_DEVICE"] = named


def leave_word(error: BaseException) -> bool:
    """Leave an error's words to the process that started this rank, which tells them once.

    Returns:
        Whether there is such a process; without one this process has to tell them.
    """
    if (path := os.environ.get(ERROR_FILE)) is None:
        return False
    word = {"kind": type(error).__name__, "message": str(error)}
    try:
        Path(path).write_text(json.dumps(word), encoding="utf-8")
    except OSError:
        return False
    return True


def _from_torch(variables: MutableMapping[str, str]) -> Launch:
    if "LOCAL_SIZE" in variables:  # DeepSpeed's name for it
        variables.setdefault("LOCAL_WORLD_SIZE", variables["LOCAL_SIZE"])
    world_size = _number(variables, "WORLD_SIZE", 1)
    if world_size > 1 and "RANK" not in variables:
        raise UserError(
            f"WORLD_SIZE is {world_size} and RANK is not set, so this process does not know which "
            "rank it is; start with torchrun, or unset WORLD_SIZE"
        )
    if world_size > 1 and "LOCAL_RANK" not in variables:
        raise UserError(
            f"WORLD_SIZE is {world_size} and LOCAL_RANK is not set, so this process does not know "
            "which device is its own; start with torchrun"
        )
    rank = _number(variables, "RANK", 0)
    if not 0 <= rank < max(1, world_size):
        raise UserError(f"RANK is {rank}, but WORLD_SIZE is {world_size}; unset one or the other")
    local = _number(variables, "LOCAL_WORLD_SIZE", world_size)
    traces = {ERROR_FILE: "lighten", "ACCELERATE_MIXED_PRECISION": "accelerate launch",
              "CROSS_SIZE": "deepspeed"}  # fmt: skip
    name = next((name for trace, name in traces.items() if trace in variables), "torchrun")
    return Launch(name, rank, world_size, _number(variables, "LOCAL_RANK", 0), local)


def _from_slurm(variables: MutableMapping[str, str]) -> Launch | None:
    """A task of `srun`; a batch script or a shell within an allocation is alone."""
    world_size = _number(variables, "SLURM_STEP_NUM_TASKS", 1)
    if world_size <= 1 or "SLURM_PROCID" not in variables:
        return None
    # One number for all nodes, or `2(x3),1`: 2 tasks on three nodes, 1 on the fourth.
    counts = [
        int(tasks)
        for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?",
                                       variables.get("SLURM_STEP_TASKS_PER_NODE", ""))
        for _ in range(int(times or 1))
    ]  # fmt: skip
    node, place = _number(variables, "SLURM_NODEID", 0), _number(variables, "SLURM_LOCALID", 0)
    local = counts[node] if node < len(counts) else world_size
    visible = [name for name in variables.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    # --gpus-per-task: each task sees its own GPU alone, as the first one.
    own_gpu = len(visible) == 1 and _number(variables, "SLURM_GPUS_ON_NODE", 0) >= local > 1
    if own_gpu:
        place = 0
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_NODELIST", "")
    variables.setdefault("MASTER_ADDR", first_host(nodes))
    job = f"{variables.get('SLURM_JOB_ID', '')}.{variables.get('SLURM_STEP_ID', '')}"
    variables.setdefault("MASTER_PORT", str(_port_of(job)))
    rank = _number(variables, "SLURM_PROCID", 0)
    return Launch("srun", rank, world_size, place, local, own_gpu=own_gpu)


def _in_shell_of_task(variables: Mapping[str, str]) -> bool:
    """Whether this was typed in a shell that `srun --pty` gave to its first task alone.

    The other tasks' shells had nothing to read, and have ended. An interactive shell gives what it
    starts a process group of its own; a task, and a script that is one, are in the task's.
    """
    if "SLURM_PTY_PORT" not in variables or not hasattr(os, "getpgid"):
        return False
    try:
        return os.getpgid(_number(variables, "SLURM_TASK_PID", 0)) != os.getpgid(0)
    except OSError:  # it has ended, or is outside of this container
        return False


def _from_mpi(variables: MutableMapping[str, str]) -> Launch | None:
    for size, rank, local_size, local_rank, option in _MPI:
        world_size = _number(variables, size, 1)
        if world_size <= 1 or local_rank not in variables:  # srun gives its tasks PMI's names, too
            continue
        local = _number(variables, local_size, world_size)
        if "MASTER_ADDR" not in variables and local < world_size:
            raise UserError(
                "mpirun started ranks on several machines and MASTER_ADDR is not set; give it the "
                f"first machine's name: mpirun {option} ..."
            )
        variables.setdefault("MASTER_ADDR", "127.0.0.1")
        job = next((variables[name] for name in _MPI_JOBS if name in variables), "")
        variables.setdefault("MASTER_PORT", str(_port_of(job)))
        return Launch(
            "mpirun", _number(variables, rank, 0), world_size, _number(variables, local_rank, 0),
            local,
        )  # fmt: skip
    return None


def _port_of(job: str) -> int:
    """The port where a job's ranks meet, all of which know its name: seldom another job's."""
    return PORTS[zlib.crc32(job.encode()) % len(PORTS)]


def first_host(nodes: str) -> str:
    """The first name of a list as SLURM writes it: `gpu[03-05,9],login` begins with `gpu03`."""
    first = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    if first is None:
        return "127.0.0.1"
    return "".join(part or "" for part in first.groups())


def _number(variables: Mapping[str, str], name: str, default: int) -> int:
    value = variables.get(name, "")
    if not value:
        return default
    try:
        return int(value)
    except ValueError:
        raise UserError(f"the environment variable {name} is {value!r}, not a number") from None
