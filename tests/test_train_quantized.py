"""QLoRA from the recipe to the answers: facts, resuming, evaluation and chat on the same base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lighten
from lighten import models
from lighten.adapters import attach
from lighten.engine.checkpointing import checkpoint_layers
from lighten.errors import UserError
from lighten.evaluation.chat import Conversation
from tests.cut_runs import cut_short, losses
from tests.test_train_step import UNEVEN, one_step, random_spec
from tests.tiny import ARCHITECTURES, save_few_bits, save_tiny

HOW: dict[str, dict[str, Any]] = {
    "nf4, scales quantised too": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture
def settings(tiny_folder: Path, chat_file: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(tiny_folder), "dataset": str(chat_file), "dtype": "float32",
        "output_dir": str(tmp_path / "run"), "lora_r": [2, 4], "learning_rate": 1e-2,
        "per_device_train_batch_size": 6, "max_steps": 6, "save_steps": 2, "val_size": 0.2,
        "save_total_limit": 10, "gradient_checkpointing": True,
    }  # fmt: skip


@pytest.mark.parametrize("quantization", HOW)
def test_a_quantised_base_trains_resumes_evaluates_and_talks(
    quantization: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    run = lighten.train(**settings, **HOW[quantization], progress=False)
    trained = [m["loss"] for m in run.metrics() if m["kind"] == "train" and m["adapter"] == "r4"]
    assert trained[-1] < trained[0]

    facts = run.info()["base"]
    assert facts["quantization"] == quantization
    census = models.census(models.load(settings["model_name_or_path"], dtype="float32",
                                       **HOW[quantization]).model)  # fmt: skip
    plain = models.load(settings["model_name_or_path"], dtype="float32").model
    assert facts["parameters"] == sum(p.numel() for p in plain.parameters())
    assert facts["weights_bytes"] == census.weight_bytes < 4 * facts["parameters"]
    assert facts["quantized_parameters"] == census.quantized == 15_360
    (choice,) = (entry for entry in run.info()["choices"] if entry["what"] == "quantization")
    assert choice["value"] == quantization
    assert "of the recipe" in choice["reason"]
    (loss,) = (entry for entry in run.info()["choices"] if entry["what"] == "loss")
    assert loss["value"] == "supervised positions"

    card = (run.adapters()["r4"] / "README.md").read_text(encoding="utf-8")
    assert f"stored as {quantization}" in card

    cut = cut_short(run, tmp_path / "cut")
    resumed = lighten.train(
        **{**settings, "output_dir": str(cut.folder)},
        **HOW[quantization],
        resume=True,
        progress=False,
    )
    assert losses(resumed) == losses(run)
    for name, adapter_folder in run.adapters().items():
        resumed_tensors = load_file(resumed.adapters()[name] / "adapter_model.safetensors")
        for key, value in load_file(adapter_folder / "adapter_model.safetensors").items():
            assert torch.equal(resumed_tensors[key], value), key

    evaluation = lighten.evaluate(run, max_new_tokens=2)
    final = [m["loss"] for m in run.metrics() if m["kind"] == "eval" and m["adapter"] == "r4"][-1]
    # Evaluation sees the base that training saw: the dense one gives another loss.
    assert evaluation.metric("r4", "loss")["value"] == pytest.approx(final, rel=1e-4)
    talk = Conversation(str(run.folder), max_new_tokens=3)
    assert talk.base.quantization is not None
    assert talk.base.quantization.value == quantization
    assert isinstance("".join(talk.answer("hi", "r4")), str)
    assert lighten.report(run).stat().st_size > 10_000


@pytest.mark.parametrize("quantization", HOW)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_trains_on_a_quantised_base(
    arch: str, quantization: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "base", arch)
    changed = {**settings, "model_name_or_path": str(folder), "max_steps": 4}
    run = lighten.train(**changed, **HOW[quantization], progress=False)
    evaluation = lighten.evaluate(run, max_examples=8, max_new_tokens=1)
    final = [m["loss"] for m in run.metrics() if m["kind"] == "eval" and m["adapter"] == "r4"][-1]
    loss = evaluation.metric("r4", "loss")["value"]
    assert loss == pytest.approx(final, rel=1e-4)
    assert loss < evaluation.metric("base", "loss")["value"]
    (choice,) = (entry for entry in run.info()["choices"] if entry["what"] == "quantization")
    assert ("of fused experts, which bitsandbytes" in choice["reason"]) == (arch == "mixtral")


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt"])
def test_trap32_training_changes_no_format_of_the_base(arch: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", arch)
    model = models.load(str(folder), dtype="bfloat16", load_in_4bit=True).model
    before = {key: (p.dtype, p.shape) for key, p in model.named_parameters()}
    values = {key: p.clone() for key, p in model.named_parameters()}
    assert {dtype for dtype, _ in before.values()} == {torch.uint8, torch.bfloat16}
    cohort = attach(model, [random_spec()])
    checkpoint_layers(model)
    report, _ = one_step(cohort, UNEVEN, 3)
    assert report["a"].grad_norm > 0
    after = dict(cohort.detach().named_parameters())
    assert {key: (p.dtype, p.shape) for key, p in after.items()} == before
    assert all(torch.equal(value, after[key]) for key, value in values.items())


def test_a_run_on_a_dense_base_says_so(settings: dict[str, Any]) -> None:
    run = lighten.train(**{**settings, "max_steps": 1}, progress=False)
    info = run.info()
    assert info["base"]["quantization"] is None
    assert info["base"]["quantized_parameters"] == 0
    assert info["base"]["weights_bytes"] == 4 * info["base"]["parameters"]
    assert "stored as" not in (run.adapters()["r2"] / "README.md").read_text(encoding="utf-8")
    assert "quantization" not in {entry["what"] for entry in info["choices"]}


def test_new_tokens_fit_a_quantised_base(settings: dict[str, Any]) -> None:
    settings |= {"added_tokens": ["<|new|>"], "modules_to_save": ["embed_tokens"], "lora_r": 2}
    run = lighten.train(**{**settings, "max_steps": 2}, load_in_4bit=True, progress=False)
    (folder,) = run.adapters().values()
    saved = load_file(folder / "adapter_model.safetensors")
    assert any("embed_tokens" in key for key in saved)


def test_the_format_of_the_products_goes_by_both_names(settings: dict[str, Any]) -> None:
    del settings["dtype"]
    changed = {**settings, "max_steps": 1, "load_in_4bit": True}
    run = lighten.train(**changed, bnb_4bit_compute_dtype="float32", progress=False)
    (choice,) = (entry for entry in run.info()["choices"] if entry["what"] == "dtype")
    assert choice["value"] == "float32"
    with pytest.raises(UserError, match="computes in one format"):
        lighten.train(**changed, bnb_4bit_compute_dtype="float32", dtype="bfloat16")


def test_a_folder_whose_head_is_packed_trains(settings: dict[str, Any], tmp_path: Path) -> None:
    """As bitsandbytes packs it where layers to be left dense are named, and the head is not."""
    folder = save_few_bits(tmp_path / "few", ["down_proj"], load_in_4bit=True)
    assert hasattr(models.load(str(folder)).model.lm_head, "dense_weight")
    run = lighten.train(
        **{**settings, "model_name_or_path": str(folder), "lora_r": 4, "val_size": 0.0},
        progress=False,
    )
    trained = [m["loss"] for m in run.metrics() if m["kind"] == "train"]
    assert trained[-1] < trained[0]
    # The first batch's loss was compared with that of the model's own forward.
    (loss,) = (entry for entry in run.info()["choices"] if entry["what"] == "loss")
    assert loss["value"] == "supervised positions"
