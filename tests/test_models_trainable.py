"""A base that rounds its activations gives no gradient to its input: refused for training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TorchAoConfig

import lighten
from lighten import models
from lighten.errors import UserError
from lighten.models.stored import stored_as
from lighten.models.trainable import require_gradients
from lighten.training import run as training
from tests.tiny import save_tiny

quantization = pytest.importorskip("torchao.quantization")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "model"
    return save_tiny(folder, intermediate_size=64, num_hidden_layers=1)


def save_quantized(plain: Path, folder: Path, config: Any) -> Path:
    """A folder as transformers and torchao write it."""
    shutil.copytree(plain, folder)
    loaded = AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, quantization_config=TorchAoConfig(config)
    )
    loaded.save_pretrained(folder)
    return folder


def dynamic() -> dict[str, Any]:
    eight = quantization.Int8DynamicActivationInt8WeightConfig()
    four = quantization.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=quantization.PerGroup(32)
    )
    by_name = quantization.FqnToConfig({r"re:.*_proj": four})
    return {"8da8w": eight, "8da4w": four, "by name": by_name}


@pytest.mark.parametrize("config_name", dynamic())
def test_rounded_activations_are_refused_before_anything_is_loaded(
    config_name: str, plain: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_quantized(plain, tmp_path / "model", dynamic()[config_name])

    def too_late(*_: Any, **__: Any) -> None:
        raise AssertionError("rows were read before the base was refused")

    monkeypatch.setattr(training, "load_rows", too_late)
    settings = {"model_name_or_path": str(folder), "dataset": str(chat_file), "max_steps": 1,
                "output_dir": str(tmp_path / "run")}  # fmt: skip
    for verb in (lighten.train, lighten.plan):
        with pytest.raises(UserError, match=r"passes no gradient on.*unquantised") as error:
            verb(**settings)
        assert str(folder) in str(error.value)
    assert not (tmp_path / "run").exists()


def test_it_is_seen_from_the_layers_too_where_the_files_do_not_say(
    plain: Path, tmp_path: Path
) -> None:
    folder = save_quantized(plain, tmp_path / "model", dynamic()["8da4w"])
    loaded = models.load(str(folder), dtype="float32").model
    with pytest.raises(UserError, match=r"q_proj \(IntxUnpackedToInt8Tensor\) passes no gradient"):
        require_gradients("it", loaded)


def test_weights_alone_in_eight_bits_still_train(
    plain: Path, chat_file: Path, tmp_path: Path
) -> None:
    folder = save_quantized(plain, tmp_path / "model", quantization.Int8WeightOnlyConfig(version=2))
    assert "Int8WeightOnly" in json.dumps(stored_as(folder))
    run = lighten.train(
        model_name_or_path=str(folder), dataset=str(chat_file), max_steps=2, dtype="float32",
        output_dir=str(tmp_path / "run"), learning_rate=1e-2, progress=False, planned=False,
    )  # fmt: skip
    assert run.info()["status"] == "finished"
