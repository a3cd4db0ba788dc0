"""Adapters that PEFT saved over a resized vocabulary: merged by the command that serving names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import lighten
from lighten import models
from lighten.peft_config import WEIGHTS, tensor_shapes
from tests.tiny import VOCAB

ROWS = VOCAB + 8


@pytest.fixture
def adapter(tiny_folder: Path, tmp_path: Path) -> Path:
    base = models.load(str(tiny_folder), dtype="float32")
    base.model.resize_token_embeddings(ROWS, mean_resizing=False)
    base.tokenizer.add_tokens([f"<new-{number}>" for number in range(ROWS - len(base.tokenizer))])
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model = get_peft_model(base.model, config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
            assert "lora_" in name or "modules_to_save" in name
    model.peft_config["default"].base_model_name_or_path = str(tiny_folder)
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    # What PEFT adds where the vocabulary is another one than the base's.
    assert any(".modules_to_save." in key for key in tensor_shapes(folder / WEIGHTS))
    return folder


def test_it_is_merged_into_what_peft_computes(
    adapter: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    base = models.load(str(tiny_folder), dtype="float32").model
    base.resize_token_embeddings(ROWS, mean_resizing=False)
    ids = torch.tensor([[5, 9, VOCAB + 3, 7]])
    with torch.inference_mode():
        expected = PeftModel.from_pretrained(base, str(adapter))(ids).logits
    folder = tmp_path / "merged"
    lighten.export(adapter, "merged", output_dir=folder, dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=0)
