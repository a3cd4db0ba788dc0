"""`lighten plan quantize --to`: what is said beforehand is what happens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import lighten
from lighten import api
from lighten.cli.main import app
from lighten.errors import DiskFull
from lighten.quantization.gguf_model import write_gguf
from lighten.quantization.table import weight_bytes
from lighten.quantization.targets import DYNAMIC
from lighten.quantization.weights import make
from tests.test_merge import trained
from tests.tiny import tiny_model, tiny_tokenizer

KINDS = ("int8", "int8:bitsandbytes", "nf4", "int4:rounded",
         "int8-dynamic-act-int4-weight")  # fmt: skip
TYPES = ("q4_k_m", "q8_0", "f16")


def save_model(folder: Path, arch: str, **changes: Any) -> Path:
    tiny_model(arch, dtype=torch.bfloat16, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tied model without biases, one with a head of its own and biases, and one of experts."""
    root = tmp_path_factory.mktemp("models")
    wide = {"hidden_size": 256, "intermediate_size": 512}
    return {
        "tied": save_model(root / "tied", "llama", tie_word_embeddings=True, **wide),
        "biased": save_model(root / "biased", "qwen2", tie_word_embeddings=False, **wide),
        "experts": save_model(root / "experts", "mixtral", **wide),
    }


@pytest.mark.parametrize("name", ["tied", "biased", "experts"])
def test_folders_are_as_large_as_was_said(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """Against the files that the libraries write, with their headers."""
    pytest.importorskip("bitsandbytes")
    # INT4 refuses experts that are stacked.
    kinds = [kind for kind in KINDS if name != "experts" or kind.partition(":")[0] != "int4"]
    forecast = api.plan_formats(models[name], ",".join(kinds), output_dir=tmp_path)
    for entry in forecast.formats:
        folder = tmp_path / entry.name.replace(":", "-")
        folder.mkdir()
        make(entry.name, models[name], folder, [[0] * 32] * 2)
        assert entry.file_bytes == pytest.approx(weight_bytes(folder), rel=0.01), entry.name
        assert entry.missing is None
        assert entry.note.startswith("the experts, ") is (name == "experts")
        calibrated = "int4" in entry.name
        assert (entry.seconds is None) is (entry.peak_bytes is None) is calibrated
    assert forecast.disk_bytes == sum(entry.file_bytes or 0 for entry in forecast.formats)
    assert forecast.weight_bytes == pytest.approx(weight_bytes(models[name]), rel=0.01)
    assert forecast.temporary_bytes == 0
    assert forecast.fits() is None  # the memory that calibrated formats need is not known


@pytest.mark.parametrize("type_name", TYPES)
def test_gguf_files_are_as_large_as_was_said_to_the_byte(
    type_name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    for name in ("tied", "biased"):
        model = models[name]
        (entry,) = api.plan_formats(model, f"gguf:{type_name}").formats
        write_gguf(model, tmp_path / f"{name}.gguf", type_name, name=name)
        assert entry.file_bytes == (tmp_path / f"{name}.gguf").stat().st_size
        assert entry.seconds is not None
        assert entry.seconds > 0


def test_a_run_s_adapter_is_planned_as_it_will_be_merged(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """A trained head parts from its embedding, which the plan counts."""
    pytest.importorskip("gguf")
    trained(tiny_model("llama", tie_word_embeddings=True, hidden_size=256, intermediate_size=512),
            tmp_path / "adapter", target_modules=["lm_head", "q_proj"])  # fmt: skip
    config = tmp_path / "adapter" / "adapter_config.json"
    adapter_config = json.loads(config.read_text())
    config.write_text(json.dumps(adapter_config | {"base_model_name_or_path": str(models["tied"])}))
    forecast = api.plan_formats(tmp_path / "adapter", "gguf:q8_0", output_dir=tmp_path)
    export = lighten.export(
        tmp_path / "adapter", "gguf:q8_0", output_dir=tmp_path / "out", verify=False
    )
    assert forecast.formats[0].file_bytes == export.size_bytes
    merged = lighten.export(tmp_path / "adapter", output_dir=tmp_path / "m", verify=False)
    assert forecast.temporary_bytes == pytest.approx(merged.size_bytes, rel=0.01)


def test_groups_are_those_that_the_run_was_trained_for(
    models: dict[str, Path], chat_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torchao")
    run = lighten.train(
        model_name_or_path=str(models["tied"]), dataset=str(chat_file), max_steps=1, lora_r=2,
        qat=DYNAMIC, qat_group_size=128, val_size=0, output_dir=str(tmp_path / "run"),
        progress=False, planned=False,
    )  # fmt: skip
    (grouped,) = api.plan_formats(run, DYNAMIC).formats
    (usual,) = api.plan_formats(models["tied"], DYNAMIC).formats
    make(DYNAMIC, models["tied"], tmp_path, [], group_size=128)
    assert grouped.file_bytes == pytest.approx(weight_bytes(tmp_path), rel=0.01)
    assert grouped.file_bytes < 0.97 * (usual.file_bytes or 0)


def test_what_is_missing_is_said_and_stops_before_anything_is_written(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free._replace(free=1000))
    forecast = api.plan_formats(models["tied"], "int8", output_dir=tmp_path / "out")
    assert forecast.fits() is False
    with pytest.raises(DiskFull, match=r"needs 1\.\d MB .* has 0\.0 MB left; free some"):
        lighten.quantize(models["tied"], "int8", output_dir=tmp_path / "out")
    for form in ("merged", "gguf:q8_0"):
        with pytest.raises(DiskFull, match=r"exporting tied as \w+ needs \d\.\d MB .* free some"):
            lighten.export(models["tied"], form, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    (entry,) = api.plan_formats(models["tied"], "nf4").formats
    assert entry.missing is not None
    assert "pip install 'lighten[quant]'" in entry.missing
    assert entry.file_bytes is not None
    assert entry.seconds is None


def test_the_command_tells_sizes_and_what_does_not_go_together(models: dict[str, Path]) -> None:
    arguments = ["plan", "quantize", str(models["tied"]), "--to", "int8,gguf:q4_k_m"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "gguf:q4_k_m" in result.output
    report = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert [entry["name"] for entry in report["formats"]] == ["int8", "gguf:q4_k_m"]
    for flags in (["--storage", "nf4"], ["--tokens", "3"]):
        refused = CliRunner().invoke(app, [*arguments, *flags])
        assert refused.exit_code not in (0, 1)
        assert flags[0] in refused.output


def test_layers_that_int8_leaves_are_said(tmp_path: Path) -> None:
    """torchao knows PyTorch's linear layers: of GPT-2 it rounds the words alone."""
    model = save_model(tmp_path / "gpt2", "gpt2")
    entries = api.plan_formats(model, "int8,int8:bitsandbytes", output_dir=tmp_path).formats
    assert entries[0].note.startswith("8 linear layers of 8, 100% of their weights, stay in 16")
    assert entries[1].note == ""
    rounded = tmp_path / "int8"
    rounded.mkdir()
    make("int8", model, rounded, [])
    kinds = {tensor.dtype for name, tensor in load_file(rounded / "model.safetensors").items()
             if ".c_" in name}  # fmt: skip
    assert kinds == {torch.bfloat16}
