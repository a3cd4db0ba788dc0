"""Adapters merged shard by shard, against PEFT's own merge."""

from __future__ import annotations

import copy
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config

from lighten.errors import UserError
from lighten.machine.hardware import PeakMemory
from lighten.quantization.merge import Unmergeable, merge
from tests.tiny import VOCAB, tiny_config, tiny_model

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 8},
    "patterns": {"rank_pattern": {"down_proj": 2, "c_proj": 2},
                 "alpha_pattern": {"o_proj": 5, "c_fc": 5}},
    "dora": {"use_dora": True},
    "head": {"target_modules": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "wte"]},
    "whole-head": {"modules_to_save": ["lm_head"]},
    "whole-embedding": {"modules_to_save": ["embed_tokens", "wte"]},
    "norms": {"modules_to_save": ["norm", "ln_f"]},
    "biases": {"bias": "all"},
    "token-rows": {"trainable_token_indices": [3, 7]},
    "tied-embedding": {"target_modules": ["embed_tokens", "wte", "q_proj", "c_fc"],
                       "ensure_weight_tying": True},
}  # fmt: skip


def trained(model: Any, folder: Path, **settings: Any) -> Any:
    """An adapter that PEFT wrote, every part of which changes the answers; and its model."""
    torch.manual_seed(5)
    lora_settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings
    peft = get_peft_model(copy.deepcopy(model), LoraConfig(**lora_settings))
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        if "lora_B" in name or "embedding_A" in name:
            nn.init.normal_(parameter, std=0.1)
    peft.save_pretrained(folder)
    return peft.eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(0, VOCAB, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("variant", SETTINGS)
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "phi3"])
def test_traps_29_31_the_merged_model_answers_as_the_adapter(
    arch: str, variant: str, tmp_path: Path
) -> None:
    """Tied heads (Qwen 2, GPT-2), biases, transposed layers; float32 to 1e-4."""
    model = tiny_model(arch)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    peft = trained(model, tmp_path / "adapter", **SETTINGS[variant])
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    merged, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = logits(PeftModel.from_pretrained(model, tmp_path / "adapter").eval())
    assert (expected - logits(tiny_model(arch))).abs().max() > 0.1
    torch.testing.assert_close(logits(merged.eval()), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(peft), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_a_merged_model_has_sixteen_bits_and_what_was_not_trained_is_as_it_was(
    stored: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_model("llama", dtype=stored)
    model.save_pretrained(tmp_path / "base")
    trained(model.float(), tmp_path / "adapter", target_modules=["q_proj"])
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    half = torch.bfloat16 if stored == torch.float32 else stored
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == half
    base_weights = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=half).state_dict()
    for name, value in merged.state_dict().items():
        assert torch.equal(value, base_weights[name]) != ("q_proj" in name), name
    reference = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32),
        tmp_path / "adapter",
    ).merge_and_unload()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(merged.state_dict()[name], reference.state_dict()[name].to(half))


def test_an_adapter_of_another_base_is_refused_and_nothing_written(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    for name, changes in (("wider", {"hidden_size": 64}), ("deeper", {"num_hidden_layers": 3})):
        trained(tiny_model("llama", **changes), tmp_path / name)
        with pytest.raises(UserError, match="trained on another model"):
            merge(tmp_path / "base", tmp_path / name, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_torn_base_or_adapter_is_told_and_an_older_folder_stays(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    trained(model, tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    config_before = json.loads((tmp_path / "merged" / "config.json").read_text())
    for file in (tmp_path / "adapter" / "adapter_model.safetensors",
                 tmp_path / "base" / "model.safetensors"):  # fmt: skip
        content = file.read_bytes()
        file.write_bytes(content[:-40])
        with pytest.raises(UserError, match=r"safetensors"):
            merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
        file.write_bytes(content)
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == config_before
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_what_is_not_low_rank_is_told_before_anything_is_written(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    LoHaConfig(target_modules=["q_proj"]).save_pretrained(tmp_path / "loha")
    with pytest.raises(Unmergeable, match="LOHA"):
        merge(tmp_path / "base", tmp_path / "loha", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_memory_is_bounded_by_the_largest_shard(tmp_path: Path) -> None:
    """At most 2.5 times the largest shard, here of a model of several."""
    model = tiny_model("llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=3)
    model.save_pretrained(tmp_path / "base", max_shard_size="80MB")
    get_peft_model(model, LoraConfig(r=8, target_modules="all-linear")).save_pretrained(
        tmp_path / "adapter"
    )
    del model
    gc.collect()
    memory = PeakMemory()
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    peak = memory.read()["peak_bytes"]
    shards = sorted((tmp_path / "merged").glob("model-*.safetensors"))
    assert len(shards) == len(list((tmp_path / "base").glob("model-*.safetensors"))) > 1
    assert peak <= 2.5 * max(shard.stat().st_size for shard in shards)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}


def beside_pictures(kind: str, **text: Any) -> Any:
    """A model whose files call its weights otherwise than transformers does."""
    if kind == "gemma3":
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2,
                 "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}  # fmt: skip
        settings = tiny_config("gemma3_text", **text).to_dict()
        config = Gemma3Config(
            text_config=settings, vision_config=sizes, mm_tokens_per_image=4,
            tie_word_embeddings=settings["tie_word_embeddings"],
        )  # fmt: skip
    else:
        config = AutoConfig.for_model(
            "qwen3_5_text", vocab_size=VOCAB, hidden_size=32, intermediate_size=48,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
            linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"], **text,
        )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def rename(file: Path, ours: str, theirs: str) -> None:
    weights = {key.replace(ours, theirs, 1): value for key, value in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5"])
def test_weights_that_files_call_otherwise_are_merged(
    kind: str, renamed: bool, tmp_path: Path
) -> None:
    """As those of models with a picture tower; older adapters name them as the files do."""
    model = beside_pictures(kind)
    model.save_pretrained(tmp_path / "base")
    if kind == "qwen3_5":  # as published, and as it is saved once it was loaded
        rename(tmp_path / "base" / "model.safetensors", "model.", "model.language_model.")
    of_files = set(load_file(tmp_path / "base" / "model.safetensors"))
    assert not of_files & set(dict(model.named_parameters())) - {"lm_head.weight"}
    trained(model, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    expected = logits(PeftModel.from_pretrained(model, tmp_path / "adapter").eval())
    if renamed:
        places = ("model.language_model.", "language_model.model.")
        if kind == "qwen3_5":
            places = ("model.", "model.language_model.")
        first = "base_model.model."
        rename(tmp_path / "adapter" / "adapter_model.safetensors",
               *(f"{first}{place}" for place in places))  # fmt: skip
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) == of_files
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged.eval()), expected, atol=1e-4, rtol=1e-4)


def test_a_vocabulary_that_its_settings_leave_out_grows(tmp_path: Path) -> None:
    """Gemma 3's do where it is as large as usual."""
    model = beside_pictures("gemma3", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    trained(model, tmp_path / "adapter", target_modules=["q_proj"])
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", words=VOCAB + 8)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == VOCAB + 8
    merged, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert merged.get_input_embeddings().weight.shape[0] == VOCAB + 8


def test_an_embedding_that_learnt_by_dora_is_left_to_peft(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    trained(model, tmp_path / "dora", use_dora=True, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(Unmergeable, match="embedding by DoRA"):
        merge(tmp_path / "base", tmp_path / "dora", tmp_path / "merged")


def test_factors_of_another_rank_than_is_said_are_refused(tmp_path: Path) -> None:
    """Their scale would be wrong."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    trained(model, tmp_path / "adapter", rank_pattern={"down_proj": 2})
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rank_pattern": {}}))
    with pytest.raises(UserError, match=r"have rank 2 and adapter_config\.json says 4"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
