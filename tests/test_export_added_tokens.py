"""What a run ships whose tokens its base did not have: rows for them, in every form and receipt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lighten
from lighten.errors import UserError
from lighten.runs import Run
from tests.tiny import tiny_model, tiny_tokenizer

TOKENS = ["<tool>", "</tool>"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Over a base that has a row for each token of its own and no more."""
    root = tmp_path_factory.mktemp("added")
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    turns = [
        [
            {"role": "user", "content": f"<tool>add {number}</tool> the answer"},
            {"role": "assistant", "content": f"<tool>{number * 7 % 13}"},
        ]
        for number in range(40)
    ]
    rows = "\n".join(json.dumps({"messages": messages}) for messages in turns)
    (root / "data.jsonl").write_text(rows)
    return lighten.train(
        model_name_or_path=str(root / "base"), dataset=str(root / "data.jsonl"), lora_r=4,
        output_dir=str(root / "run"), max_steps=2, learning_rate=0.05, val_size=8,
        dtype="float32", progress=False, added_tokens=TOKENS,
    )  # fmt: skip


@pytest.mark.parametrize("form", ["adapter", "merged", "gguf:f32"])
def test_the_receipt_is_of_the_model_that_was_trained(form: str, run: Run, tmp_path: Path) -> None:
    """It was taken on a base without rows for the new tokens, which they are beyond."""
    dtype = "float32" if form == "merged" else "auto"
    export = lighten.export(run, form, output_dir=tmp_path / "e", dtype=dtype)
    assert export.receipt is not None
    assert export.receipt.passed, export.receipt.sentence()


def test_an_adapter_that_left_its_run_brings_its_tokens(run: Run, tmp_path: Path) -> None:
    adapter = lighten.export(run, "adapter", output_dir=tmp_path / "a", verify=False).folder
    shutil.copytree(adapter, tmp_path / "copy")  # as it comes from a hub
    merged = lighten.export(tmp_path / "copy", "merged", output_dir=tmp_path / "m")
    assert merged.receipt is not None
    assert merged.receipt.passed
    tokenizer = AutoTokenizer.from_pretrained(merged.folder)
    model = AutoModelForCausalLM.from_pretrained(merged.folder)
    ids = tokenizer("<tool>the answer", return_tensors="pt").input_ids
    assert int(ids.max()) < model.get_input_embeddings().weight.shape[0]
    of_run = lighten.export(run, "merged", output_dir=tmp_path / "r", verify=False).folder
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(of_run)(ids).logits
        torch.testing.assert_close(model(ids).logits, expected)


def test_llamacpp_has_no_place_for_an_adapters_tokens(run: Run, tmp_path: Path) -> None:
    """The base's file would read them as pieces."""
    with pytest.raises(UserError, match=r"new tokens .*<tool>.*--as merged"):
        lighten.export(run, "gguf-adapter", output_dir=tmp_path / "g", verify=False)
    assert not (tmp_path / "g").exists()
