"""GGUF bases are read as the model they hold, or refused; prompts are longer than every window."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lighten import api, models
from lighten.errors import UserError
from lighten.machine.devices import named
from lighten.models import gguf
from lighten.models.gguf_header import read_header
from lighten.planning import predict
from tests.gguf_files import llama3_factors, write_gguf
from tests.tiny import tiny_model, tiny_tokenizer

IDS = torch.arange(5, 133).remainder(300)[None] + 5
THETA = 10000.0
LINEAR = {"rope_type": "linear", "rope_theta": THETA, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": THETA, "factor": 4.0,
        "original_max_position_embeddings": 64}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
LLAMA3_SHORT = {**LLAMA3, "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
LONG = {"rope_type": "longrope", "rope_theta": THETA, "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": 64}  # fmt: skip
GLOBAL_LINEAR = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
SIX = {"num_hidden_layers": 6}
# Architecture, changes to the tiny model, further settings of the header, further tensors.
EXACT: dict[str, tuple[str, dict[str, Any], dict[str, Any], Callable[[Any], dict[str, Any]]]] = {
    "llama": ("llama", {}, {}, lambda _: {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}, {}, lambda _: {}),
    "llama attention biases": ("llama", {"attention_bias": True}, {}, lambda _: {}),
    "llama mlp biases": ("llama", {"mlp_bias": True}, {}, lambda _: {}),
    "llama all biases": ("llama", {"mlp_bias": True, "attention_bias": True}, {}, lambda _: {}),
    "llama linear": (
        "llama", {"rope_parameters": LINEAR},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, lambda _: {},
    ),
    "llama of 2023": (
        "llama", {"rope_parameters": LINEAR}, {"rope.scale_linear": 4.0}, lambda _: {},
    ),
    "llama yarn": (
        "llama", {"rope_parameters": YARN},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
         "rope.scaling.original_context_length": 64}, lambda _: {},
    ),
    "llama 3": (
        "llama", {"rope_parameters": LLAMA3}, {},
        lambda config: {"rope_freqs.weight": llama3_factors(config)},
    ),
    "llama 3 short": (
        "llama", {"rope_parameters": LLAMA3_SHORT}, {},
        lambda config: {"rope_freqs.weight": llama3_factors(config)},
    ),
    "mistral": (
        "mistral", {"sliding_window": 8}, {"attention.sliding_window": 8}, lambda _: {},
    ),
    "mistral without a window": ("mistral", {"sliding_window": None}, {}, lambda _: {}),
    "qwen2": ("qwen2", {}, {}, lambda _: {}),
    "qwen2 yarn": (
        "qwen2", {"rope_parameters": YARN},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
         "rope.scaling.original_context_length": 64}, lambda _: {},
    ),
    "qwen2 windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        {"attention.sliding_window": 8, "attention.sliding_window_pattern": [False, True]},
        lambda _: {},
    ),
    "qwen3": ("qwen3", {}, {}, lambda _: {}),
    "qwen3 wide heads": ("qwen3", {"head_dim": 16}, {}, lambda _: {}),
    "qwen3 biases": ("qwen3", {"attention_bias": True}, {}, lambda _: {}),
    "gemma": ("gemma", {"head_dim": 8}, {}, lambda _: {}),
    "gemma2": ("gemma2", {}, {}, lambda _: {}),
    "gemma2 windows": (
        "gemma2", {"layer_types": ["full_attention", "sliding_attention"]},
        {"attention.sliding_window_pattern": [False, True]}, lambda _: {},
    ),
    "gemma3": ("gemma3_text", SIX, {}, lambda _: {}),
    "gemma3 linear": (
        "gemma3_text", {"rope_parameters": GLOBAL_LINEAR, **SIX},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, lambda _: {},
    ),
    "phi3": ("phi3", {}, {}, lambda _: {}),
    "phi3 window": ("phi3", {"sliding_window": 8}, {}, lambda _: {}),
    "phi3 long": (
        "phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64},
        {"rope.scaling.original_context_length": 64},
        lambda _: {f"rope_factors_{name}.weight": np.asarray(LONG[f"{name}_factor"], np.float32)
                   for name in ("short", "long")},
    ),
    "gpt2": ("gpt2", {}, {}, lambda _: {}),
    "gpt2 narrow": ("gpt2", {"n_inner": 64, "n_positions": 160}, {}, lambda _: {}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTEN_CACHE", str(tmp_path / "cache"))


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


@pytest.mark.parametrize("case", sorted(EXACT))
def test_a_gguf_file_is_the_model_that_was_written(case: str, tmp_path: Path) -> None:
    arch, changes, settings, extra_tensors = EXACT[case]
    model = tiny_model(arch, **changes)
    path = write_gguf(
        tmp_path / "m.gguf", model, settings=settings, tensors=extra_tensors(model.config)
    )
    base = models.load(str(path), dtype="float32", attn_implementation="eager")
    model.set_attn_implementation("eager")
    torch.testing.assert_close(_logits(base.model), _logits(model), rtol=0, atol=1e-4)
    assert models.describe(str(path)).total_parameters == sum(
        parameter.numel() for parameter in model.parameters()
    )


def test_a_large_copy_is_several_files_by_their_usual_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    path = write_gguf(tmp_path / "m.gguf", model)
    monkeypatch.setattr(gguf, "_SHARD_BYTES", 2**16)
    folder = gguf.converted(path)
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(names) > 1
    assert names == [
        f"model-{number:05d}-of-{len(names):05d}.safetensors"
        for number in range(1, len(names) + 1)
    ]  # fmt: skip
    read = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(_logits(read), _logits(model), rtol=0, atol=1e-4)


def test_the_cases_differ_from_what_was_lost(tmp_path: Path) -> None:
    # Each scaling and window matters to the logits here: reading it wrong could not go unseen.
    for case in ("llama linear", "llama yarn", "llama 3 short", "mistral", "phi3 window",
                 "phi3 long", "gemma3 linear", "qwen2 windows"):  # fmt: skip
        arch, changes, _, _ = EXACT[case]
        lost = ("rope_parameters", "sliding_window", "use_sliding_window")
        plain = {key: value for key, value in changes.items() if key not in lost}
        plain |= {"sliding_window": None} if arch in ("mistral", "phi3") else {}
        difference = _logits(tiny_model(arch, **changes)) - _logits(tiny_model(arch, **plain))
        assert difference.abs().max() > 0.01, case


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "unknown scaling": ("llama", {}, {"rope.scaling.type": "ntk"}, {}, "scales its positions"),
    "yarn without context": (
        "llama", {}, {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, {},
        "does not say the context",
    ),
    "window of the first Mistral": ("mistral", {}, {}, {"name": "Mistral-7B-v0.1"}, "its window"),
    "phi3 without a window's key": (
        "phi3", {"sliding_window": 8}, {"attention.sliding_window": None}, {}, "window",
    ),
    "partly rotary": ("llama", {}, {"rope.dimension_count": 4}, {}, "turns 4 of 8"),
    "longrope without factors": (
        "llama", {}, {"rope.scaling.type": "longrope"}, {}, "not their factors",
    ),
    "experts": ("llama", {}, {"expert_count": 8}, {}, "expert_count = 8"),
    "attention scale": ("llama", {}, {"attention.scale": 0.5}, {}, "attention.scale"),
    "qwen window without layers": (
        "qwen2", {}, {"attention.sliding_window": 8}, {}, "does not say in which layers",
    ),
    "attention factor": ("llama", {}, {"rope.scaling.attn_factor": 1.5}, {}, "attention factor"),
    "yarn with an attention factor": (
        "llama", {},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
         "rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": 1.5}, {},
        "attention factor",
    ),
    "capped scores": (
        "llama", {}, {"attn_logit_softcapping": 30.0}, {}, "attn_logit_softcapping = 30",
    ),
    "capped logits": ("gemma", {"head_dim": 8}, {"final_logit_softcapping": 30.0}, {}, "softcap"),
    "a window of GPT-2": ("gpt2", {}, {"attention.sliding_window": 8}, {}, "sliding_window = 8"),
    "windows in some layers of Mistral": (
        "mistral", {"sliding_window": 8},
        {"attention.sliding_window": 8, "attention.sliding_window_pattern": [True, False]}, {},
        "sliding_window_pattern",
    ),
    "parallel layers": ("llama", {}, {"use_parallel_residual": True}, {}, "parallel_residual"),
    "unknown tensor": (
        "llama", {}, {}, {"tensors": {"blk.0.attn_gate.weight": np.ones((4, 4), np.float32)}},
        r"holds the tensor blk\.0\.attn_gate\.weight",
    ),
    "norm of the heads": (
        "qwen2", {}, {}, {"tensors": {"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}},
        r"holds the tensor blk\.0\.attn_q_norm\.weight",
    ),
    "other layers": ("llama", {}, {"block_count": 3}, {}, "lacks the weight"),
    "fewer layers": ("llama", {}, {"block_count": 1}, {}, "no such weight"),
    "unknown splitting": (
        "llama", {}, {}, {"pre": "viking"}, "splits text as 'viking'.*not known",
    ),
    "no splitting": ("llama", {}, {}, {"pre": None}, "does not say how text is split"),
    "architecture": ("opt", {}, {}, {}, "architecture 'opt'"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_a_header_does_not_say_is_refused_and_nothing_is_kept(
    case: str, tmp_path: Path
) -> None:
    arch, changes, settings, options, message = REFUSED[case]
    if arch == "opt":
        import gguf as library

        path = tmp_path / "m.gguf"
        writer = library.GGUFWriter(path, "opt")
        writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
        for part in ("header", "kv_data", "tensors"):
            getattr(writer, f"write_{part}_to_file")()
        writer.close()
    else:
        path = write_gguf(
            tmp_path / "m.gguf", tiny_model(arch, **changes), settings=settings, **options
        )
    with pytest.raises(UserError, match=message) as error:
        models.load(str(path))
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").rglob("model*.safetensors"))


def test_a_copy_is_kept_for_the_file_and_made_anew_when_it_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), quantized=True)
    first_copy = gguf.converted(path)
    assert len(caplog.records) == 1
    assert "converting" in caplog.text
    before = (first_copy / "model.safetensors").stat().st_mtime_ns
    assert gguf.converted(path) == first_copy
    assert len(caplog.records) == 1
    assert (first_copy / "model.safetensors").stat().st_mtime_ns == before
    write_gguf(path, tiny_model("llama", seed=1), quantized=True)
    assert gguf.converted(path) != first_copy
    assert not list((tmp_path / "cache" / "gguf").rglob(".convert-*"))


def test_what_gemmas_file_leaves_open_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("gemma2"))
    models.load(str(path), dtype="float32")
    assert caplog.text.count("does not say by what scores are divided") == 1


def test_a_quantised_file_is_its_dequantised_weights(tmp_path: Path) -> None:
    model = tiny_model("llama")
    path = write_gguf(tmp_path / "m.gguf", model, quantized=True)
    base = models.load(str(path), dtype="float32")
    weight = base.model.state_dict()["model.layers.1.mlp.up_proj.weight"]
    exact = model.state_dict()["model.layers.1.mlp.up_proj.weight"]
    assert 0 < (weight - exact).abs().max() < exact.abs().max() / 127


@pytest.mark.parametrize("cut", [3, 20, 100, 2000, -100])
def test_a_torn_file_is_one_sentence(cut: int, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match="torn") as error:
        models.describe(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"GGUF" + bytes(20), b"GGUF\x03\0\0\0" + b"\xff" * 40]
)
def test_something_else_under_the_name_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"m\.gguf"):
        models.load(str(path))


def test_a_part_of_a_split_model_says_how_to_join_it(tmp_path: Path) -> None:
    import gguf as library

    writer = library.GGUFWriter(tmp_path / "m-00001-of-00002.gguf", "llama")
    writer.add_uint16("split.count", 2)
    for part in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{part}_to_file")()
    writer.close()
    with pytest.raises(UserError, match="gguf-split --merge"):
        models.describe(str(tmp_path / "m-00001-of-00002.gguf"))


def test_the_tokenizer_is_that_of_transformers_and_the_header_skips_its_words(
    tmp_path: Path,
) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama", vocab_size=6000))
    header = read_header(path)
    assert header.settings["tokenizer.ggml.tokens"] == 6000
    tokenizer = gguf.read_tokenizer(path)
    cached = gguf.read_tokenizer(path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    text = "the answer <|im_start|>user\nis 42 </s>"
    ids = theirs(text).input_ids
    assert tokenizer(text).input_ids == cached(text).input_ids == ids
    assert cached.chat_template == tiny_tokenizer().chat_template
    assert cached.eos_token == "<|im_end|>"


def test_gpt2_splits_text_its_own_way_without_a_word(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("gpt2"), pre=None)
    ids = tiny_tokenizer()("the answer is 42").input_ids
    assert gguf.read_tokenizer(path)("the answer is 42").input_ids == ids


def test_a_plan_counts_the_copy_that_is_not_made_yet_and_times_reading_the_one_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTEN_CACHE", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama", num_hidden_layers=4))
    settings: dict[str, Any] = {"offload_base": "disk", "max_length": 16}
    recipe = api.plannable(None, model_name_or_path=str(path), **settings)
    before = predict.plan(recipe, named("cpu"), changes=False)
    assert "as they are read, are not on this machine yet" in " ".join(before.notes)
    gguf.converted(path)
    after = predict.plan(recipe, named("cpu"), changes=False)
    assert re.search(r"each step reads .* MB/s \(measured on ", " ".join(after.notes))
    assert before.disk_bytes - after.disk_bytes == gguf.conversion_bytes(path)[0] > 0
