"""PEFT's methods from the recipe to the answers, and recipes that contradict themselves."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lighten
from lighten.adapters import files, load
from lighten.errors import UserError
from lighten.evaluation.chat import chat
from tests.test_adapters_peft import CLOSE, IDS, in_peft, logits_of, relative_difference
from tests.tiny import tiny_model


@pytest.fixture
def settings(tiny_folder: Path, chat_file: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_folder), "dataset": str(chat_file), "output_dir": str(tmp_path / "run"),
        "max_steps": 4, "save_steps": 2, "learning_rate": 2e-2, "val_size": 0.2, "dtype": "float32",
        "progress": False, "per_device_train_batch_size": 4,
    }  # fmt: skip


RUNS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True, "lora_r": 4, "lora_dropout": 0.1, "gradient_checkpointing": True},
    "pissa": {"init_lora_weights": "pissa", "lora_r": 4},
    "ia3": {"peft": {"peft_type": "ia3"}, "learning_rate": 0.2},
    "prefix": {
        "peft": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4},
        "learning_rate": 0.3,
    },
    "p-tuning": {"peft": {"peft_type": "p-tuning", "num_virtual_tokens": 4}},
}


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
@pytest.mark.parametrize("method", RUNS)
def test_a_run_trains_resumes_bitwise_evaluates_chats_and_loads_in_peft(
    method: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**settings, **RUNS[method]}
    run = lighten.train(**settings)
    losses = [m["loss"] for m in run.metrics() if m["kind"] == "train"]
    assert losses[-1] < losses[0]
    info = run.info()
    (adapter,) = info["adapters"]
    assert adapter["trainable_parameters"] > 0
    assert adapter["serving"]
    assert info["base"]["parameters"] == sum(p.numel() for p in tiny_model("llama").parameters())
    packing = next(c for c in info["choices"] if c["what"] == "packing")
    assert (packing["value"] == "off") == (method in ("prefix", "p-tuning")), packing

    evaluation = lighten.evaluate(run, max_examples=3, max_new_tokens=3)
    if method not in ("prefix", "p-tuning"):  # they begin far above the base
        assert (
            evaluation.metric("default", "loss")["value"]
            < evaluation.metric("base", "loss")["value"]
        )
    assert adapter["method"] in lighten.report(run).read_text(encoding="utf-8")
    output = io.StringIO()
    chat(str(run.folder), max_new_tokens=3, lines=io.StringIO("hello\n/exit\n"), out=output)
    assert output.getvalue()

    folder = run.adapters()["default"]
    theirs = in_peft(folder, tiny_model("llama"))(input_ids=IDS).logits[:, -IDS.shape[1] :]
    ours = logits_of(load(tiny_model("llama"), {"a": folder}), "a")
    assert relative_difference(ours, theirs) < CLOSE
    assert relative_difference(ours, tiny_model("llama")(input_ids=IDS).logits) > 1e-3

    before = load_file(folder / files.WEIGHTS)
    shutil.rmtree(folder)
    shutil.rmtree(run.folder / "checkpoints" / "checkpoint-4")
    run.update(status="interrupted")
    lighten.train(**settings, resume=True)
    after = load_file(folder / files.WEIGHTS)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_packing_and_recomputing_that_a_method_cannot_do_are_refused(
    settings: dict[str, Any],
) -> None:
    prefix = {**settings, **RUNS["prefix"]}
    with pytest.raises(UserError, match="gradient_checkpointing: PREFIX_TUNING keeps"):
        lighten.train(**prefix, gradient_checkpointing=True)
    with pytest.raises(UserError, match="packing: PREFIX_TUNING puts a learnt prompt"):
        lighten.train(**{**prefix, "output_dir": settings["output_dir"] + "2"}, packing=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft": {"peft_type": "IA4"}}, "did you mean IA3?"),
        ({"peft": {"peft_type": "VERA", "vera_dropot": 0.1}}, "did you mean vera_dropout?"),
        ({"peft": {"peft_type": "VERA", "inference_mode": True}}, "set by lighten itself"),
        ({"peft": {"peft_type": "ADALORA"}}, "does not train here: it has to be told"),
        ({"peft": {"peft_type": "LORA", "bias": "all"}}, "trains the base's own weights"),
        ({"peft": {"peft_type": "LORA", "init_lora_weights": "pissa"}}, "leave the peft section"),
        ({"peft": {"peft_type": "LORA", "task_type": "SEQ_CLS"}}, "must be CAUSAL_LM"),
        ({"peft": {"r": 4}}, "peft names no peft_type"),
        ({"peft": {"peft_type": "IA3"}, "lora_r": 4}, "lora_r has no effect beside peft"),
        ({"peft": {"peft_type": "IA3"}, "use_dora": True}, "use_dora has no effect beside peft"),
        ({"peft": {"peft_type": "IA3"}, "adapters": [{"name": "x", "lora_r": 2}]},
         "lora_r has no effect beside peft"),
        ({"use_dora": True, "lora_r": [2, 4]}, "use_dora trains one adapter at a time"),
        ({"init_lora_weights": "pissa", "lora_r": [2, 4]}, "init_lora_weights: pissa trains one"),
        ({"peft": {"peft_type": "IA3"}, "learning_rate": [0.1, 0.2]}, "peft trains one adapter"),
        ({"use_dora": True, "init_lora_weights": "pissa"}, "exclude each other"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights: 'loftq' does not do"),
    ],
)  # fmt: skip
def test_what_does_not_hold_together_is_told_before_anything_is_loaded(
    change: dict[str, Any], message: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    # A model without weights: a path that leads nowhere is told of before all else.
    shutil.copyfile(Path(settings["model"]) / "config.json", tmp_path / "config.json")
    settings = {**settings, "model": str(tmp_path)}
    with pytest.raises(UserError, match=message):
        lighten.train(**{**settings, **change})
