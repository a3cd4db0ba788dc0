"""`lighten train --processes 2`: started, heard, told and ended as one command."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import lighten
from lighten.errors import UserError
from lighten.parallel import launch, spawn
from lighten.runs import Run
from lighten.training import checkpoints
from tests import processes
from tests.processes import Forked


@pytest.fixture
def settings(tiny_folder: Path, chat_file: Path, tmp_path: Path) -> dict[str, Any]:
    """A run that ends only when it is told to."""
    return {
        "model_name_or_path": str(tiny_folder), "dataset": str(chat_file), "dtype": "float32",
        "output_dir": str(tmp_path / "run"), "lora_r": 2, "per_device_train_batch_size": 2,
        "max_steps": 100_000, "save_steps": 2, "save_total_limit": 2,
    }  # fmt: skip


def start(settings: dict[str, Any], *options: str) -> Forked:
    flags = [f"{key}={value}" for key, value in settings.items()]
    return processes.start("train", *flags, "--processes", "2", *options)


def ranks_of(launcher: Forked, metrics: Path, step: int) -> dict[int, psutil.Process]:
    """Its ranks, once they have made a step."""
    until = time.monotonic() + 240
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < until, f"step {step} never came"
        time.sleep(0.05)
    children = psutil.Process(launcher._process.pid).children()
    return {int(child.environ()["RANK"]): child for child in children if "RANK" in child.environ()}


def all_ended(ranks: dict[int, psutil.Process], seconds: float) -> bool:
    return not psutil.wait_procs(list(ranks.values()), timeout=seconds)[1]


def test_ranks_that_all_finish_say_nothing_of_their_own(capfd: pytest.CaptureFixture[str]) -> None:
    assert spawn.run(["--version"], 2, device="cpu", shown=True) is None
    assert capfd.readouterr() == ("", "")


def test_a_mistake_is_told_once_in_the_rank_s_own_words(capfd: pytest.CaptureFixture[str]) -> None:
    ended = spawn.run(["train", "nowhere.yaml"], 2, device="cpu", shown=True)
    assert ended is not None
    assert "nowhere.yaml" in ended.message
    assert not ended.resumable
    assert capfd.readouterr() == ("", "")


def test_where_the_console_tells_all_of_its_processes_nobody_is_told_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Windows, whose `Popen.send_signal` refuses SIGINT: ranks would be ended unsaved."""
    monkeypatch.setattr(spawn, "PASSES_ON", False)
    ranks = spawn._Ranks([], 1, tmp_path, device="cpu", shown=True)
    told: list[int] = []

    class Process:
        poll = staticmethod(lambda: None)
        send_signal = staticmethod(told.append)

    ranks._processes = [Process()]  # type: ignore[list-item]
    ranks._send(signal.SIGINT)
    assert told == []
    ranks._send(signal.SIGTERM)
    assert told == [signal.SIGTERM]


@pytest.mark.parametrize(("options", "message"), [
    ({"processes": 2, "gpus": 2}, "not both"),
    ({"processes": 0}, "--processes is 0; give 1 or more"),
    ({"gpus": -1}, "--gpus is -1"),
])  # fmt: skip
def test_numbers_of_ranks_that_make_no_sense(
    options: dict[str, int], message: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=message):
        lighten.train(progress=False, **options, **settings)


@pytest.mark.parametrize("more", [1, 2])
def test_gpus_that_are_not_there_are_told_before_anything_starts(
    more: int, settings: dict[str, Any]
) -> None:
    there = torch.cuda.device_count()
    with pytest.raises(UserError, match=f"--gpus is {there + more}, and PyTorch sees {there} GPU"):
        lighten.train(progress=False, gpus=there + more, **settings)


def test_one_process_computes_where_it_was_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    for named in (None, "cuda:1"):
        if named is None:
            monkeypatch.delenv("LIGHTEN_DEVICE", raising=False)
        else:
            monkeypatch.setenv("LIGHTEN_DEVICE", named)
        for on, expected in (
            ((1, None), "cpu"), ((None, 1), named or "cuda"), ((None, None), named)
        ):  # fmt: skip
            with launch.one_process_on(*on):
                assert os.environ.get("LIGHTEN_DEVICE") == expected
            assert os.environ.get("LIGHTEN_DEVICE") == named


@pytest.mark.parametrize(("changes", "processes", "message"), [
    ({"strategy": "single"}, 2, "strategy: single trains in one process, but 2 ranks"),
    ({"offload_base": "disk"}, 2, "offload_base: disk trains in one process, and 2 ranks"),
])  # fmt: skip
def test_a_recipe_for_another_number_of_ranks_is_told_before_anything_loads(
    changes: dict[str, Any], processes: int | None, message: str, settings: dict[str, Any],
) -> None:  # fmt: skip
    with pytest.raises(UserError, match=message):
        lighten.train(progress=False, processes=processes, **{**settings, **changes})
    assert not Path(settings["output_dir"]).exists()


def test_a_rank_starts_no_ranks(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="this is rank 1 of 2 that torchrun has started"):
        lighten.train(progress=False, processes=2, **settings)


def test_errors_without_a_launcher_of_ours_are_told_by_the_process_itself() -> None:
    assert launch.ERROR_FILE not in os.environ
    assert not launch.leave_word(UserError("what"))


def test_a_killed_rank_ends_the_others_with_its_name(settings: dict[str, Any]) -> None:
    launcher = start(settings)
    ranks = ranks_of(launcher, Path(settings["output_dir"]) / "metrics.jsonl", 3)
    assert sorted(ranks) == [0, 1]
    ranks[1].kill()
    began = time.monotonic()
    output = launcher.communicate(60)[0]
    assert time.monotonic() - began < 30
    assert launcher.returncode == 2
    assert f"error: rank 1 of 2 (process {ranks[1].pid}) was killed by SIGKILL" in output
    assert f"go on with: lighten train --resume {settings['output_dir']} --processes 2" in output
    assert "Traceback" not in output
    assert output.count("chat template:") == 1  # of rank 0 alone
    assert all_ended(ranks, 0)
    assert Run(settings["output_dir"]).info()["status"] == "interrupted"


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_killed_before_they_meet_ends_one_that_waits_for_it(
    killed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = tmp_path / "waited"
    program = tmp_path / "rank"
    program.write_text(
        f'#!/bin/sh\n[ "$RANK" = {killed} ] && kill -KILL $$\nsleep 25\ntouch {waited}\n'
    )
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(spawn, "SETTLE_S", 0.1)
    ended = spawn.run(["train"], 2, device="cpu", shown=False)
    assert ended is not None
    assert f"rank {killed} of 2" in ended.message
    assert "was killed by SIGKILL" in ended.message
    assert not waited.exists()


STOPPED = """#!/bin/sh
end() {
    [ "$RANK" = 0 ] || exit 143
    echo '{"kind": "KIND", "message": "the disk is full"}' > $LIGHTEN_ERROR_FILE
    exit 2
}
trap end TERM
touch READY.$RANK
while ! [ -e READY.0 -a -e READY.1 ]; do sleep 0.05; done
[ "$RANK" = 1 ] && kill -TERM $PPID
while :; do sleep 0.05; done
"""


@pytest.mark.parametrize(("kind", "message"), [
    ("DiskFull", "stopped by SIGTERM; the disk is full"),
    (spawn.LOST, "stopped by SIGTERM"),
    ("Interrupted", "the disk is full"),
])  # fmt: skip
def test_a_stop_by_which_no_state_is_saved_tells_why(
    kind: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "rank"
    program.write_text(STOPPED.replace("KIND", kind).replace("READY", str(tmp_path / "ready")))
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    ended = spawn.run(["train"], 2, device="cpu", shown=False)
    assert ended == spawn.Ended(message, signal.SIGTERM)


STOPPED_EARLY = """#!/bin/sh
trap 'exit 143' TERM
if [ "$RANK" = 0 ]; then kill -TERM $PPID; fi
for i in $(seq 200); do sleep 0.05; done
"""


def test_a_stop_while_ranks_are_started_reaches_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "rank"
    program.write_text(STOPPED_EARLY)
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    missed: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: missed.append(number))
    try:
        ended = spawn.run(["train"], 4, device="cpu", shown=False)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not missed
    assert ended == spawn.Ended("stopped by SIGTERM", signal.SIGTERM)


@pytest.mark.slow
def test_a_stop_is_passed_on_and_a_killed_launcher_leaves_no_orphan(
    settings: dict[str, Any],
) -> None:
    folder = Path(settings["output_dir"])
    launcher = start(settings)
    ranks = ranks_of(launcher, folder / "metrics.jsonl", 1)
    launcher.send_signal(signal.SIGTERM)
    output = launcher.communicate(60)[0]
    assert launcher.returncode == 128 + signal.SIGTERM
    assert output.count("stopped by SIGTERM after step") == 1
    assert f"go on with: lighten train --resume {folder} --processes 2" in output
    assert all_ended(ranks, 0)
    step = checkpoints.read_state(checkpoints.listing(folder / "checkpoints")[-1]).step
    assert step == max(line["step"] for line in Run(folder).metrics())

    launcher = start(settings, "--resume")
    ranks = ranks_of(launcher, folder / "metrics.jsonl", step + 2)
    launcher.send_signal(signal.SIGKILL)
    assert all_ended(ranks, 10)


@pytest.mark.slow
def test_the_api_trains_as_ranks(settings: dict[str, Any]) -> None:
    run = lighten.train(progress=False, processes=2, **{**settings, "max_steps": 2})
    assert run.info()["status"] == "finished"
    assert list(run.adapters()) == ["default"]
    assert {line["examples"] for line in run.metrics() if line["kind"] == "train"} == {4}
