"""Two ranks of which each is on a machine of its own kind: they train one thing alike."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import lighten
from lighten.machine import hardware
from lighten.parallel import launch, meeting, ranks
from lighten.parallel.spawn import free_port
from lighten.runs import Run
from tests import processes
from tests.cut_runs import cut_short, losses


@pytest.fixture
def settings(tiny_folder: Path, chat_file: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(tiny_folder), "dataset": str(chat_file),
        "output_dir": str(tmp_path / "run"), "lora_r": [2, 4], "per_device_train_batch_size": 2,
        "max_steps": 2, "val_size": 0,
    }  # fmt: skip


def train_on_a_processor_of_another_age(ports: str, file: str) -> None:
    """In a rank: the first one's processor has bfloat16, the other's has not."""
    older = frozenset({"avx2"})
    newer = older | {"avx512_bf16"}
    first = os.environ["RANK"] == "0"
    hardware.processor_flags = lambda: newer if first else older
    for settings, _ in processes.runs_of_rank(ports, file):
        lighten.train(progress=False, **settings)


def test_ranks_of_two_ages_compute_in_what_both_have(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    runs = [settings, {**settings, "output_dir": f"{settings['output_dir']}-whole",
                       "method": "full"}]  # fmt: skip
    del runs[1]["lora_r"]
    started = processes.start_ranks(
        train_on_a_processor_of_another_age, runs, tmp_path / "runs.json"
    )
    processes.wait_for(started)
    for run in runs:
        choices = Run(run["output_dir"]).info()["choices"]
        dtype = next(choice for choice in choices if choice["what"] == "dtype")
        assert dtype["value"] == "float32"
        assert "rank 1: the processor has no bfloat16" in dtype["reason"]


def train_with_other_numbers_of_cores(ports: str, file: str) -> None:
    """In a rank: the first one has one core, the other two."""
    for settings, _ in processes.runs_of_rank(ports, file):
        torch.set_num_threads(1 + int(os.environ["RANK"]))
        lighten.train(progress=False, **settings)


def test_ranks_with_other_numbers_of_cores_cut_steps_for_the_same_collectives(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """One's workers fill micro-batches with an adapter's rows, the other's do not."""
    settings |= {"per_device_train_batch_size": 16, "dtype": "float32"}
    started = processes.start_ranks(
        train_with_other_numbers_of_cores, [settings], tmp_path / "runs.json"
    )
    processes.wait_for(started)
    run = Run(settings["output_dir"])
    choices = {choice["what"]: choice["value"] for choice in run.info()["choices"]}
    assert (choices["workers"], choices["passes"]) == ("1", "apart")
    one = {**settings, "gradient_accumulation_steps": 2, "output_dir": str(tmp_path / "one")}
    alone = lighten.train(progress=False, **one)
    for line, expected in zip(run.metrics(), alone.metrics(), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def come_late_to_the_meeting(ports: str, file: str) -> None:
    """In a rank: the first one is there, and meets the other after all patience of collectives."""
    meeting.PATIENCE = timedelta(seconds=4)
    open_file = Path(f"{file}.open")
    for settings, _ in processes.runs_of_rank(ports, file):
        place = launch.recognise()
        while not (place.main or open_file.exists()):
            time.sleep(0.05)
        with meeting.opened(place):
            if place.main:
                open_file.touch()
                time.sleep(settings["late_s"])
                if settings["ends"]:
                    os._exit(0)
            elif settings["ends"]:
                with pytest.raises(ranks.PeerLost, match="another rank has ended"):
                    ranks.connect(place, "cpu", "recipe")
                continue
            assert ranks.connect(place, "cpu", "recipe").num_processes == 2


@pytest.mark.parametrize(("late_s", "ends"), [(6, False), (1, True)])
def test_ranks_wait_for_the_first_one_while_it_is_there(
    late_s: int, ends: bool, tmp_path: Path
) -> None:
    """It may read and encode data for hours."""
    began = time.monotonic()
    runs = [{"late_s": late_s, "ends": ends}]
    processes.wait_for(
        processes.start_ranks(come_late_to_the_meeting, runs, tmp_path / "runs.json")
    )
    assert time.monotonic() - began < 60


def test_ranks_that_some_of_torchrun_s_agents_have_started_again_go_on(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Each agent counts its own restarts; the store has the ranks of before."""
    port = free_port()
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    settings |= {"dtype": "float32", "max_steps": 4, "save_steps": 2, "lora_r": 2}
    for folder, counts in (("whole", "00"), ("cut", "01")):
        settings["output_dir"] = str(tmp_path / folder)
        words = [f"{key}={value}" for key, value in settings.items()]
        started = [
            processes.start(
                "train", *words, LIGHTEN_DEVICE="cpu", WORLD_SIZE="2", RANK=str(rank),
                LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
                TORCHELASTIC_RESTART_COUNT=count,
            )
            for rank, count in enumerate(counts)
        ]  # fmt: skip
        processes.wait_for(started)
        if folder == "whole":
            cut_short(Run(settings["output_dir"]), tmp_path / "cut")
    assert "torchrun has started this again: going on" in started[0].communicate()[0]
    assert losses(Run(tmp_path / "cut")) == losses(Run(tmp_path / "whole"))
    del store
