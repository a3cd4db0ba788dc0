"""The KV cache and the weights of a server, against real caches and real layers."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, DynamicCache

from lighten import models
from lighten.machine.devices import DEVICES, named
from lighten.planning import serving
from lighten.planning.serve import quantize, serve
from lighten.planning.serving import LayerCache, adapter_bytes, kv_cache_bytes, layer_caches
from tests.tiny import save_tiny, tiny_config, tiny_model

GIB = 2**30


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2", "mixtral", "gemma2", "gemma3_text",
                                  "mistral", "phi3"])  # fmt: skip
def test_the_cache_is_as_large_as_the_one_the_model_fills(arch: str) -> None:
    """Layer by layer against the tensors that transformers keeps after reading 32 tokens."""
    model = tiny_model(arch)
    cache: Any = DynamicCache(config=model.config)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with torch.no_grad():
        model(input_ids=torch.arange(10, 42)[None], **{name: cache}, use_cache=True)
    caches = layer_caches(tiny_config(arch).to_dict())
    assert len(caches) == len(cache.layers)
    for layer, layer_cache in zip(cache.layers, caches, strict=True):
        assert layer.keys is not None
        per_token = (layer.keys.numel() + layer.values.numel()) // layer.keys.shape[-2]
        assert per_token == layer_cache.numbers
        # transformers keeps one token less than the window, which the next one completes.
        tokens = 32 if layer_cache.window is None else layer_cache.window - 1
        assert layer.keys.shape[-2] == tokens


def test_published_caches_by_hand() -> None:
    # Llama 3.1 8B: 32 layers, 8 KV heads of 128, 16 bits: 128 KiB per token.
    llama = layer_caches({"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096,
                          "num_key_value_heads": 8})  # fmt: skip
    assert kv_cache_bytes(llama, 4096, 1) == 4096 * 128 * 1024
    assert kv_cache_bytes(llama, 4096, 32) == 16 * GIB
    assert kv_cache_bytes(llama, 4097, 1) == 4112 * 128 * 1024  # one more block
    # Mistral 7B v0.1 keeps 4096 tokens of any context.
    mistral = layer_caches({"num_hidden_layers": 32, "num_attention_heads": 32,
                            "hidden_size": 4096, "num_key_value_heads": 8,
                            "sliding_window": 4096})  # fmt: skip
    assert kv_cache_bytes(mistral, 32768, 1) == kv_cache_bytes(mistral, 4096, 1)
    # DeepSeek-V2: 512 + 64 numbers per token and layer, for 128 heads (arXiv 2405.04434).
    deepseek = layer_caches({"num_hidden_layers": 60, "num_attention_heads": 128,
                             "hidden_size": 5120, "kv_lora_rank": 512,
                             "qk_rope_head_dim": 64})  # fmt: skip
    assert kv_cache_bytes(deepseek, 16, 1) == 16 * 60 * 576 * 2
    kinds = ["linear_attention"] * 3 + ["full_attention"]
    hybrid: dict[str, Any] = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 64,
                              "layer_types": kinds}  # fmt: skip
    assert kv_cache_bytes(layer_caches(hybrid), 16, 1) == 16 * 2 * 64 * 2
    assert kv_cache_bytes([LayerCache(8)], 16, 1, number_bytes=1) == 128


def test_an_adapter_is_as_large_as_the_one_that_is_attached(tiny_folder: Path) -> None:
    from lighten.adapters import AdapterSpec, attach

    model = tiny_model("llama")
    trained = attach(model, [AdapterSpec(name="a", r=4)])
    parameters = sum(parameter.numel() for parameter in trained.parameters("a").values())
    plan = serve(str(tiny_folder), named("cpu"), adapters=3, rank=4)
    number = serving.BYTES_PER_WEIGHT[named("cpu").dtype().value]
    assert plan.parts["adapters"] == 3 * parameters * number
    assert adapter_bytes([(10, 20)], 2, number_bytes=4) == 240


def test_the_weights_are_as_large_as_the_loaded_ones(tiny_folder: Path) -> None:
    base = models.load(str(tiny_folder), dtype="bfloat16")
    assert serve(str(tiny_folder), DEVICES["a100-40"]).parts["base weights"] == (
        models.census(base.model).weight_bytes
    )


@pytest.mark.parametrize("kind", ["int8", "int8-dynamic-act-int4-weight", "int4:rounded"])
def test_quantised_files_are_as_large_as_the_loaded_weights(kind: str, tmp_path: Path) -> None:
    """With the files by what they hold; without them by their configuration."""
    pytest.importorskip("torchao")
    pytest.importorskip("auto_round")
    from lighten.quantization.weights import make

    folder = save_tiny(tmp_path / "m", hidden_size=128, intermediate_size=256)
    (tmp_path / "made").mkdir()
    make(kind, folder, tmp_path / "made", [])
    loaded = models.census(models.load(str(tmp_path / "made"), dtype="bfloat16").model)

    def planned() -> int:
        return serve(str(tmp_path / "made"), DEVICES["a100-40"]).parts["base weights"]

    assert planned() == pytest.approx(loaded.weight_bytes, rel=0.01)
    for file in (tmp_path / "made").glob("*.safetensors"):
        file.unlink()
    assert planned() == pytest.approx(loaded.weight_bytes, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 4 + 20 / 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8),
        ({"quant_method": "compressed-tensors", "ignore": ["lm_head"], "config_groups": {
            "group_0": {"weights": {"num_bits": 4, "group_size": 32}}}}, 4 + 20 / 32),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8),
        ({"quant_method": "awq", "bits": 4, "modules_to_not_convert": ["mlp"]}, None),
        ({"quant_method": "nobody's"}, 16),
    ],
)  # fmt: skip
def test_a_configuration_says_how_many_bits_its_layers_are_in(
    settings: dict[str, Any], bits: float | None, tmp_path: Path
) -> None:
    config = tiny_config("llama", quantization_config=settings)
    config.save_pretrained(tmp_path)
    model = tiny_model("llama")
    linear = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    rest = sum(p.numel() for p in model.parameters()) - linear
    if bits is None:  # the MLPs are left in 16 bits
        left = sum(p.numel() for n, p in model.named_parameters() if "mlp" in n)
        linear, rest, bits = linear - left, rest + left, 4
    expected = round(linear * bits / 8 + 2 * rest)
    assert serve(str(tmp_path), DEVICES["a100-40"]).parts["base weights"] == expected


def test_more_of_anything_needs_more(tiny_folder: Path) -> None:
    usual = serve(str(tiny_folder), DEVICES["t4"], adapters=2, context=128, concurrency=4)
    for change in ({"adapters": 3}, {"context": 256}, {"concurrency": 8}, {"rank": 32}):
        settings: dict[str, Any] = {"adapters": 2, "context": 128, "concurrency": 4, **change}
        assert serve(str(tiny_folder), DEVICES["t4"], **settings).total > usual.total
    assert usual.fits() is True
    assert usual.most_sequences is not None
    assert usual.most_sequences > 4
    overfull = serve(str(tiny_folder), DEVICES["t4"], adapters=2, context=128,
                     concurrency=usual.most_sequences + 20_000)  # fmt: skip
    assert overfull.fits() is False


@pytest.mark.parametrize(("storage", "double"), [("nf4", False), ("nf4", True), ("int8", False)])
def test_quantising_needs_what_was_said(tmp_path: Path, storage: str, double: bool) -> None:
    pytest.importorskip("bitsandbytes")
    folder = str(save_tiny(tmp_path / "m"))
    # Wide enough that each layer's table of 256 constants is little beside its weights.
    tiny_model("llama", hidden_size=384, intermediate_size=768).save_pretrained(folder)
    plan = quantize(folder, storage=storage, double=double, capacity=GIB)
    base = models.load(folder, load_in_4bit=storage == "nf4", load_in_8bit=storage == "int8",
                       bnb_4bit_use_double_quant=double)  # fmt: skip
    assert plan.result_bytes == pytest.approx(models.census(base.model).weight_bytes, rel=0.02)
    assert plan.peak_bytes > plan.result_bytes
    assert plan.seconds > 0
    assert plan.fits() is True


@pytest.mark.parametrize(
    ("arch", "settings", "caching"),
    [
        ("lfm2", {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
                  "layer_types": ["conv", "full_attention", "conv"]}, 1),
        ("mamba", {}, 0),
        ("jamba", {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
                   "attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 2}, 1),
    ],
)  # fmt: skip
def test_layers_that_keep_a_state_alone_have_no_cache_that_grows(
    arch: str, settings: dict[str, Any], caching: int, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(arch, hidden_size=64, num_hidden_layers=3, vocab_size=128,
                                  **settings)  # fmt: skip
    config.save_pretrained(tmp_path)
    planned = serve(str(tmp_path), named("t4"), context=1024)
    assert planned.parts["KV cache"] == caching * 1024 * 2 * 2 * 16 * 2
    assert (planned.most_sequences is None) == (not caching)


def test_layers_that_read_the_cache_of_others_have_none() -> None:
    shared = {"num_hidden_layers": 6, "num_attention_heads": 2, "hidden_size": 64,
              "num_kv_shared_layers": 2}  # fmt: skip
    assert kv_cache_bytes(layer_caches(shared), 16, 1) == 4 * 16 * 2 * 64 * 2
