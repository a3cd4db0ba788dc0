"""Models as GGUF files: llama.cpp computes what transformers computes, or the model is refused."""

from __future__ import annotations

import errno
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from lighten.errors import UserError
from lighten.gguf_names import stored_name
from lighten.quantization import executorch
from lighten.quantization.gguf_model import pack, plan_gguf, write_gguf
from lighten.quantization.gguf_tokenizer import read_vocabulary
from lighten.quantization.llamacpp import Runtime
from tests.tiny import CHATML, save_tiny, tiny_model, tiny_tokenizer

ROPE = {"rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, **ROPE}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **ROPE}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.4],
        "long_factor": [1.0, 2.0, 4.0, 8.0], **ROPE}  # fmt: skip
# Each architecture as it comes, and with every switch that a file has to say.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases, long heads": (
        "llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    ),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, **ROPE}}),
    "llama, llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "llama, yarn, attention": (
        "llama",
        {"rope_parameters": {**YARN, "attention_factor": 1.5}},
    ),
    "llama, yarn, mscale": (
        "llama", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
    ),
    "llama, longrope": (
        "llama", {"rope_parameters": {**LONG, "original_max_position_embeddings": 256,
                                      "factor": 2.0}, "max_position_embeddings": 512},
    ),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2, untied, yarn": ("qwen2", {"tie_word_embeddings": False, "rope_parameters": YARN}),
    "qwen3": (
        "qwen3", {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 8}),
    "gemma2, another scale": (
        "gemma2", {"query_pre_attn_scalar": 20, "attn_logit_softcapping": 5.0},
    ),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 8, "num_hidden_layers": 7}),
    "gemma3, linear, another scale": (
        "gemma3_text",
        {
            "query_pre_attn_scalar": 24, "final_logit_softcapping": 4.0,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3, longrope, half turned": (
        "phi3",
        {
            "sliding_window": None, "hidden_size": 64, "tie_word_embeddings": True,
            "original_max_position_embeddings": 256, "max_position_embeddings": 512,
            "rope_parameters": {**LONG, "partial_rotary_factor": 0.5,
                                "original_max_position_embeddings": 256},
        },
    ),
    "gpt2": ("gpt2", {}),
    "gpt2, untied, narrow": ("gpt2", {"tie_word_embeddings": False, "n_inner": 64}),
}  # fmt: skip
PROMPTS = [[5, 77, 130, 9, 201], [64, 12, 300, 41, 180, 7, 99, 33, 250, 18, 6, 111]]


def save_model(folder: Path, arch: str, changes: dict[str, Any] | None = None) -> PreTrainedModel:
    """A tiny model in a folder, with norms and biases that matter."""
    model = tiny_model(arch, **(changes or {}))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    """Traps 18 and 49: order of queries and keys, rows of the vocabulary, 64 greedy tokens."""
    model = save_model(tmp_path / "model", *MODELS[name])
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32")
    # GELU is a table of float16 in llama.cpp; sums are taken in another order.
    tolerance = 1e-2 if MODELS[name][0].startswith("g") else 1e-4
    with Runtime(tmp_path / "model.gguf", context_tokens=96, threads=1) as runtime:
        for prompt in PROMPTS:
            answer = runtime.greedy(prompt, 64, stop=False)
            tokens = prompt + answer
            scores = runtime.logits(tokens)
            with torch.no_grad():
                expected = model(torch.tensor([tokens])).logits[0].numpy()
            assert np.abs(scores - expected).max() < tolerance
            # Greedy answers are the same, or two tokens were nearly as likely as each other.
            for place, token in enumerate(answer, len(prompt) - 1):
                best = expected[place].max()
                assert best - expected[place, token] <= 2 * tolerance


def test_the_window_is_the_context_where_llama_cpp_has_none(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "mistral", {"sliding_window": 16})
    plan = write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32")
    assert "16 tokens" in plan.notes[0]
    with torch.no_grad():
        expected = model(torch.tensor([PROMPTS[1]])).logits[0].numpy()
    with Runtime(tmp_path / "model.gguf", context_tokens=16, threads=1) as runtime:
        assert np.abs(runtime.logits(PROMPTS[1]) - expected).max() < 1e-4


def _check_same_logits(
    model: PreTrainedModel, folder: Path, target: Path, tolerance: float = 1e-4
) -> None:
    write_gguf(folder, target, "f32")
    with torch.no_grad():
        expected = model(torch.tensor([PROMPTS[1]])).logits[0].numpy()
    with Runtime(target, context_tokens=16, threads=1) as runtime:
        assert np.abs(runtime.logits(PROMPTS[1]) - expected).max() < tolerance


def _rename_weights(folder: Path, rename: Any, **extra: torch.Tensor) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({rename(key): value for key, value in weights.items()} | extra,
              folder / "model.safetensors")  # fmt: skip


def test_a_sharded_model_with_settings_of_before_transformers_5(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = save_model(folder, "llama", {"rope_parameters": LLAMA3})
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    config = json.loads((folder / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = scaling
    (folder / "config.json").write_text(json.dumps(config))
    _check_same_logits(model, folder, tmp_path / "model.gguf")
    next(folder.glob("*-00002-of-*.safetensors")).unlink()
    with pytest.raises(UserError, match="00002"):
        plan_gguf(folder, "f32")


def test_a_gpt2_as_the_hub_has_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = save_model(folder, "gpt2")
    buffers = {f"h.{layer}.attn.bias": torch.ones(1, 1, 8, 8) for layer in range(2)}
    _rename_weights(folder, lambda key: key.removeprefix("transformer."), **buffers)
    _check_same_logits(model, folder, tmp_path / "model.gguf", 1e-2)


def test_a_gemma_whose_settings_rely_on_defaults_beside_a_picture_tower(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = save_model(folder, "gemma3_text", {"query_pre_attn_scalar": 256})
    text = json.loads((folder / "config.json").read_text())
    for key in ("query_pre_attn_scalar", "rms_norm_eps", "layer_types", "architectures"):
        text.pop(key, None)
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(config))
    _rename_weights(
        folder,
        lambda key: key.replace("model.", "language_model.model.", 1),
        **{"vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": torch.ones(4, 4)},
    )
    _check_same_logits(model, folder, tmp_path / "model.gguf", 1e-2)
    assert "picture tower" in plan_gguf(folder, "f16").notes[0]


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "gpt2", "phi3", "qwen3"])
def test_our_own_reader_gets_the_model_back(arch: str, tmp_path: Path) -> None:
    from lighten.models.gguf import convert

    # 256 is what every Gemma but the largest divides scores by; files do not say it.
    changes = {"phi3": {"sliding_window": None}, "gemma3_text": {"head_dim": 256}}.get(arch)
    model = save_model(tmp_path / "model", arch, changes)
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32")
    convert(tmp_path / "model.gguf", tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    for key, weight in model.state_dict().items():
        # Gemma's norms went through 1 + w and back.
        assert torch.allclose(back[key], weight, rtol=0, atol=1e-6), key


@pytest.mark.parametrize(
    ("type", "tolerance"),
    # Of normal weights: half a step of the format, relative to their deviation.
    [
        ("f16", 3e-4),
        ("bf16", 2.5e-3),
        ("q8_0", 8e-3),
        ("q6_k", 2.5e-2),
        ("q5_k_m", 5e-2),
        ("q4_k_m", 9e-2),
        ("q4_0", 0.12),
    ],
)
def test_types_are_as_near_as_their_bits(type: str, tolerance: float, tmp_path: Path) -> None:
    size = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 3}
    model = save_model(tmp_path / "model", "llama", size)
    plan = plan_gguf(tmp_path / "model", type)
    written = write_gguf(tmp_path / "model", tmp_path / "model.gguf", type)
    assert written == plan
    assert not plan.fallbacks
    header = (tmp_path / "model.gguf").stat().st_size - plan.bytes
    assert 0 < header < 20_000
    with torch.no_grad():
        expected = model(torch.tensor([PROMPTS[1]])).logits[0].numpy()
    with Runtime(tmp_path / "model.gguf", context_tokens=64, threads=1) as runtime:
        difference = runtime.logits(PROMPTS[1]) - expected
    if type in ("f16", "bf16", "q8_0"):
        # Three layers, each of which adds its own rounding.
        assert np.sqrt(np.mean(difference**2) / np.mean(expected**2)) < 10 * tolerance
    reader = GGUFReader(tmp_path / "model.gguf")
    errors = []
    for tensor in reader.tensors:
        if len(tensor.shape) == 2 and "attn_q" not in tensor.name and "attn_k" not in tensor.name:
            values = dequantize(tensor.data, tensor.tensor_type)
            original = next(
                weight for path, weight in model.state_dict().items()
                if f"{stored_name('llama', path.rpartition('.')[0])}.weight" == tensor.name
            ).numpy()  # fmt: skip
            errors.append(np.sqrt(np.mean((values - original) ** 2) / np.mean(original**2)))
    assert len(errors) == 5 * 3 + 2
    assert max(errors) < tolerance


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ4_NL"])
def test_numbers_that_a_block_cannot_say_are_refused(kind: str) -> None:
    """A block's scale is a float16: beyond it, what was written were infinities."""
    values = np.ones((2, 256), dtype=np.float32)
    values[1, 3] = 7e4  # the scale is smaller than that
    ggml_type = GGMLQuantizationType[kind]
    read_back = dequantize(pack(values, ggml_type, 1, "it"), ggml_type)
    assert read_back[1, 3] == pytest.approx(7e4, rel=0.1)
    values[1, 3] = -1e10
    with pytest.raises(UserError, match="it holds numbers beyond what float16 can say; choose"):
        pack(values, ggml_type, 1, "it")


def test_rows_that_do_not_fit_the_block_fall_back_and_say_so(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama", {"hidden_size": 64, "num_hidden_layers": 8})
    plan = write_gguf(tmp_path / "model", tmp_path / "model.gguf", "q4_k_m")
    assert set(plan.fallbacks) == {("Q4_K", "Q5_0"), ("Q4_K", "F16"), ("Q6_K", "Q8_0"),
                                   ("Q6_K", "F16")}  # fmt: skip
    assert sum(plan.fallbacks.values()) == 7 * 8 + 1
    assert any("are Q5_0 and not Q4_K" in sentence for sentence in plan.sentences())
    with Runtime(tmp_path / "model.gguf", context_tokens=64, threads=1) as runtime:
        assert np.isfinite(runtime.logits(PROMPTS[0])).all()


TEXTS = [
    "the answer is the question", "Ünïcode 日本語 🦙 it's 12345 fine\n\n  x = 3\t!",
    "<|im_start|>user\nhi<|im_end|>\n", " leading and trailing  ",
]  # fmt: skip


def test_the_template_and_the_tokens_are_the_same(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama")
    tokenizer = tiny_tokenizer()
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f16")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the question"}], tokenize=False
    )
    with Runtime(tmp_path / "model.gguf", context_tokens=64, threads=1) as runtime:
        assert runtime.chat_template == CHATML
        for text in [*TEXTS, chat]:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert runtime.tokenise(text) == ids
            assert runtime.text(ids, special=True) == text
        # llama.cpp also stops at </s>, token 2, whoever names it.
        assert [runtime.ends(token) for token in (1, 3, 4)] == [False, False, True]


def test_all_that_ends_an_answer_is_named(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama")
    (tmp_path / "model" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [4, 2, 1]})
    )
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f16")
    with Runtime(tmp_path / "model.gguf", context_tokens=64, threads=1) as runtime:
        assert [runtime.ends(token) for token in (1, 2, 4)] == [True, True, True]


@pytest.mark.parametrize("generation", [None, {"eos_token_id": None}])
def test_what_ends_an_answer_is_the_models_where_its_generation_settings_do_not_say(
    generation: dict[str, Any] | None, tmp_path: Path
) -> None:
    save_model(tmp_path, "llama")
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "eos_token_id": [4]}))
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert 4 in read_vocabulary(tmp_path, config["vocab_size"]).ends
    assert executorch._ends(tmp_path)[0] == 4


def test_an_added_token_that_the_model_has_no_row_for_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Gemma 3's small models share a tokenizer with those that see: it has a token for pictures."""
    save_model(tmp_path / "model", "llama")
    file = tmp_path / "model" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["added_tokens"].append(
        {**tokenizer["added_tokens"][0], "id": 320, "content": "<pic>"}
    )
    file.write_text(json.dumps(tokenizer))
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f16")
    assert "leaves out <pic>" in caplog.text
    with Runtime(tmp_path / "model.gguf", context_tokens=64, threads=1) as runtime:
        assert runtime.vocabulary_size == 320
        assert runtime.tokenise(TEXTS[0]) == tiny_tokenizer()(TEXTS[0])["input_ids"]


def test_padding_rows_of_the_vocabulary_are_tokens_of_no_use(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama")
    model.resize_token_embeddings(384)
    model.save_pretrained(tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32")
    with torch.no_grad():
        expected = model(torch.tensor([PROMPTS[0]])).logits[0].numpy()
    with Runtime(tmp_path / "model.gguf", context_tokens=64, threads=1) as runtime:
        assert runtime.vocabulary_size == 384
        assert np.abs(runtime.logits(PROMPTS[0]) - expected).max() < 1e-4


@pytest.mark.parametrize(
    ("arch", "changes", "message"),
    [
        ("opt", {}, "'opt'"),
        ("mixtral", {}, "'mixtral'"),
        ("llama", {"hidden_act": "gelu"}, "activation is 'gelu'"),
        ("llama", {"rope_parameters": {**YARN, "truncate": False}}, "not truncated"),
        ("llama", {"rope_parameters": {**YARN, "beta_fast": 20.0}}, "beta_fast 20"),
        ("qwen2", {"rope_parameters": {**ROPE, "rope_type": "default",
                                       "partial_rotary_factor": 0.5}}, "turns 4 of 8"),
        ("qwen3", {"attention_bias": True}, "has the bias"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping is off"),
        ("gemma3_text", {"num_hidden_layers": 4, "layer_types": [
            "full_attention", "full_attention", "sliding_attention", "full_attention"]},
         "alternate"),
    ],
)  # fmt: skip
def test_what_llama_cpp_does_not_compute_is_refused(
    arch: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    # Some of these no class of transformers builds: they stand in the file alone.
    folder = tmp_path / "model"
    save_model(folder, arch, {} if arch == "qwen2" else changes)
    if arch == "qwen2":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match=message):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_mistake_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, target = tmp_path / "model", tmp_path / "model.gguf"
    save_model(folder, "llama")
    weights = (folder / "model.safetensors").read_bytes()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())

    def assert_refused(message: str, type: str = "f16") -> None:
        with pytest.raises(UserError, match=message) as error:
            write_gguf(folder, target, type)
        assert "\n" not in str(error.value)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    assert_refused("q4_k_x.*q4_k_m", "q4_k_x")
    (folder / "model.safetensors").write_bytes(weights[:-64])
    assert_refused("it ends before model.norm.weight")
    (folder / "model.safetensors").write_bytes(weights[:20])
    assert_refused("safetensors file")
    (folder / "model.safetensors").write_bytes(weights)
    for change, message in [
        ({"model": {**tokenizer["model"], "type": "Unigram"}}, "Unigram"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace.*other tokens"),
        ({"model": {"type": "BPE"}}, "tokenizer.json is no tokenizer"),
        ({"model": {**tokenizer["model"], "merges": [[1, 2]]}}, "tokenizer.json is no tokenizer"),
        (
            {"model": {**tokenizer["model"], "vocab": {**tokenizer["model"]["vocab"], "zz": 900}}},
            "token 900 .* 320 rows",
        ),
    ]:
        (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, **change}))
        assert_refused(message)
    (folder / "tokenizer.json").unlink()
    assert_refused("no tokenizer.json")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "config.json").read_text())
    for values, message in [
        ({"num_hidden_layers": 3}, "lacks the weight"),
        ({"num_hidden_layers": "many"}, "config.json holds settings.*many"),
        ({"num_attention_heads": 0}, "0 heads"),
        ({"rope_parameters": {"rope_type": "linear"}}, "config.json holds settings.*factor"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "'spiral'"),
        ({"num_hidden_layers": 1}, "more layers"),
        ({"num_attention_heads": 8}, "heads of"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised already"),
    ]:
        (folder / "config.json").write_text(json.dumps({**config, **values}))
        assert_refused(message)
    (folder / "config.json").write_text(json.dumps(config))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("gguf.GGUFWriter.write_tensor_data", full)
        assert_refused("disk is full")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    model.save_pretrained(folder)
    assert_refused("not finite")


def test_a_torn_file_is_refused_by_the_runtime(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama")
    target = tmp_path / "model.gguf"
    write_gguf(tmp_path / "model", target, "f16")
    content = target.read_bytes()
    for size, message in [(100, "torn"), (len(content) - 64, "torn"), (3, "not a GGUF file")]:
        target.write_bytes(content[:size])
        with pytest.raises(UserError, match=message):
            Runtime(target, context_tokens=16)


def test_the_runtime_says_why_llama_cpp_refuses(tmp_path: Path) -> None:
    from tests.gguf_files import write_gguf as write_any

    model = tiny_model("llama")
    extra = {"blk.0.no_such_part.weight": np.zeros((4, 4), dtype=np.float32)}
    file = write_any(tmp_path / "model.gguf", model, tensors=extra)
    with pytest.raises(UserError, match="wrong number of tensors"):
        Runtime(file, context_tokens=16)
    with pytest.raises(UserError, match="does not fit a context"):  # noqa: SIM117
        with Runtime(write_any(tmp_path / "model.gguf", model), context_tokens=16) as runtime:
            runtime.logits(list(range(5, 40)))


def test_memory_is_that_of_a_few_tensors(tmp_path: Path) -> None:
    size = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 12}
    model = save_model(tmp_path / "model", "llama", size)
    model_bytes = sum(weight.nbytes for weight in model.state_dict().values())
    largest = max(weight.nbytes for weight in model.state_dict().values())
    write_gguf(tmp_path / "model", tmp_path / "warm.gguf", "q4_k_m")  # packages are loaded
    tracemalloc.start()
    try:
        write_gguf(tmp_path / "model", tmp_path / "model.gguf", "q4_k_m")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # As read, reordered, checked for numbers that are not finite, packed; and the header.
    assert peak < 5 * largest + 2**20 < model_bytes / 4


def test_a_fall_back_names_the_block_that_rows_are_no_multiple_of(tmp_path: Path) -> None:
    """Q8_0 has blocks of 32: rows of 256 were asked for where 64 would have done."""
    base = save_tiny(tmp_path / "base", hidden_size=32, intermediate_size=48)
    sentences = plan_gguf(base, "q8_0").sentences()
    assert any("Q8_0: their rows are no multiple of 32" in text for text in sentences)
    sentences = plan_gguf(base, "q4_k_m").sentences()
    assert any("Q4_K: their rows are no multiple of 256" in text for text in sentences)
