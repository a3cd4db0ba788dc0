"""Weights that wait outside of a GPU's memory, or on a disk: one process, and what a plan says.

Two ranks train so in test_strategies. Without a GPU all of it runs but the copies to one: a mesh of
GPUs can be had anywhere, and whatever would be moved there fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import lighten
from lighten import api
from lighten.adapters import dtensors
from lighten.engine import step as train_step_module
from lighten.engine.adapter_optimizer import AdapterOptimizer
from lighten.engine.scaling import LossScaler
from lighten.parallel import ranks
from lighten.parallel.offloaded.stores import MainMemory, Scratch, Store
from lighten.planning.distributed import GATHERED_LAYERS
from lighten.planning.trace import plan_recipe
from lighten.runs import Run
from lighten.training.out_of_memory import OutOfMemory
from tests.cut_runs import assert_equal, cut_short, weights
from tests.test_plan_trace import Card, folder_of, recipe_of
from tests.test_train_step import settings as optimizer_settings
from tests.tiny import save_tiny

MOVED: dict[str, dict[str, str]] = {
    "memory": {"offload_params": "cpu"},
    "memory, said of both": {"offload_params": "cpu", "offload_optimizer": "cpu"},
    "state in a file": {"offload_params": "cpu", "offload_optimizer": "nvme"},
    "file": {"offload_params": "nvme", "offload_optimizer": "nvme"},
}


@pytest.fixture
def gpus() -> Iterator[DeviceMesh]:
    """Ranks on GPUs, of which this is the only one."""
    ranks._meet_oneself()
    yield DeviceMesh("cuda", [0])
    distributed.destroy_process_group()


def adapters_of(
    values: dict[str, torch.Tensor], mesh: DeviceMesh, store: Store | None, optim: str
) -> tuple[AdapterOptimizer, AdapterOptimizer]:
    """One whose weights lie in main memory beside the mesh, and one of plain tensors."""
    chosen = optimizer_settings(optim=optim, weight_decay=0.1, max_grad_norm=0.5)
    beside = {key: nn.Parameter(dtensors.spread(value.clone(), value, mesh))
              for key, value in values.items()}  # fmt: skip
    plain = {key: nn.Parameter(value.clone()) for key, value in values.items()}
    return (
        AdapterOptimizer("beside", beside, chosen, store=store),
        AdapterOptimizer("plain", plain, chosen),
    )


@pytest.mark.parametrize(("optim", "where"), [
    ("adamw_torch", None), ("adamw_torch", "cpu"), ("adamw_torch", "nvme"), ("sgd", None),
])  # fmt: skip
def test_what_waits_in_main_memory_is_moved_and_saved_there(
    optim: str, where: str | None, gpus: DeviceMesh, tmp_path: Path
) -> None:
    draw = torch.Generator().manual_seed(0)
    values = {"a": torch.randn(5, 4, generator=draw), "b": torch.randn(3, generator=draw)}
    store = {None: None, "cpu": MainMemory(), "nvme": Scratch(tmp_path, "nvme_path")}[where]
    beside, plain = adapters_of(values, gpus, store, optim)
    scaler = LossScaler()
    saved: dict[str, torch.Tensor] = {}
    for step in range(3):
        for key, value in values.items():
            gradient = 2.0**16 * torch.empty_like(value).normal_(generator=draw)
            plain.parameters[key].grad = None if (step, key) == (0, "b") else gradient.clone()
            spread_gradient = dtensors.spread(gradient, value, gpus)
            beside.parameters[key].grad = None if (step, key) == (0, "b") else spread_gradient
        for adapter in (beside, plain):
            scaler.unscale(adapter)
        assert beside.gradient_norm() == pytest.approx(plain.gradient_norm(), rel=1e-6)
        for adapter in (beside, plain):
            adapter.optimizer.step()
        assert beside.is_finite()
        for key, parameter in beside.parameters.items():
            assert isinstance(parameter, DTensor)
            assert parameter.device.type == "cpu"
            whole = dtensors.full_tensor(parameter.detach().to(torch.float64))
            torch.testing.assert_close(whole.float(), plain.parameters[key].detach())
        for name, value in beside.optimizer_tensors().items():
            assert value.device.type == "cpu"
            saved[name] = dtensors.full_tensor(value).clone()
    again, _ = adapters_of(values, gpus, store, optim)
    again.restore_optimizer(dict(saved))
    restored = again.optimizer_tensors()
    assert restored.keys() == saved.keys()
    for name, value in restored.items():
        assert value.device.type == "cpu"
        assert torch.equal(dtensors.full_tensor(value), saved[name])


def settings(root: Path, chat_file: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model_name_or_path": str(root / "base"), "dataset": str(chat_file), "dtype": "float32",
        "method": "full", "learning_rate": 1e-3, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "max_train_samples": 13, "max_steps": 4,
        "save_steps": 1, "save_total_limit": 10, "eval_dataset": str(chat_file),
        "max_eval_samples": 5, "eval_steps": 2, "progress": False, **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, chat_file: Path) -> Path:
    """A base with a tied head, and its training with all of it on the device."""
    root = tmp_path_factory.mktemp("offloaded-weights")
    save_tiny(root / "base", "qwen2")
    lighten.train(**settings(root, chat_file, output_dir=str(root / "plain")))
    return root


@pytest.mark.parametrize("place", MOVED)
def test_one_process_trains_weights_that_wait_elsewhere(
    place: str, root: Path, tmp_path: Path, chat_file: Path
) -> None:
    """From its start, and on from the checkpoint of a run that had them on its device."""
    plain = Run(root / "plain")
    moved = {"strategy": "zero3", **MOVED[place]}
    run = lighten.train(**settings(root, chat_file, output_dir=str(tmp_path / "run"), **moved))
    assert_equal(run, plain)
    assert not distributed.is_initialized()
    choices = {choice["what"]: choice for choice in run.info()["choices"]}
    where = "a file" if place == "file" else "main memory"
    assert choices["strategy"]["reason"].endswith(f"layers brought once per pass from {where}")
    assert choices["strategy"]["reason"].startswith("one process, ")
    assert ("nothing moves" in choices["offload_params"]["reason"]) == (where == "main memory")
    cut = cut_short(plain, tmp_path / "cut")
    again = settings(root, chat_file, output_dir=str(cut.folder), **moved)
    assert_equal(lighten.train(resume=True, **again), plain)


def test_memory_that_runs_out_while_a_layer_is_there_ends_the_run(
    root: Path, tmp_path: Path, chat_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step cannot be made again: PyTorch's part of the broken one has not ended."""

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(train_step_module, "learn", fail)
    moved = {"strategy": "zero3", "offload_params": "cpu"}
    with pytest.raises(OutOfMemory, match="ran out in step 1, while a layer's weights"):
        lighten.train(**settings(root, chat_file, output_dir=str(tmp_path / "run"), **moved))


def test_a_plan_counts_what_a_gpu_holds_of_weights_in_main_memory(tmp_path: Path) -> None:
    layers, width = 8, 512
    folder = folder_of(tmp_path, layers=layers, hidden_size=width, intermediate_size=2048)
    card = Card(2**33)
    card.host_link = 1e9

    def plan(**changes: Any) -> Any:
        batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
        return plan_recipe(recipe_of(folder, method="full", **batch, **changes), card,
                           rows_tokens=(6, 32))  # fmt: skip

    whole = plan()
    moved = plan(strategy="zero3", offload_params="cpu")
    states = whole.states
    assert moved.states == states
    part_bytes = {part.name: part.bytes for part in moved.memory.parts}
    in_layers = states.trained - states.outside
    gathered = GATHERED_LAYERS / layers * in_layers + states.outside
    # Of gradients as many are on their way.
    assert part_bytes["base weights"] == pytest.approx(2 * gathered + states.frozen, abs=2)
    assert part_bytes.get("gradients", 0) == 0
    assert part_bytes.get("optimiser", 0) == 0
    assert moved.memory.expected < 0.6 * whole.memory.expected
    # Pinned memory comes in powers of two; the numbers of these layers are powers of two but for
    # the embedding's and the head's.
    beside = moved.host_bytes - whole.host_bytes - states.optimiser
    assert 1 <= beside / (states.trained + states.gradients) < 1.2
    # Weights come twice for each micro-batch, and their gradients go.
    micro_batches = moved.shape.micro_batches
    assert micro_batches == 3
    longer_s = micro_batches * (2 * states.trained + states.gradients) / card.host_link
    assert moved.time.seconds == pytest.approx(whole.time.seconds + longer_s)
    assert whole.time.whole
    assert not moved.time.whole, "the optimiser's own time is not known"
    assert "the optimiser runs on the processor" in moved.choices["offload_params"]
    on_disk = plan(strategy="zero3", offload_params="nvme", offload_optimizer="nvme")
    assert on_disk.memory.expected == moved.memory.expected
    assert on_disk.disk_bytes == whole.disk_bytes + states.trained + states.optimiser
    assert on_disk.host_bytes == whole.host_bytes + states.gradients
    assert not on_disk.time.whole


def test_ranks_on_gpus_hold_what_is_gathered_alone(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, layers=8, hidden_size=512, intermediate_size=2048)
    shared: dict[str, Any] = {
        "model_name_or_path": str(folder), "dataset": __file__, "method": "full", "device": "h100",
        "gpus": 4, "max_length": 64, "val_size": 0,
    }  # fmt: skip
    alone = api.plan_spread(**shared, strategy="zero3")
    moved = api.plan_spread(**shared, strategy="zero3", offload_params="cpu")
    assert moved.offload == ("optimizer", "param")
    assert moved.host_bytes == pytest.approx(alone.states.total / 4, rel=0.01)
    assert moved.device_bytes < alone.device_bytes


@pytest.mark.gpu
@pytest.mark.parametrize("place", MOVED)
def test_a_gpu_learns_the_same_from_weights_that_wait_elsewhere(
    place: str, tmp_path: Path, chat_file: Path
) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    save_tiny(tmp_path / "base", "qwen2", **sizes)
    common = {"strategy": "auto", "gradient_checkpointing": True}
    whole = lighten.train(
        **settings(tmp_path, chat_file, output_dir=str(tmp_path / "whole"), **common)
    )
    moved: dict[str, Any] = {**common, "strategy": "zero3", **MOVED[place]}
    run = lighten.train(
        **settings(tmp_path, chat_file, output_dir=str(tmp_path / "moved"), **moved)
    )
    for row, expected in zip(run.metrics(), whole.metrics(), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    for key, value in weights(run).items():
        assert float((value - weights(whole)[key]).abs().max()) < 1e-4, key
    peaks = [cast(int, r.info()["training"]["peak_bytes"]) for r in (run, whole)]
    # Of twelve layers with gradients and two moments a few are there.
    assert peaks[0] < 0.5 * peaks[1]
    cut = cut_short(run, tmp_path / "cut")
    moved |= {"output_dir": str(cut.folder)}
    again = lighten.train(resume=True, **settings(tmp_path, chat_file, **moved))
    for row, expected in zip(again.metrics(), run.metrics(), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
