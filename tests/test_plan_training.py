"""Training with its plan: said, refused, recorded, learnt from; a step where memory runs out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lighten
from lighten.api.recipes import plannable
from lighten.engine import memory_errors
from lighten.errors import UserError
from lighten.machine.devices import named
from lighten.parallel.launch import Launch
from lighten.planning import calibration, predict, preflight
from lighten.reporting.page import page
from lighten.reporting.text import gib
from lighten.runs import Run
from lighten.training import out_of_memory
from tests.processes import python
from tests.test_plan_trace import folder_of
from tests.tiny import tiny_model, tiny_tokenizer

GIB = 2**30


@pytest.fixture
def settings(tiny_folder: Path, chat_file: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(tiny_folder), "dataset": str(chat_file), "dtype": "float32",
        "output_dir": str(tmp_path / "run"), "max_steps": 3, "val_size": 0.2,
        "per_device_train_batch_size": 4,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def calibration_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTEN_CALIBRATION", str(tmp_path / "calibration.json"))
    monkeypatch.delenv("LIGHTEN_PLAN")


def test_every_training_is_planned_and_compared(
    settings: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    run = lighten.train(**settings)
    output = capfd.readouterr().err
    assert output.count("plan: ") == 1
    assert "predicted" in output
    plan, info = run.plan(), run.info()
    assert plan is not None
    assert plan["steps"] == 3
    pair = info["prediction"]
    assert pair["memory"]["predicted"] == plan["memory"]["expected"]
    assert pair["memory"]["measured"] == info["training"]["peak_bytes"]
    assert pair["step_seconds"]["measured"] > 0
    (stored_pair,) = calibration.pairs()
    assert stored_pair["memory"] == pair["memory"]
    assert stored_pair["device"].startswith("cpu: ")
    assert "Planned and measured" in page([run])


def test_without_a_plan_nothing_of_it_is_there(settings: dict[str, Any]) -> None:
    run = lighten.train(planned=False, progress=False, **settings)
    assert run.plan() is None
    assert "prediction" not in run.info()
    assert calibration.pairs() == []
    assert "Planned and measured" not in page([run])


def test_a_plan_changes_nothing_of_the_training(settings: dict[str, Any], tmp_path: Path) -> None:
    with_plan = lighten.train(progress=False, **settings)
    without = lighten.train(
        progress=False, planned=False, **{**settings, "output_dir": str(tmp_path / "other")}
    )
    assert [m["loss"] for m in with_plan.metrics()] == [m["loss"] for m in without.metrics()]


def test_what_surely_does_not_fit_is_refused_before_anything_is_made(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    scarce = replace(named("cpu"), memory_bytes=2**20)
    monkeypatch.setattr(preflight.devices, "named", lambda: scarce)
    with pytest.raises(UserError, match=r"does not fit; --force trains all the same") as refused:
        lighten.train(progress=False, **settings)
    assert "\n  - " in str(refused.value)
    assert not Path(settings["output_dir"]).exists()
    run = lighten.train(progress=False, force=True, **settings)
    assert run.info()["status"] == "finished"
    assert run.plan() is not None


def test_advice_to_ranks_whose_weights_are_on_a_disk_compares_like_with_like(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ranks need is told from a plan of one process with all states, and what saves is too."""
    scarce = replace(named("cpu"), memory_bytes=2**20)
    monkeypatch.setattr(preflight.devices, "named", lambda: scarce)
    monkeypatch.setattr(predict, "MOST_CHANGES_S", 600.0)
    two = Launch("lighten", world_size=2, local_world_size=2)
    monkeypatch.setattr(preflight.launch, "recognise", lambda: two)
    folder = folder_of(tmp_path, layers=8, hidden_size=512, intermediate_size=2048)
    shared: dict[str, Any] = {
        "model_name_or_path": str(folder), "method": "full", "dtype": "float32",
        "strategy": "zero3", "offload_optimizer": "nvme", "max_length": 256,
        "per_device_train_batch_size": 8,
    }  # fmt: skip
    prediction = preflight.plan_first(plannable(**shared, offload_params="nvme"), force=True)
    assert prediction is not None
    whole = predict.plan(plannable(**shared), scarce, ranks=2)
    expected = tuple(f"{one.what}: saves {gib(one.saves_bytes)}, " for one in whole.changes)
    advice = prediction.advice()
    assert any(line.startswith("gradient checkpointing: ") for line in advice)
    for line in advice:
        assert line.startswith(expected)


def test_a_plan_that_fails_is_one_line_and_the_run_goes_on(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("nothing\nof use")

    monkeypatch.setattr(predict, "plan_recipe", broken)
    run = lighten.train(**settings)
    assert run.info()["status"] == "finished"
    lines = [line for line in capfd.readouterr().err.splitlines() if "no plan" in line]
    assert len(lines) == 1
    assert run.plan() is None


def test_a_calibration_file_that_cannot_be_written_is_told_in_the_run(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIGHTEN_CALIBRATION", str(tmp_path / "file" / "calibration.json"))
    run = lighten.train(progress=False, **settings)
    assert run.info()["status"] == "finished"
    assert "not kept" in run.info()["calibration"]


def test_corrections_do_not_feed_on_themselves(settings: dict[str, Any]) -> None:
    for _ in range(4):
        run = lighten.train(progress=False, **settings)
    pairs = calibration.pairs()
    assert len(pairs) == 4
    assert len({pair["memory"]["predicted"] for pair in pairs}) == 1
    plan = run.plan()
    assert plan is not None
    assert pairs[-1]["step_seconds"]["predicted"] == pytest.approx(
        pairs[0]["step_seconds"]["predicted"], rel=0.5
    )


def test_errors_that_mean_too_little_memory_are_known() -> None:
    assert memory_errors.ran_out(MemoryError())
    assert memory_errors.ran_out(torch.OutOfMemoryError("CUDA out of memory."))
    message = ("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
               "memory: you tried to allocate 4096000 bytes. Error code 12 (Cannot allocate "
               "memory)")  # fmt: skip
    assert memory_errors.ran_out(RuntimeError(message))
    assert out_of_memory.wanted_bytes(RuntimeError(message)) == 4096000
    cuda = RuntimeError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has …")
    assert out_of_memory.wanted_bytes(cuda) == int(2.5 * GIB)
    assert not memory_errors.ran_out(RuntimeError("shape mismatch"))
    assert not memory_errors.ran_out(ValueError("out of memory"))


def test_what_a_failed_run_held_is_free_when_its_advice_is_planned() -> None:
    references: list[weakref.ref[torch.Tensor]] = []

    def step() -> None:
        tensor = torch.zeros(4)
        references.append(weakref.ref(tensor))
        raise MemoryError("no room")

    def run() -> None:
        tensor = torch.zeros(4)
        references.append(weakref.ref(tensor))
        try:
            step()
        except MemoryError as error:
            raise out_of_memory.OutOfMemory("memory ran out") from error

    with pytest.raises(out_of_memory.OutOfMemory) as caught:
        run()
    assert [reference() is None for reference in references] == [False, False]
    out_of_memory.clear_frames(caught.value)
    assert [reference() is None for reference in references] == [True, True]


# A run under a limit of address space that is set once everything is loaded, and anew where a
# broken step was let go of: whatever lies on top of the heap then keeps the address space of free
# pages below it, which are no memory any more, and oneDNN maps its kernels elsewhere.
LIMITED = """
import json, resource, sys, psutil
import lighten
from lighten.training import loop, out_of_memory
given = json.loads(sys.argv[1])
more = given.pop("more")
# Under a limit from the start, as `ulimit -v` sets it, there is no arena.
resource.setrlimit(resource.RLIMIT_AS, (2**46, resource.RLIM_INFINITY))
def limited(real, at_first):
    def call(subject):
        result = None if at_first else real(subject)
        if more is not None:
            limit = psutil.Process().memory_info().vms + more * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        return real(subject) if at_first else result
    return call
loop.Loop.run = limited(loop.Loop.run, True)
out_of_memory.clear = limited(out_of_memory.clear, False)
lighten.train(**given)
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model whose activations are large beside its weights, and long rows."""
    folder = tmp_path_factory.mktemp("wide")
    tiny_model("llama", hidden_size=128, intermediate_size=512, num_hidden_layers=4,
               max_position_embeddings=4096).save_pretrained(folder)  # fmt: skip
    tiny_tokenizer().save_pretrained(folder)
    data = folder / "long.jsonl"
    rows = [{"prompt": f"word{i} " * 300, "completion": f"the answer is {i}"} for i in range(16)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, data


def options_of(extra_mib: int | None, wide: tuple[Path, Path], out: Path) -> dict[str, Any]:
    return {"model_name_or_path": str(wide[0]), "dataset": str(wide[1]), "output_dir": str(out),
            "max_steps": 2, "per_device_train_batch_size": 8, "tokens_per_microbatch": None,
            "max_length": 4096, "dtype": "float32", "val_size": 0, "learning_rate": 1e-2,
            "torch_compile": False, "more": extra_mib}  # fmt: skip


def train_under_limit(
    extra_mib: int, wide: tuple[Path, Path], out: Path
) -> subprocess.CompletedProcess[str]:
    """In a process that begins with nothing: what others left free would be no limit's."""
    return subprocess.run(
        [sys.executable, "-c", LIMITED, json.dumps(options_of(extra_mib, wide, out))],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_where_memory_runs_out_the_step_is_made_again_with_the_same_result(
    wide: tuple[Path, Path], tmp_path: Path
) -> None:
    free = python(LIMITED, json.dumps(options_of(None, wide, tmp_path / "free")))
    assert free.returncode == 0, free.stderr
    limited = train_under_limit(500, wide, tmp_path / "short")
    assert limited.returncode == 0, limited.stderr
    retries = Run(tmp_path / "short").info()["retries"]
    assert retries
    assert retries[0]["step"] == 1
    assert retries[0]["new_tokens"] == retries[0]["tokens"] // 2
    assert "again with micro-batches of" in limited.stderr
    losses = [[m["loss"] for m in Run(tmp_path / name).metrics()] for name in ("free", "short")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    examples = [m["examples"] for m in Run(tmp_path / "short").metrics()]
    assert examples == [8, 8]


def test_where_even_one_row_is_too_much_the_run_says_what_to_change(
    wide: tuple[Path, Path], tmp_path: Path
) -> None:
    completed = train_under_limit(1, wide, tmp_path / "none")
    assert completed.returncode != 0
    info = Run(tmp_path / "none").info()
    assert info["status"] == "failed"
    assert "memory ran out" in info["error"]
    assert "cheapest ways to need less:\n  - " in info["error"]
    assert (
        "OutOfMemory" in completed.stderr.splitlines()[-1] or "memory ran out" in completed.stderr
    )
