"""The KV cache and the weights of a server, against real caches and real layers."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from lighten import models
from lighten.errors import UserError
from lighten.machine.devices import DEVICES, named
from lighten.planning import serving, text
from lighten.planning.serve import caches_of, quantize, serve
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
    caches = layer_caches(tiny_config(arch))
    assert len(caches) == len(cache.layers)
    for layer, layer_cache in zip(cache.layers, caches, strict=True):
        assert layer.keys is not None
        per_token = (layer.keys.numel() + layer.values.numel()) // layer.keys.shape[-2]
        assert per_token == layer_cache.numbers
        # transformers keeps one token less than the window, which the next one completes.
        tokens = 32 if layer_cache.window is None else layer_cache.window - 1
        assert layer.keys.shape[-2] == tokens


HEADS: dict[str, Any] = {
    "num_attention_heads": 4, "hidden_size": 64, "vocab_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KV = {"num_key_value_heads": 2}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
DELTA = {"head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
         "linear_key_head_dim": 8, "linear_value_head_dim": 16}  # fmt: skip
GEMMA4 = {"head_dim": 16, "global_head_dim": 32, "hidden_size_per_layer_input": 8,
          "vocab_size_per_layer_input": 64, "sliding_window": 64,
          "layer_types": ["sliding_attention", "full_attention"] * 2}  # fmt: skip
FILLED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4": ("gemma4_text", {**KV, **GEMMA4, "num_kv_shared_layers": 0, "attention_k_eq_v": True,
                               "num_global_key_value_heads": 1}),
    "gemma4 shared": ("gemma4_text", {**KV, **GEMMA4, "num_kv_shared_layers": 2}),
    "falcon": ("falcon", {}),
    "falcon without multi_query": ("falcon", {"multi_query": False}),
    "gpt_bigcode": ("gpt_bigcode", {}),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global", "local"], 2]], "num_layers": 4,
                            "num_heads": 4}),
    "mpt": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 4}),
    "xglm": ("xglm", {"d_model": 64, "num_layers": 4, "attention_heads": 4, "ffn_dim": 64}),
    "mamba": ("mamba", {}),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1}),
    "falcon_mamba": ("falcon_mamba", {}),
    "qwen3_next": ("qwen3_next", {**KV, **DELTA, "num_experts": 4, "num_experts_per_tok": 2,
                                  "moe_intermediate_size": 16,
                                  "shared_expert_intermediate_size": 16}),
    "qwen3_5": ("qwen3_5_text", {**KV, **DELTA}),
    "olmo_hybrid": ("olmo_hybrid", KV),
    "lfm2": ("lfm2", {**KV, "layer_types": ["conv", "full_attention", "conv", "conv"]}),
    "falcon_h1": ("falcon_h1", {**KV, "head_dim": 16, "mamba_d_ssm": 64, "mamba_n_heads": 8,
                                "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}),
    "nemotron_h": ("nemotron_h", {**KV, "hybrid_override_pattern": "M*-M", "mamba_num_heads": 8,
                                  "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1,
                                  "head_dim": 16}),
    "bamba": ("bamba", {**KV, **MAMBA, "attn_layer_indices": [1]}),
    "granitemoehybrid": ("granitemoehybrid", {
        **KV, **MAMBA, "layer_types": ["mamba", "attention", "mamba", "mamba"],
        "num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 32}),
    "jamba": ("jamba", {**KV, "attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", FILLED)
def test_caches_and_states_are_as_large_as_those_that_the_model_fills(name: str) -> None:
    """In bytes, layer by layer: keys and values of 6 tokens, last inputs, recurrent states."""
    arch, settings = FILLED[name]
    with torch.device("meta"):  # a cache's sizes are the same there
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(arch, **{**HEADS, **settings}), dtype=torch.bfloat16
        ).eval()
        with torch.no_grad():
            tokens = torch.ones(1, 6, dtype=torch.long)
            filled = model(input_ids=tokens, use_cache=True).past_key_values
    caches = caches_of(model)
    assert len(caches) == len(filled.layers)
    for layer, layer_cache in zip(filled.layers, caches, strict=True):
        kept = [getattr(layer, "keys", None), getattr(layer, "values", None)]
        per_token = sum(tensor.numel() for tensor in kept if tensor is not None) // 6
        assert layer_cache.numbers == per_token
        states = [
            tensor
            for kind in ("conv_states", "recurrent_states")
            for tensor in (getattr(layer, kind, None) or {}).values()
            if tensor is not None
        ]
        assert serving.state_bytes([layer_cache], 1) == sum(tensor.nbytes for tensor in states)
        assert layer_cache.state_known


@pytest.mark.parametrize("arch", ["dbrx", "longcat_flash", "xlnet", "rwkv", "xlstm"])
def test_sizes_that_a_configuration_names_otherwise_are_read(arch: str) -> None:
    """They are no keys of its dictionary. By hand, as transformers cannot run them so small."""
    config = AutoConfig.for_model(arch)
    expected = {
        "dbrx": [2 * 128] * 24,  # one head for all queries
        "longcat_flash": [512 + 64] * 56,  # two attentions in each of 28 layers
        "xlnet": [2 * 1024] * 24,
        "rwkv": [0] * 32,
        "xlstm": [0] * 32,
    }[arch]
    caches = layer_caches(config)
    assert [layer.numbers for layer in caches] == expected
    assert all(layer.state_known == (arch not in ("rwkv", "xlstm")) for layer in caches)


def test_a_configuration_without_layers_is_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match="t: its configuration does not say how many layers"):
        layer_caches(SimpleNamespace(model_type="t"))


def test_published_caches_by_hand() -> None:
    # Llama 3.1 8B: 32 layers, 8 KV heads of 128, 16 bits: 128 KiB per token.
    shape = {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096,
             "num_key_value_heads": 8}  # fmt: skip
    llama = layer_caches(SimpleNamespace(**shape))
    assert kv_cache_bytes(llama, 4096, 1) == 4096 * 128 * 1024
    assert kv_cache_bytes(llama, 4096, 32) == 16 * GIB
    assert kv_cache_bytes(llama, 4097, 1) == 4112 * 128 * 1024  # one more block
    # Mistral 7B v0.1 keeps 4096 tokens of any context.
    mistral = layer_caches(SimpleNamespace(**shape, sliding_window=4096))
    assert kv_cache_bytes(mistral, 32768, 1) == kv_cache_bytes(mistral, 4096, 1)
    # Falcon 40B: 60 layers, 8 groups of 64; `multi_query` is true in its configuration.
    falcon = layer_caches(
        AutoConfig.for_model(
            "falcon", new_decoder_architecture=True, num_kv_heads=8, hidden_size=8192,
            num_attention_heads=128, num_hidden_layers=60,
        )
    )  # fmt: skip
    assert {layer.numbers for layer in falcon} == {2 * 8 * 64}
    # DeepSeek-V2: 512 + 64 numbers per token and layer, for 128 heads (arXiv 2405.04434).
    deepseek = layer_caches(
        SimpleNamespace(
            num_hidden_layers=60, num_attention_heads=128, hidden_size=5120, kv_lora_rank=512,
            qk_rope_head_dim=64,
        )
    )  # fmt: skip
    assert kv_cache_bytes(deepseek, 16, 1) == 16 * 60 * 576 * 2
    assert kv_cache_bytes([LayerCache(8)], 16, 1, number_bytes=1) == 128


def test_a_base_with_states_alone_has_a_most_of_sequences(tmp_path: Path) -> None:
    AutoConfig.for_model("falcon_mamba", **HEADS).save_pretrained(tmp_path)
    plan = serve(str(tmp_path), DEVICES["l4"], concurrency=256)
    assert plan.parts["KV cache"] == 0
    # Of 96 channels: 4 inputs in 16 bits and 16 numbers in float32.
    assert plan.parts["recurrent states"] == 256 * 4 * 96 * (4 * 2 + 16 * 4)
    assert plan.most_sequences is not None
    assert plan.left_out == ()


def test_what_is_not_known_of_a_state_is_said(tmp_path: Path) -> None:
    AutoConfig.for_model("rwkv", vocab_size=64, hidden_size=64, num_hidden_layers=4,
                         attention_hidden_size=64).save_pretrained(tmp_path)  # fmt: skip
    plan = serve(str(tmp_path), DEVICES["l4"])
    assert plan.left_out == ("the state of 4 layers: of rwkv it is not known",)
    assert ["left out", "–", plan.left_out[0]] in text.serving_rows(plan)


def test_a_step_reads_the_experts_and_adapters_that_so_many_sequences_use(tmp_path: Path) -> None:
    """At 64 experts, 1 of them for a token, one sequence reads a small part of the weights."""
    for name, experts in (("few", 1), ("many", 64)):
        save_tiny(tmp_path / name, "mixtral", num_local_experts=experts, num_experts_per_tok=1)
    few, many = (serve(str(tmp_path / name), DEVICES["l4"]) for name in ("few", "many"))
    assert many.parts["base weights"] > 10 * few.parts["base weights"]
    assert few.tokens_per_s is not None
    assert many.tokens_per_s == pytest.approx(few.tokens_per_s, rel=0.1)
    assert serving.share_read(4, 1, 2) == pytest.approx(1 - (3 / 4) ** 2)
    assert serving.share_read(4, 4, 1) == 1.0
    one, hundred = (serve(str(tmp_path / "few"), DEVICES["l4"], adapters=n) for n in (1, 100))
    assert one.tokens_per_s == pytest.approx(hundred.tokens_per_s)


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
    assert planned.parts["recurrent states"] > 0
    assert planned.most_sequences is not None


def test_layers_that_read_the_cache_of_others_have_none() -> None:
    shared = SimpleNamespace(num_hidden_layers=6, num_attention_heads=2, hidden_size=64,
                             num_kv_shared_layers=2)  # fmt: skip
    assert kv_cache_bytes(layer_caches(shared), 16, 1) == 4 * 16 * 2 * 64 * 2
