"""Faults of daily use: threads that stay, folders left behind, files read twice, other systems."""

from __future__ import annotations

import gc
import json
import mmap
import os
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lighten import models
from lighten.evaluation import metrics
from lighten.evaluation.bootstrap import Resamples
from lighten.machine import hardware
from lighten.models import links
from lighten.training import checkpoints


def samplers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if "_sample" in thread.name}


def test_a_measurements_thread_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_reset_high_water", lambda: False)  # as off Linux
    before = samplers()
    peaks = [hardware.PeakMemory() for _ in range(3)]
    assert len(samplers() - before) == 3
    # Of the system, not of the heap, which may have room for it that is resident already.
    block = mmap.mmap(-1, 64 * 2**20)
    block.write(b"1" * len(block))
    time.sleep(0.1)
    assert all(peak.read()["peak_bytes"] > 60 * 2**20 for peak in peaks)
    del peaks, block
    gc.collect()
    deadline = time.monotonic() + 10
    while samplers() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert samplers() == before


ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd {}\nCPU implementer\t: 0x41\n"


@pytest.mark.parametrize(
    ("features", "dtype", "int8"),
    [("asimddp bf16 i8mm", "bfloat16", "yes"), ("asimddp asimdhp", "float32", "yes"),
     ("", "float32", "emulated, slow")],
)  # fmt: skip
def test_arm_linux_names_its_instruction_sets_features(
    features: str, dtype: str, int8: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_args, **_kwargs: ARM.format(features))
    assert hardware.processor_flags() == {"fp", "asimd", *features.split()}
    assert hardware.choose_dtype("auto", "cpu").value == dtype
    assert hardware.formats("cpu")["int8"] == int8


def test_a_load_reads_no_file_for_its_checksum_until_somebody_asks(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    load = sys.modules["lighten.models.load"]
    real = load.checksum

    def noting(files: Any) -> str | None:
        hashed.extend(files)
        return real(files)

    monkeypatch.setattr(load, "checksum", noting)
    base = models.load(str(tiny_folder))
    assert hashed == []
    assert base.checksum == base.checksum == real(sorted(tiny_folder.glob("*.safetensors")))
    assert [path.name for path in hashed] == ["model.safetensors"]


def test_intervals_over_many_examples_hold_little_memory() -> None:
    examples, samples = 100_000, 100
    generator = np.random.default_rng(1)
    statistics = np.stack([generator.random(examples), np.full(examples, 3.0)], 1)
    tracemalloc.start()
    resamples = Resamples(examples, samples, seed=5)
    summed = resamples.sums(statistics)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * 2**26  # 160 MB were held before: two numbers of eight bytes each
    # The draws are those of one call, as intervals of earlier versions were made.
    draws = np.random.default_rng(5).integers(0, examples, (3, examples))
    for row, sums in zip(draws, summed, strict=False):
        assert sums == pytest.approx(statistics[row].sum(0), rel=1e-9)


@pytest.mark.parametrize("examples", [1, 2, 300])
def test_intervals_over_few_examples_are_as_they_were(examples: int) -> None:
    statistics = np.random.default_rng(2).integers(1, 9, (examples, 2)).astype(float)
    draws = np.random.default_rng(0).integers(0, examples, (50, examples))
    expected = np.stack([statistics[row].sum(0) for row in draws])
    resamples = Resamples(examples, 50)
    assert resamples.sums(statistics) == pytest.approx(expected)
    estimate = resamples.estimate(statistics, metrics.mean_loss)
    assert estimate.low is None if examples == 1 else estimate.low is not None


def test_what_a_killed_run_left_half_written_goes_with_the_next_save(
    tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    import lighten

    settings = {
        "model_name_or_path": str(tiny_folder), "dataset": str(chat_file), "lora_r": 2,
        "output_dir": str(tmp_path / "run"), "max_steps": 2, "save_steps": 1, "val_size": 0,
    }  # fmt: skip
    run = lighten.train(progress=False, **settings)
    checkpoint_folder = run.folder / "checkpoints"
    for step in (1, 7):
        (checkpoint_folder / f".checkpoint-{step}.partial" / "adapters").mkdir(parents=True)
    (checkpoint_folder / "checkpoint-2" / checkpoints.STATE).unlink()  # killed before it was whole
    run.update(status="running")
    lighten.train(progress=False, resume=True, **settings)
    assert sorted(path.name for path in checkpoint_folder.iterdir()) == [
        "checkpoint-1",
        "checkpoint-2",
    ]


@pytest.mark.parametrize("second_names", [True, False])
def test_a_system_without_symbolic_links_shows_files_too(
    second_names: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    if not second_names:
        monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "from" / "inner").mkdir(parents=True)
    (tmp_path / "from" / "inner" / "file").write_text("text")
    (tmp_path / "to").mkdir()
    links.show(tmp_path / "from" / "inner", tmp_path / "to" / "inner")
    links.show(tmp_path / "from" / "inner" / "file", tmp_path / "to" / "file")
    assert (tmp_path / "to" / "inner" / "file").read_text() == "text"
    assert (tmp_path / "to" / "file").read_text() == "text"
    assert (tmp_path / "to" / "file").samefile(tmp_path / "from" / "inner" / "file") == second_names


def test_a_model_beside_an_adapter_loads_without_symbolic_links(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    folder = tmp_path / "both"
    shutil.copytree(tiny_folder, folder)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    assert models.load(str(folder)).checksum == models.load(str(tiny_folder)).checksum
