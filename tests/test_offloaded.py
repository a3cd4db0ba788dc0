"""Optimiser state and weights that wait in files: the same numbers, and less memory held."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import lighten
from lighten import api
from lighten.adapters import shards
from lighten.engine.adapter_optimizer import AdapterOptimizer
from lighten.errors import DiskFull, UserError
from lighten.machine import disk
from lighten.parallel.offloaded import adamw, stores
from lighten.parallel.offloaded.adamw import OffloadedAdamW
from lighten.parallel.offloaded.stores import MainMemory, Scratch
from lighten.planning import offloaded
from lighten.planning.storage_tracker import Block, Event, Pass, Timeline
from lighten.recipe import Recipe, RecipeError
from lighten.runs import Run
from lighten.training import checkpoints
from lighten.training import run as training_run
from tests.cut_runs import cut_short, weights
from tests.test_train_step import settings as optimizer_settings
from tests.tiny import save_tiny

PAGE = 4096


def resident_bytes(tensor: torch.Tensor) -> int:
    """How much of a mapped tensor this process holds, by the system's own account."""
    address, rss_bytes = tensor.data_ptr(), 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(number, 16) for number in match.groups())
            inside = start <= address < end
        elif inside and line.startswith("Rss:"):
            rss_bytes = int(line.split()[1]) * 1024
    return rss_bytes


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/smaps").is_file(), reason="no /proc on this system"
)


@needs_proc
def test_what_is_let_go_is_not_held_and_not_lost(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path, "nvme_path")
    first, second = scratch.zeros_like([torch.empty(300, 1000), torch.empty(50, 1000)])
    first.normal_(generator=torch.Generator().manual_seed(0))
    second.fill_(2)
    expected = first.clone()
    assert resident_bytes(first) >= first.nbytes + second.nbytes
    scratch.release([first])
    assert resident_bytes(first) < second.nbytes + 2 * PAGE
    scratch.release([second[10:30]])
    scratch.fetch([first])
    assert torch.equal(first, expected)
    stores.release_all()
    assert resident_bytes(first) == 0
    assert torch.equal(first, expected)
    assert float(second.sum()) == 2 * second.numel()
    assert not list(tmp_path.iterdir())  # nothing is left behind, however the process ends


def test_a_file_that_does_not_fit_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = Scratch(tmp_path, "nvme_path")
    with pytest.raises(DiskFull, match=r"the disk is full: .* bytes were missing"):
        scratch.zeros_like([torch.empty(2**50, device="meta")])
    monkeypatch.setattr(disk, "file_system", lambda folder: "tmpfs")
    with pytest.raises(UserError, match=r"nvme_path: .* is in memory \(tmpfs\)"):
        Scratch(tmp_path, "nvme_path")
    with pytest.raises(UserError, match="cannot write"):
        Scratch(Path("/dev/null/folder"), "nvme_path")


@pytest.mark.parametrize("piece", [adamw.PIECE_NUMBERS, 7])
def test_steps_are_those_of_pytorch(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adamw, "PIECE_NUMBERS", piece)
    draw = torch.Generator().manual_seed(0)
    shapes = [(5, 4), (3,), (2, 3, 3), (6, 5)]
    runs: list[tuple[Any, list[nn.Parameter]]] = []
    values = [torch.randn(shape, generator=draw) for shape in shapes]
    values[3] = values[3].t()  # its numbers do not follow each other
    for store in (None, MainMemory(), Scratch(tmp_path, "nvme_path")):
        parameters = [nn.Parameter(value.clone()) for value in values]
        groups = [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:]}]
        options: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.0}
        optimizer = (
            torch.optim.AdamW(groups, fused=True, **options) if store is None
            else OffloadedAdamW(groups, store, **options)
        )  # fmt: skip
        runs.append((optimizer, parameters))
    for step in range(4):
        gradients = [torch.empty_like(value).normal_(generator=draw) for value in values]
        for optimizer, parameters in runs:
            for place, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
                # One of them has no gradient in a step, and is not moved.
                parameter.grad = None if (step, place) == (1, 1) else gradient
            optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)
            optimizer.step()
    (theirs, expected), *offloaded_runs = runs
    # The last numbers of a piece are not computed in vectors, which rounds otherwise.
    assert_close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=1e-9)
    for ours, moved in offloaded_runs:
        for parameter, expected_parameter in zip(moved, expected, strict=True):
            assert_close(parameter, expected_parameter)
            for state_name, value in theirs.state[expected_parameter].items():
                assert_close(ours.state[parameter][state_name], value)


@needs_proc
def test_a_step_holds_a_few_pieces_of_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adamw, "PIECE_NUMBERS", 2**16)
    parameter = nn.Parameter(torch.zeros(2**20))
    optimizer = OffloadedAdamW([{"params": [parameter]}], Scratch(tmp_path, "nvme_path"), lr=0.1)
    moment = optimizer.state[parameter]["exp_avg"]
    resident: list[int] = []
    move = OffloadedAdamW._move

    def move_and_record(*args: Any) -> None:
        move(*args)
        resident.append(resident_bytes(moment))

    monkeypatch.setattr(OffloadedAdamW, "_move", move_and_record)
    for _ in range(2):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert len(resident) == 2 * 16
    # The system maps a few pages around one that it reads.
    assert max(resident) <= 2 * 2**18 + 2**17
    assert resident_bytes(moment) <= 2**17
    assert torch.equal(moment, torch.full_like(moment, 0.19))


def settings(root: Path, chat_file: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model_name_or_path": str(root / "base"), "dataset": str(chat_file), "dtype": "float32",
        "method": "full", "learning_rate": 1e-3, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "max_train_samples": 13, "max_steps": 4,
        "save_steps": 1, "save_total_limit": 10, "val_size": 0, "progress": False, **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, chat_file: Path) -> Path:
    """A base and its training as it is without offload."""
    root = tmp_path_factory.mktemp("offloaded")
    save_tiny(root / "base", "qwen2")  # with a tied head
    lighten.train(**settings(root, chat_file, output_dir=str(root / "plain")))
    return root


def assert_bitwise(ours: Run, theirs: Run) -> None:
    for row, expected_row in zip(ours.metrics(), theirs.metrics(), strict=True):
        assert (row["loss"], row["grad_norm"]) == (expected_row["loss"], expected_row["grad_norm"])
    expected = weights(theirs)
    assert expected
    for key, value in weights(ours).items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("offload", [
    {"offload_optimizer": "cpu"}, {"offload_optimizer": "nvme"},
])  # fmt: skip
def test_training_is_bitwise_that_without_offload(
    root: Path, tmp_path: Path, chat_file: Path, offload: dict[str, str]
) -> None:
    if "nvme" in offload.values():
        offload = {**offload, "nvme_path": str(tmp_path / "disk")}
    run = lighten.train(
        **settings(root, chat_file, output_dir=str(tmp_path / "run"), **offload)
    )  # fmt: skip
    assert_bitwise(run, Run(root / "plain"))
    choices = {choice["what"]: choice for choice in run.info()["choices"]}
    for setting, where in offload.items():
        if setting != "nvme_path":
            choice = choices[setting]
            assert choice["value"].endswith("disk" if where == "nvme" else "main memory")
            assert ("nothing moves" in choice["reason"]) == (where == "cpu")


def test_a_folder_that_cannot_be_is_told_before_the_base_is_read(
    root: Path, tmp_path: Path, chat_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("the base was read")

    monkeypatch.setattr(training_run, "load_base", read)
    with pytest.raises(UserError, match="cannot write /dev/null/folder"):
        lighten.train(**settings(
            root, chat_file, output_dir=str(tmp_path / "run"), offload_optimizer="nvme",
            nvme_path="/dev/null/folder",
        ))  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_its_state_elsewhere(
    root: Path, tmp_path: Path, chat_file: Path
) -> None:
    """From a checkpoint of a run that held it, and the other way round."""
    run = plain = Run(root / "plain")
    # Each goes on from a checkpoint that the one before wrote.
    for place, offload in enumerate(({"offload_optimizer": "nvme"}, {})):
        cut = cut_short(run, tmp_path / str(place), keep=slice(place, place + 1))
        run = lighten.train(
            resume=True, **settings(root, chat_file, output_dir=str(cut.folder), **offload)
        )  # fmt: skip
        assert_bitwise(run, plain)


def test_a_plan_knows_where_the_state_is(root: Path, chat_file: Path) -> None:
    changes = {key: value for key, value in settings(root, chat_file).items() if key != "progress"}
    plans = {where: lighten.plan(**{**changes, "offload_optimizer": where})
             for where in ("none", "cpu", "nvme")}  # fmt: skip
    part_bytes = {where: {part.name: part.bytes for part in plan.memory.parts}
                  for where, plan in plans.items()}  # fmt: skip
    assert plans["cpu"].memory.expected == plans["none"].memory.expected  # a processor's
    states = plans["none"].states
    assert states is not None
    assert plans["nvme"].states == states
    assert plans["nvme"].disk_bytes == plans["none"].disk_bytes + states.optimiser
    assert part_bytes["nvme"]["base weights"] == part_bytes["none"]["base weights"]
    assert "waits on a disk" in plans["nvme"].choices["offload_optimizer"]
    shared = {"device": "h100", "gpus": 2, "strategy": "zero1", **changes}
    alone = api.plan_spread(**shared)
    moved = api.plan_spread(**shared, offload_optimizer="cpu")
    assert moved.offload == ("optimizer",)
    assert moved.device_bytes <= alone.device_bytes + 2**21  # a block of PyTorch's allocator
    assert moved.host_bytes == states.optimiser / 2 + states.gradients


def test_a_rank_lets_go_of_what_it_reads_for_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that does not write: its rows of the moments are read from its file, file by file."""
    weight = nn.Parameter(torch.ones(3000))
    store = Scratch(tmp_path, "nvme_path")
    adapter = AdapterOptimizer("all", {"weight": weight}, optimizer_settings(), store=store)
    given_back: list[int] = []
    monkeypatch.setattr(stores, "release_all", lambda: given_back.append(1))
    monkeypatch.setattr(shards, "SHARD_BYTES", 4 * 3000)
    checkpoints.take_part(cast(Any, None), [adapter])
    assert len(given_back) == len(shards.Shards(adapter.optimizer_tensors(), "any")) >= 2


def test_a_planned_step_holds_two_pieces_of_the_state() -> None:
    weights, state = Block(100 * 2**20, "base weights"), Block(200 * 2**20, "optimiser", run=1)
    small = Block(8, "gradients", run=1)
    runs = [Pass("loading"), Pass("optimiser step"), Pass("forward", step=1),
            Pass("optimiser step", step=1)]  # fmt: skip
    events = [
        Event(weights, True, 0, -1), Event(state, True, 1, -1), Event(small, True, 1, -1),
        Event(small, False, 2, -1), Event(small, True, 3, -1),
    ]  # fmt: skip
    cut = offloaded.without_state(Timeline(events, runs))
    piece = 64 * 2**20  # two of both moments, 4 million float32 each
    assert cut.live() == [
        weights.bytes, weights.bytes + piece, weights.bytes + piece + 8, weights.bytes + 8,
        weights.bytes, weights.bytes + piece, weights.bytes + piece + 8, weights.bytes + 8,
    ]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), [
    ({"offload_optimizer": "nvme", "optim": "sgd"}, "moves AdamW's state, and optim: sgd"),
    ({"offload_optimizer": "cpu", "optim": "adamw_8bit"}, "optim: adamw_8bit"),
    ({"nvme_path": "/data"}, "nvme_path is the folder of"),
    ({"nvme_path": "/data", "offload_optimizer": "cpu"}, "nvme_path is the folder of"),
    ({"offload_params": "cpu"}, "method: lora leaves the base frozen"),
    ({"offload_params": "cpu", "method": "full"}, "strategy: auto leaves them whole"),
    ({"offload_params": "nvme", "method": "full", "strategy": "zero3"},
     "without offload_optimizer: nvme leaves twice as much"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_values({"model_name_or_path": "m", "dataset": "d", **changes})
