"""What a merge keeps of numbers that are finer than the base's 16 bits."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from peft import IA3Config, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lighten
from lighten.errors import UserError
from lighten.quantization.forecast import forecast
from lighten.quantization.gguf_types import gguf_merge_dtype
from lighten.quantization.merge import merge
from tests.test_merge import trained
from tests.tiny import save_tiny, tiny_model

QUERY, NORM = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.input_layernorm.weight"
VALUE = "model.layers.0.self_attn.v_proj.weight"


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_float32_beside_sixteen_bits_stays_float32(half: torch.dtype, tmp_path: Path) -> None:
    """As routers and biases of mixed checkpoints are; what is all float32 becomes 16 bits."""
    tiny_model("llama", dtype=half).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    torch.manual_seed(2)
    for name in (QUERY, NORM):
        weights[name] = torch.randn(weights[name].shape)
    save_file(weights, file, metadata={"format": "pt"})
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    peft = trained(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    expected = peft.merge_and_unload().state_dict()
    assert torch.equal(merged[NORM], weights[NORM])
    assert merged[QUERY].dtype == torch.float32
    torch.testing.assert_close(merged[QUERY], expected[QUERY], rtol=1e-6, atol=1e-7)
    assert torch.equal(merged[VALUE], expected[VALUE].to(half))
    assert {t.dtype for name, t in merged.items() if name not in (QUERY, NORM)} == {half}
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "wanted", dtype="bfloat16")
    wanted = load_file(tmp_path / "wanted" / "model.safetensors")
    assert {tensor.dtype for tensor in wanted.values()} == {torch.bfloat16}


def test_what_peft_merges_in_memory_keeps_float32_too(tmp_path: Path) -> None:
    """It was rounded there, routers and their biases with the rest."""
    base = save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    weights = load_file(base / "model.safetensors")
    torch.manual_seed(2)
    weights[NORM] = torch.randn(weights[NORM].shape)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = IA3Config(target_modules=["v_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    for dtype, kept in {"auto": torch.float32, "bfloat16": torch.bfloat16}.items():
        exported = lighten.export(
            tmp_path / "adapter", "merged", dtype=dtype, output_dir=tmp_path / dtype, verify=False
        )
        assert any("in memory" in note for note in exported.notes)
        merged = load_file(tmp_path / dtype / "model.safetensors")
        assert torch.equal(merged[NORM], weights[NORM].to(kept))
        assert {t.dtype for name, t in merged.items() if name != NORM} == {torch.bfloat16}


def test_a_file_in_float16_keeps_updates_that_bfloat16_rounds_away(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = trained(model, tmp_path / "adapter", target_modules=["v_proj"], lora_alpha=1)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name in weights:
        if "lora_B" in name:
            weights[name] = weights[name] / 200
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors")
    peft.load_adapter(str(tmp_path / "adapter"), "small")
    peft.set_adapter("small")
    before = model.state_dict()[VALUE]
    after = peft.merge_and_unload().state_dict()[VALUE]
    rounded_away = (after.bfloat16().float() == before).float().mean()
    assert rounded_away > 0.5
    source = f"{tmp_path / 'adapter'}"
    settings = {"model_name_or_path": str(base)}
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"base_model_name_or_path": null',
        f'"base_model_name_or_path": "{base}"').replace('"base_model_name_or_path": ""',
        f'"base_model_name_or_path": "{base}"'))  # fmt: skip
    assert settings
    export = lighten.export(source, "gguf:f16", output_dir=tmp_path / "exported", verify=False)
    (file,) = export.files
    (stored,) = [t for t in gguf.GGUFReader(file).tensors if t.name == "blk.0.attn_v.weight"]
    assert np.array_equal(stored.data.astype(np.float16), after.numpy().astype(np.float16))
    lighten.quantize(source, "gguf:f16", output_dir=tmp_path / "table", tokens=16, questions=0)
    (same,) = (tmp_path / "table").rglob("*.gguf")
    assert same.read_bytes() == file.read_bytes()
    temporary = [forecast(source, kind).temporary_bytes for kind in ("gguf:f16", "gguf:q8_0")]
    assert temporary[0] == 3 * temporary[1]


def test_coarser_files_are_made_from_sixteen_bits() -> None:
    kinds = ("f32", "f16", "bf16", "q8_0", "q4_k_m")
    assert [gguf_merge_dtype(kind) for kind in kinds] == ["float32"] * 2 + ["auto"] * 3


@pytest.mark.parametrize("in_memory", [False, True])
def test_numbers_that_float16_cannot_say_are_not_made_infinite(
    in_memory: bool, tmp_path: Path
) -> None:
    base = save_tiny(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.get_parameter(VALUE)[0, 0] = 1e5
    model.save_pretrained(base)
    by_peft = {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}
    trained(model, tmp_path / "adapter", **(by_peft if in_memory else {}))
    config = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(config.read_text()) | {"base_model_name_or_path": str(base)}
    config.write_text(json.dumps(values))
    source = str(tmp_path / "adapter")
    with pytest.raises(UserError, match=f"{VALUE}.* beyond what float16 can say"):
        lighten.export(source, dtype="float16", output_dir=tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()
    lighten.export(source, dtype="bfloat16", output_dir=tmp_path / "out", verify=False)
