"""Adapters of a cohort whose rows fill micro-batches train one after another within each step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lighten
from lighten.engine import workers
from lighten.engine.workers import FULL_TOKENS
from lighten.runs import Run
from lighten.training import loop
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("passes") / "model")


def trained(model: Path, rows: Path, output: Path, ranks: Any = (2, 4), **changes: Any) -> Run:
    values = {
        "model": str(model), "dataset": str(rows), "output_dir": str(output), "max_steps": 4,
        "lora_r": list(ranks), "learning_rate": 1e-2, "val_size": 0, "progress": False,
        "dtype": "float32", **changes,
    }  # fmt: skip
    return lighten.train(**values)


def weights(run: Run, name: str) -> dict[str, torch.Tensor]:
    return load_file(run.adapters()[name] / "adapter_model.safetensors")


def passes(run: Run) -> str | None:
    return next(
        (choice["value"] for choice in run.info()["choices"] if choice["what"] == "passes"), None
    )


def losses(run: Run, name: str) -> list[float]:
    return [m["loss"] for m in run.metrics() if m["kind"] == "train" and m["adapter"] == name]


def test_apart_each_adapter_has_the_bits_that_it_has_alone(
    model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = trained(model, chat_file, tmp_path / "together")
    assert passes(together) == "together", f"fewer than {FULL_TOKENS} tokens fill no micro-batch"
    monkeypatch.setattr(workers, "FULL_TOKENS", 16)
    apart = trained(model, chat_file, tmp_path / "apart")
    assert passes(apart) == "apart"
    for rank in (2, 4):
        alone = trained(model, chat_file, tmp_path / f"alone{rank}", ranks=[rank])
        assert passes(alone) is None
        name, (only_name,) = f"r{rank}", alone.adapters()
        assert losses(apart, name) == losses(alone, only_name)
        assert losses(apart, name) == pytest.approx(losses(together, name), rel=1e-4)
        alone_weights = weights(alone, only_name)
        assert all(
            torch.equal(value, alone_weights[key]) for key, value in weights(apart, name).items()
        )


def test_apart_one_adapters_gradients_are_kept_at_a_time(
    model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "FULL_TOKENS", 16)
    steps: list[tuple[list[str], bool]] = []
    plain = loop.train_step
    everyone: list[Any] = []

    def watched_step(batches: Any, members: Any, *args: Any, **options: Any) -> Any:
        everyone.extend(member for member in members if member not in everyone)
        report = plain(batches, members, *args, **options)
        has_gradients = any(
            p.grad is not None for member in everyone for p in member.parameters.values()
        )
        steps.append(([member.name for member in members], has_gradients))
        return report

    monkeypatch.setattr(loop, "train_step", watched_step)
    trained(model, chat_file, tmp_path / "run", max_steps=2)
    assert steps == [(["r2"], False), (["r4"], False)] * 2


def test_a_quantised_base_is_dequantised_once_for_all(
    model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "FULL_TOKENS", 16)
    run = trained(model, chat_file, tmp_path / "run", load_in_4bit=True, max_steps=1)
    assert passes(run) == "together"
