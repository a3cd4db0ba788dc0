"""Tiny GGUF files as llama.cpp's converter writes them, from tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from transformers import PreTrainedModel

from tests.tiny import CHATML, tiny_tokenizer

ARCHITECTURES = {"gemma3_text": "gemma3", "mistral": "llama"}


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    settings: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray[Any, Any]] | None = None,
    quantized: bool = False,
    tokens: int | None = None,
    name: str = "tiny",
    pre: str | None = "gpt-2",
) -> Path:
    """Write a model with its tokenizer.

    Args:
        path: Where.
        model: What.
        settings: Further keys of the header, without the architecture; None leaves a key out.
        tensors: Further tensors.
        quantized: Linear layers in Q8_0 where their rows allow it.
        tokens: Words of the vocabulary, those beyond the tokenizer's made up.
        name: `general.name`.
        pre: `tokenizer.ggml.pre`; None leaves it out.
    """
    config = model.config
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = GGUFWriter(path, architecture)
    writer.add_name(name)
    values = {**_settings(config, architecture), **(settings or {})}
    for key, value in values.items():
        if value is None:
            continue
        key = f"{architecture}.{key}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_string(key, value)
    _tokenizer(writer, tokens or config.vocab_size, pre)
    arch = next(
        candidate for candidate, arch_name in MODEL_ARCH_NAMES.items() if arch_name == architecture
    )
    for stored, data in {**_weights(model, architecture, arch), **(tensors or {})}.items():
        if quantized and data.ndim == 2 and data.shape[1] % 32 == 0:
            raw = quantize(data, GGMLQuantizationType.Q8_0)
            writer.add_tensor(stored, raw, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(stored, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _settings(config: Any, architecture: str) -> dict[str, Any]:
    heads = config.num_attention_heads
    values: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": heads,
    }
    if architecture == "gpt2":
        return {
            **values,
            "feed_forward_length": config.n_inner or 4 * config.n_embd,
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    values |= {
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head * rope.get("partial_rotary_factor", 1.0)),
    }
    if architecture in ("qwen3", "gemma2", "gemma3"):
        values |= {"attention.key_length": head, "attention.value_length": head}
    if architecture in ("gemma2", "gemma3"):
        values["attention.sliding_window"] = config.sliding_window
    if architecture == "gemma2":
        values["attn_logit_softcapping"] = config.attn_logit_softcapping
        values["final_logit_softcapping"] = config.final_logit_softcapping
    if architecture == "phi3":
        values["attention.sliding_window"] = config.sliding_window or 0
    return values


def _weights(model: PreTrainedModel, architecture: str, arch: MODEL_ARCH) -> dict[str, Any]:
    config = model.config
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    stored: dict[str, Any] = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        base, _, suffix = name.rpartition(".")
        stored_name = names.get_name(base)
        assert stored_name is not None, name
        data = weight.detach().float().numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            halves = data.reshape(heads, 2, data.shape[0] // heads // 2, *data.shape[1:])
            data = halves.swapaxes(1, 2).reshape(data.shape)
        if architecture.startswith("gemma") and "norm" in name:
            data = data + np.float32(1)
        if architecture == "gpt2" and "c_" in name and suffix == "weight":
            data = data.T
        stored[f"{stored_name}.{suffix}"] = np.ascontiguousarray(data)
    return stored


def _tokenizer(writer: GGUFWriter, tokens: int, pre: str | None) -> None:
    tokenizer = tiny_tokenizer()
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    special = {token.content for token in tokenizer.added_tokens_decoder.values()}
    types = [3 if token in special else 1 for token in vocabulary]
    fillers = tokens - len(vocabulary)
    merges = [" ".join(pair) for pair in _merges(tokenizer)]
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list([*vocabulary, *(f"zz{i}" for i in range(fillers))])
    writer.add_token_types([*types, *([1] * fillers)])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(4)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHATML)


def _merges(tokenizer: Any) -> list[list[str]]:
    import json

    merges: list[list[str]] = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return merges


def llama3_factors(config: Any) -> np.ndarray[Any, Any]:
    """`rope_freqs.weight` as llama.cpp's converter computes it."""
    rope = config.rope_parameters
    head = config.hidden_size // config.num_attention_heads
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, head, 2).float() / head)
    before = rope["original_max_position_embeddings"]
    low, high = before / rope["low_freq_factor"], before / rope["high_freq_factor"]
    factors = []
    for frequency in frequencies.tolist():
        wavelength = 2 * np.pi / frequency
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(rope["factor"])
        else:
            smooth = (before / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.asarray(factors, dtype=np.float32)
