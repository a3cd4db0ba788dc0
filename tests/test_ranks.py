"""Several ranks over gloo: how they are recognised, agree, stop together, and go on as fewer."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import lighten
from lighten.errors import UserError
from lighten.parallel import foreign, launch
from lighten.parallel.launch import Launch
from lighten.parallel.spawn import free_port
from lighten.runs import Run
from lighten.training import checkpoints, loop
from tests import processes
from tests.cut_runs import cut_short, weights
from tests.processes import Forked
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def settings(tiny_folder: Path, chat_file: Path, tmp_path: Path) -> dict[str, Any]:
    """Thirteen rows in steps of four: the last step of an epoch has one row, none for rank 1.

    AdamW divides by a gradient's size: one of next to nothing would move by rounding alone.
    """
    return {
        "model_name_or_path": str(tiny_folder), "dataset": str(chat_file), "dtype": "float32",
        "output_dir": str(tmp_path / "run"), "lora_r": [2, 4], "lora_dropout": 0.1,
        "learning_rate": 1e-2, "per_device_train_batch_size": 2, "max_train_samples": 13,
        "eval_dataset": str(chat_file), "max_eval_samples": 5, "max_steps": 6, "save_steps": 2,
        "eval_steps": 3, "save_total_limit": 10, "adam_epsilon": 1e-6,
    }  # fmt: skip


def ranks(
    settings: dict[str, Any], *options: str, count: int = 2, folders: Sequence[Path] = (),
    of_last: Sequence[str] = (), **environment: str,
) -> list[Forked]:  # fmt: skip
    """`lighten train` as so many ranks, as torchrun starts them.

    Args:
        settings: Of the recipe.
        options: Further words.
        count: How many.
        folders: In which each is started, as on machines of their own.
        of_last: Further words of the last one.
        environment: Further variables.
    """
    flags = [f"{key}={json.dumps(value) if isinstance(value, list) else value}"
             for key, value in settings.items()]  # fmt: skip
    port = str(free_port())
    return [
        processes.start(
            "train", *flags, *options, *(of_last if rank == count - 1 else ()),
            cwd=folders[rank] if folders else None, LIGHTEN_DEVICE="cpu", WORLD_SIZE=str(count),
            RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(count),
            MASTER_ADDR="127.0.0.1", **{"MASTER_PORT": port, **environment},
        )
        for rank in range(count)
    ]  # fmt: skip


def wait_for_exit(started: list[Forked]) -> list[int]:
    return [process.wait(120) for process in started]


def assert_equal_runs(ours: Run, theirs: Run) -> None:
    """Losses and weights within what float32 rounds to when sums are split otherwise."""
    assert [(m["kind"], m["step"], m["adapter"]) for m in ours.metrics()] == [
        (m["kind"], m["step"], m["adapter"]) for m in theirs.metrics()
    ]
    for row, expected_row in zip(ours.metrics(), theirs.metrics(), strict=True):
        assert row["loss"] == pytest.approx(expected_row["loss"], rel=1e-5)
        assert row["supervised_tokens"] == expected_row["supervised_tokens"]
    expected = weights(theirs)
    for key, value in weights(ours).items():
        assert float((value - expected[key]).abs().max()) < 2e-5


def wait_for_step(run: Path, step: int) -> None:
    until = time.monotonic() + 90
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert time.monotonic() < until, f"step {step} never came"
        time.sleep(0.01)


def test_traps_3_38_41_two_ranks_end_and_go_on_as_one_process(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    single = {**settings, "gradient_accumulation_steps": 2, "output_dir": str(tmp_path / "one")}
    one_run = lighten.train(progress=False, **single)
    assert wait_for_exit(ranks(settings)) == [0, 0]
    two_ranks = Run(settings["output_dir"])
    assert_equal_runs(two_ranks, one_run)

    # Its beginning goes on as one process: the steps are those it began with, also where it was
    # killed before its first checkpoint.
    for count in (1, 0):
        cut = cut_short(two_ranks, tmp_path / f"alone-{count}", keep=slice(count))
        lighten.train(progress=False, resume=True, **{**settings, "output_dir": str(cut.folder)})
        assert_equal_runs(cut, one_run)


@pytest.fixture
def machines(tmp_path: Path) -> tuple[Path, Path]:
    """Folders that are not each other's, as the disks of two machines."""
    folders = tmp_path / "first", tmp_path / "second"
    for folder in folders:
        folder.mkdir()
    return folders


def test_only_a_run_that_goes_on_has_to_be_seen_by_all_ranks(
    settings: dict[str, Any], machines: tuple[Path, Path]
) -> None:
    settings |= {"output_dir": "run", "max_steps": 2, "eval_steps": 2, "save_steps": 1}
    started = ranks(settings, folders=machines)
    assert wait_for_exit(started) == [0, 0], [process.communicate() for process in started]
    assert not list(machines[1].iterdir())
    # Where nothing is left to train, the rank that sees it tells the other one.
    started = ranks(settings, "--resume", folders=machines)
    assert wait_for_exit(started) == [0, 0], [process.communicate() for process in started]
    said = [process.communicate()[0].count("nothing is left to train") for process in started]
    assert said == [1, 0]
    assert not list(machines[1].iterdir())
    cut_short(Run(machines[0] / "run"), machines[0] / "cut", keep=slice(1))
    started = ranks({**settings, "output_dir": "cut"}, "--resume", folders=machines)
    assert wait_for_exit(started) == [2, 2]
    checkpoint = machines[1] / "cut" / "checkpoints" / "checkpoint-1"
    assert f"error: rank 1 does not see {checkpoint}, from which" in started[1].communicate()[0]


def test_a_best_state_that_a_rank_cannot_read_is_told_before_the_first_step(
    settings: dict[str, Any], machines: tuple[Path, Path]
) -> None:
    del settings["lora_r"], settings["lora_dropout"]
    settings |= {"output_dir": "run", "method": "full", "strategy": "fsdp", "max_steps": 2,
                 "load_best_model_at_end": True, "eval_steps": 2, "save_steps": 2}  # fmt: skip
    started = ranks(settings, folders=machines)
    assert wait_for_exit(started) == [2, 2]
    for process, folder in zip(started, machines, strict=True):
        said = process.communicate()[0]
        assert f"and rank 1 does not see {folder / 'run'}; put the run's folder where" in said
        assert not (folder / "run").exists()


def test_a_port_that_another_program_has_is_told_so(settings: dict[str, Any]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        first, *others = ranks(settings, MASTER_PORT=port)
        for other in others:  # it waits for an answer of that program's
            other.send_signal(signal.SIGKILL)
        assert first.wait() == 2
    said = first.communicate()[0]
    assert f"error: port {port} of this machine, where rank 0 waits for the others" in said
    assert "another rank has ended" not in said


def test_ranks_with_other_data_are_told_so(
    settings: dict[str, Any], machines: tuple[Path, Path], chat_file: Path
) -> None:
    """A row less on one machine would be another number of steps."""
    rows = chat_file.read_text().splitlines(keepends=True)
    for place, folder in enumerate(machines):
        (folder / "rows.jsonl").write_text("".join(rows[place:]))
    del settings["max_train_samples"]
    started = ranks({**settings, "dataset": "rows.jsonl"}, folders=machines)
    assert wait_for_exit(started) == [2, 2]
    for process in started:
        said = process.communicate()[0]
        assert "error: the dataset rows.jsonl is another one on rank 1 than on rank 0" in said
    assert not Path(settings["output_dir"]).exists()


def test_ranks_of_which_one_is_to_go_on_are_told_so(settings: dict[str, Any]) -> None:
    started = ranks(settings, of_last=("--resume",))
    assert wait_for_exit(started) == [2, 2]
    assert "rank 1 was started with another recipe" in started[0].communicate()[0]


def train_until_the_disk_is_full(ports: str, file: str) -> None:
    """In a rank: after its first step the first one writes no large file; its end is noted."""
    step, unlimited = loop.train_step, (resource.RLIM_INFINITY,) * 2

    def limited_step(*args: Any, **options: Any) -> Any:
        if os.environ["RANK"] == "0":
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
        return step(*args, **options)

    loop.train_step = limited_step
    for settings, noted in processes.runs_of_rank(ports, file):
        try:
            lighten.train(progress=False, **settings)
        except UserError as error:
            noted |= {"kind": type(error).__name__, "message": str(error)}
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


def train_one_after_another(ports: str, file: str) -> None:
    """In a rank, as a script's loop over settings does that torchrun has started."""
    os.environ["MASTER_PORT"] = ports.partition(",")[0]
    for settings in json.loads(Path(file).read_text()):
        lighten.train(progress=False, **settings)


def test_a_script_of_ranks_may_train_several_times(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings |= {"max_steps": 2, "eval_steps": 2}
    runs = [
        {**settings, "strategy": strategy, "output_dir": str(tmp_path / strategy)}
        for strategy in ("ddp", "zero3")
    ]
    started = processes.start_ranks(train_one_after_another, runs, tmp_path / "runs.json")
    processes.wait_for(started)
    assert_equal_runs(*(Run(run["output_dir"]) for run in runs))


def test_ranks_that_torchrun_starts_again_do_not_find_those_that_have_ended(
    settings: dict[str, Any],
) -> None:
    """Its store is there all the time, with the addresses of the ranks before."""
    port = free_port()
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    of_agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(port)}
    settings |= {"max_steps": 2, "eval_steps": 2}
    for count in ("0", "1"):
        place = {**settings, "output_dir": f"{settings['output_dir']}-{count}"}
        started = ranks(place, TORCHELASTIC_RESTART_COUNT=count, **of_agent)
        assert wait_for_exit(started) == [0, 0], [process.communicate() for process in started]
    del store


@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_a_rank_that_hands_its_rows_to_a_full_disk_is_told(
    strategy: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    del settings["lora_r"], settings["lora_dropout"]
    settings |= {"method": "full", "max_steps": 2, "save_steps": 1, "strategy": strategy}
    file = tmp_path / "runs.json"
    processes.wait_for(processes.start_ranks(train_until_the_disk_is_full, [settings], file))
    main, other = processes.notes_of(file, 0)
    assert (main["kind"], other["kind"]) == ("DiskFull", "PeerLost"), (main, other)
    assert "go on with: lighten train --resume" in main["message"]


@pytest.mark.parametrize("variable", list(foreign.UNBUILT))
def test_what_accelerate_would_ignore_is_refused(
    variable: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=f"asks for {foreign.UNBUILT[variable]}"):
        lighten.train(progress=False, **settings)
    assert not Path(settings["output_dir"]).exists()
    monkeypatch.setenv(variable, "false")
    assert launch.recognise() == Launch()


@pytest.mark.parametrize(("engine", "strategy"), [
    ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "zero2"),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp"),
])  # fmt: skip
def test_what_accelerate_was_configured_for_is_done_by_our_strategy(
    engine: dict[str, str], strategy: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """accelerate opens neither engine, and each rank reads the base."""
    settings |= {"max_steps": 2, "eval_steps": 2}
    one = {**settings, "gradient_accumulation_steps": 2, "output_dir": str(tmp_path / "one")}
    one_run = lighten.train(progress=False, **one)
    started = ranks(settings, ACCELERATE_MIXED_PRECISION="fp16", **engine)
    assert wait_for_exit(started) == [0, 0], [process.communicate() for process in started]
    run = Run(settings["output_dir"])
    assert strategy in [choice["value"] for choice in run.info()["choices"]]
    assert_equal_runs(run, one_run)


def test_a_launcher_is_recognised_by_its_environment() -> None:
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert launch.recognise(dict(torchrun)) == Launch("torchrun", 5, 8, 1, 4)
    accelerate = {**torchrun, "ACCELERATE_MIXED_PRECISION": "no"}
    assert launch.recognise(accelerate).launcher == "accelerate launch"
    deepspeed = {**torchrun, "LOCAL_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2"}
    del deepspeed["LOCAL_WORLD_SIZE"]
    assert launch.recognise(deepspeed) == Launch("deepspeed", 5, 8, 1, 4)
    srun = {
        "SLURM_PROCID": "4", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "0",
        "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_JOB_ID": "77",
        "SLURM_STEP_NODELIST": "gpu[03-05,9].cluster", "SLURM_NTASKS": "7",
    }  # fmt: skip
    assert launch.recognise(srun) == Launch("srun", 4, 7, 0, 2)
    assert (srun["RANK"], srun["WORLD_SIZE"], srun["MASTER_ADDR"]) == ("4", "7", "gpu03.cluster")
    assert launch.recognise(srun) == Launch("srun", 4, 7, 0, 2)  # what it wrote is read alike
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        del srun[name]
    assert launch.recognise(srun) == Launch("srun", 4, 7, 0, 2)  # its script may set WORLD_SIZE
    ports = []
    for job, step in (("77", "1"), ("78", "0"), ("78", "0")):
        of_job = {name: value for name, value in srun.items() if name != "MASTER_PORT"}
        of_job |= {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step}
        launch.recognise(of_job)
        ports.append(of_job["MASTER_PORT"])
    assert ports[0] != ports[1] == ports[2]  # two jobs on one node
    one_gpu_each = {"SLURM_LOCALID": "1", "SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "0"}
    del srun["RANK"]
    seen_alone = srun | one_gpu_each
    for _ in range(2):
        assert launch.recognise(seen_alone) == Launch("srun", 4, 7, 0, 2, own_gpu=True)
    shared = one_gpu_each | {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert launch.recognise(srun | shared) == Launch("srun", 4, 7, 1, 2)
    mpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1",
           "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip
    assert launch.recognise(mpi) == Launch("mpirun", 1, 2, 1, 2)
    for name in ("RANK", "MASTER_PORT"):
        del mpi[name]
    ports = []
    for rank, job in (("0", "prterun-1"), ("1", "prterun-1"), ("0", "prterun-2")):
        variables = mpi | {"OMPI_COMM_WORLD_RANK": rank, "PMIX_NAMESPACE": job}
        launch.recognise(variables)
        ports.append(variables["MASTER_PORT"])
    assert ports[0] == ports[1] != ports[2]  # two jobs of one machine
    hydra = {"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2",
             "MASTER_ADDR": "node1"}  # fmt: skip
    assert launch.recognise(dict(hydra)) == Launch("mpirun", 3, 4, 1, 2)
    # mpirun reaches other nodes of a SLURM job by a step of one task each; srun has PMI's names.
    of_nodes = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3", "SLURM_LOCALID": "0"}
    assert launch.recognise(hydra | of_nodes) == Launch("mpirun", 3, 4, 1, 2)
    by_pmi = {"PMI_SIZE": "7", "PMI_RANK": "4"}
    assert launch.recognise(srun | by_pmi) == Launch("srun", 4, 7, 0, 2)
    # The script of a batch job that has many tasks is one process.
    assert launch.recognise({"SLURM_PROCID": "0", "SLURM_NTASKS": "7"}) == Launch()


def test_what_is_typed_in_the_shell_of_a_slurm_task_is_alone() -> None:
    """`srun --ntasks 4 --pty bash` gives the first task a terminal, and the others nothing."""
    task = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0",
            "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_JOB_ID": "77",
            "SLURM_STEP_NODELIST": "gpu03", "PMI_SIZE": "4", "PMI_RANK": "0",
            "SLURM_PTY_PORT": "34889"}  # fmt: skip
    # An interactive shell's jobs have process groups of their own: seen from one, the shell has.
    with subprocess.Popen(["sleep", "60"], process_group=0) as shell:
        assert launch.recognise({**task, "SLURM_TASK_PID": str(shell.pid)}) == Launch()
        shell.kill()
    # Tasks themselves, of `srun --pty python -m lighten` or of one typed in that shell.
    is_task = {**task, "SLURM_TASK_PID": str(os.getpid())}
    assert launch.recognise(is_task) == Launch("srun", 0, 4, 0, 4)
    elsewhere = {**task, "SLURM_TASK_PID": str(2**22 + 1)}  # outside of this container
    assert launch.recognise(elsewhere) == Launch("srun", 0, 4, 0, 4)


def test_a_launcher_may_say_the_local_rank_as_an_option(tmp_path: Path) -> None:
    """As `deepspeed --module lighten ...` does, before all else."""
    plain, launched = (processes.call(*words, "runs", "list", cwd=tmp_path)
                       for words in ((), ("--local_rank=1",)))  # fmt: skip
    assert (launched.returncode, launched.stdout) == (plain.returncode, plain.stdout)


@pytest.mark.parametrize(("variables", "message"), [
    ({"WORLD_SIZE": "2"}, "RANK is not set"),
    ({"WORLD_SIZE": "2", "RANK": "1"}, "LOCAL_RANK is not set"),
    ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "RANK is 2, but WORLD_SIZE is 2"),
    ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE is 'two', not a number"),
    ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
      "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, "mpirun -x MASTER_ADDR=HOST"),
    ({"PMI_SIZE": "4", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "0"},
     "mpirun -genv MASTER_ADDR HOST"),
    ({"PMI_SIZE": "4", "PMI_RANK": "1"}, "PMI_SIZE is 4, .* start with torchrun"),
])  # fmt: skip
def test_a_launcher_that_contradicts_itself_is_told_so(
    variables: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        launch.recognise(variables)


@pytest.mark.parametrize(("nodes", "first"), [
    ("node1", "node1"), ("a-[07,09-12]", "a-07"), ("x[1-3]y,z", "x1y"), ("p,q", "p"),
    ("", "127.0.0.1"),
])  # fmt: skip
def test_the_first_host_of_a_slurm_list(nodes: str, first: str) -> None:
    assert launch.first_host(nodes) == first


COUNTED = """
import sys, psutil, torch
psutil.cpu_count = lambda logical=True: 64  # the host's
from lighten.parallel import launch, ranks
torch.set_num_threads(3)
ranks.connect(launch.recognise(), "cpu", "recipe")
print("threads", torch.get_num_threads())
"""


def test_ranks_keep_their_share_of_the_processors() -> None:
    """accelerate would give each its share of the host's."""
    port = str(free_port())
    places = [
        {**os.environ, "PMI_SIZE": "2", "PMI_RANK": rank, "MPI_LOCALRANKID": rank,
         "MPI_LOCALNRANKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in "01"
    ]  # fmt: skip
    for place in places:
        place.pop("OMP_NUM_THREADS")
    started = [
        subprocess.Popen([sys.executable, "-c", COUNTED], env=place, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for place in places
    ]  # fmt: skip
    for process in started:
        out, err = process.communicate(timeout=120)
        assert "threads 3" in out, err


def test_what_several_ranks_would_each_do_is_refused(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="a sweep runs in one process, and torchrun started 2"):
        lighten.sweep(progress=False, **settings)
    assert not Path(settings["output_dir"]).exists()
    for verb, what in (("evaluate", "an evaluation"), ("quantize", "quantising")):
        refused = processes.call(verb, settings["model_name_or_path"])
        assert refused.returncode == 2
        assert f"error: {what} runs in one process, and torchrun started 2" in refused.stderr


def test_a_rank_that_believes_it_is_alone_is_refused(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lighten.train(progress=False, **{**settings, "max_steps": 1, "eval_dataset": None})
    # A notebook that has trained alone has met nobody, whatever its environment says later.
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    settings["output_dir"] += "-again"
    with pytest.raises(UserError, match="started 2 ranks, but rank 0 sees 1"):
        lighten.train(progress=False, **settings)


def test_a_signal_to_any_rank_saves_and_ends_all_and_a_lost_one_is_told(
    settings: dict[str, Any],
) -> None:
    settings |= {"max_steps": 100_000, "save_steps": 100_000, "eval_steps": 100_000}
    started = ranks(settings)
    wait_for_step(Path(settings["output_dir"]), 3)
    run = Run(settings["output_dir"])
    started[1].send_signal(signal.SIGTERM)
    assert wait_for_exit(started) == [128 + signal.SIGTERM] * 2
    step = checkpoints.read_state(checkpoints.listing(run.folder / "checkpoints")[-1]).step
    assert step == max(line["step"] for line in run.metrics())
    assert run.info()["status"] == "interrupted"

    started = ranks(settings, "--resume")
    wait_for_step(run.folder, step + 2)
    started[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    assert wait_for_exit(started) == [2, -signal.SIGKILL]
    assert time.monotonic() - began < 30
    assert run.info()["status"] == "interrupted"
    assert "rank 0 of 2 stopped because another rank has ended" in run.info()["error"]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="smaps are Linux's")
def test_ranks_on_one_machine_keep_one_copy_of_a_frozen_base(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    base = tmp_path / "larger"
    model = tiny_model("llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=8,
                       num_attention_heads=8, num_key_value_heads=8)  # fmt: skip
    model.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    size = (base / "model.safetensors").stat().st_size
    assert size > 100 * 2**20
    settings |= {"model_name_or_path": str(base), "max_steps": 100_000, "eval_steps": 100_000}
    started = ranks(settings)
    try:
        wait_for_step(Path(settings["output_dir"]), 3)
        maps = [psutil.Process(process._process.pid).memory_maps() for process in started]
    finally:
        for process in started:
            process.send_signal(signal.SIGKILL)
        wait_for_exit(started)
    mapped = [
        mapping
        for rank_maps in maps
        for mapping in rank_maps
        if mapping.path.endswith("model.safetensors")
    ]
    assert len(mapped) == len(started), [mapping.path for mapping in maps[0] if mapping.rss > 2**20]
    assert 0.5 * size < sum(mapping.pss for mapping in mapped) <= 1.1 * size
    assert all(mapping.anonymous == 0 for mapping in mapped)  # nobody wrote to a page of it
