"""From a GGUF file's header to a transformers configuration; what the header leaves open is said.

transformers' own reader drops rotary scaling, windows and biases without a word, and comes back
with another model. Here every setting and every tensor of the file is either taken or refused.
Keys and their meanings: llama.cpp's `gguf-py/gguf/constants.py` and `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import AutoConfig

from lighten.errors import UserError
from lighten.models.configuration import FAULTS, reason
from lighten.models.gguf_header import Header

log = logging.getLogger(__name__)

# Settings of an architecture that are read here, or change nothing of what it computes.
_READ = {
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon",
    "attention.causal", "rope.freq_base", "rope.dimension_count", "rope.scaling.type",
    "rope.scaling.factor", "rope.scale_linear",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scaling.attn_factor",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
}  # fmt: skip
# Settings that are read for these architectures alone.
_READ_FOR = {
    "attention.sliding_window": {"llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3"},
    "attention.sliding_window_pattern": {"qwen2", "qwen3", "gemma2", "gemma3"},
    "attn_logit_softcapping": {"gemma2", "gemma3"},
    "final_logit_softcapping": {"gemma2", "gemma3"},
    "rope.freq_base_swa": {"gemma3"},
}
# Others of these kinds would change it.
_MATTERS = re.compile(
    r"^(rope|attention|expert|ssm)[._]|scale|softcap|bias|clamp|leading_dense|parallel"
)
_WINDOW_OF_PHI3_4K = 2047  # microsoft/Phi-3-mini-4k-instruct and -medium-4k-, config.json
# mistralai/Mistral-7B-v0.1, config.json
_WINDOW_OF_MISTRAL = 4096
_MISTRAL_SHAPE = {"hidden_size": 4096, "num_hidden_layers": 32, "max_position_embeddings": 32768}
_GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS = 46, 62
# Llama 3.1 to 3.3, config.json: low and high frequency factors, and the positions before.
_LLAMA3 = (1.0, 4.0, 8192)
_GEMMA_HEAD = 256
_GEMMA3_PATTERN = 6  # five layers with a window, then one without


def config_of(header: Header) -> Any:
    """The configuration of the model that a GGUF file holds.

    Raises:
        UserError: The header does not say enough, or says what cannot be rebuilt.
    """
    architecture = header.architecture
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{header.path} is a GGUF file of the architecture {architecture!r}; those that are "
            f"read are {', '.join(sorted(ARCHITECTURES))}: use the model's safetensors"
        )
    _refuse_unread(header)
    try:
        model_type, values = ARCHITECTURES[architecture](header)
        config = AutoConfig.for_model(model_type, **{**_tokens(header), **values})
    except UserError:
        raise
    except FAULTS as error:
        raise UserError(
            f"{header.path} cannot be read as a {architecture} model: {reason(error)}"
        ) from error
    return config


def refused(header: Header, why: str) -> UserError:
    """The sentence for a file that would come back as another model."""
    return UserError(
        f"{header.path} {why}, so another model would be trained than the file holds; use the "
        "model's safetensors instead"
    )


def _refuse_unread(header: Header) -> None:
    for key, value in header.settings.items():
        owner, _, name = key.partition(".")
        if owner != header.architecture or name in _READ or not _MATTERS.search(name):
            continue
        if owner in _READ_FOR.get(name, ()):
            continue
        if value not in (0, 0.0, False, ""):
            raise refused(header, f"says {key} = {value}, which cannot be rebuilt")
    if header.get("attention.causal", True) is False:
        raise refused(header, "has an attention that is not causal")


def _tokens(header: Header) -> dict[str, Any]:
    keys = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {
        f"{name}_token_id": header.settings.get(f"tokenizer.ggml.{gguf_name}_token_id")
        for name, gguf_name in keys.items()
    }


def _number(header: Header, key: str, default: Any = None) -> Any:
    """A setting that has to be one number for all layers."""
    value = header.get(key, default)
    if isinstance(value, list) and len(set(value)) == 1:
        value = value[0]
    if value is None:
        raise UserError(f"{header.path} does not say {header.architecture}.{key}; convert it anew")
    if isinstance(value, list):
        raise refused(header, f"has layers with different {key}")
    return value


def _common(header: Header) -> dict[str, Any]:
    """What most architectures share."""
    hidden, heads = _number(header, "embedding_length"), _number(header, "attention.head_count")
    head = int(header.get("attention.key_length") or hidden // heads)
    if int(header.get("attention.value_length") or head) != head:
        raise refused(header, "has values of another size than its keys")
    return {
        "hidden_size": hidden,
        "num_hidden_layers": _number(header, "block_count"),
        "intermediate_size": _number(header, "feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": _number(header, "attention.head_count_kv", heads),
        "head_dim": head,
        "rms_norm_eps": _number(header, "attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": _number(header, "context_length"),
        "vocab_size": _vocabulary(header),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "rope_parameters": _rope(header, head),
    }


def _vocabulary(header: Header) -> int:
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{header.path} holds no token_embd.weight: it is no whole model")
    return embedding.shape[0]


def _rope(header: Header, head: int) -> dict[str, Any]:
    """Rotary positions with their scaling."""
    theta = float(header.get("rope.freq_base", 10000.0))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    turned = int(header.get("rope.dimension_count") or head)
    if turned != head:
        if header.architecture != "phi3":
            raise refused(header, f"turns {turned} of {head} dimensions of a head")
        rope["partial_rotary_factor"] = turned / head
    scaling = header.get("rope.scaling.type", "none")
    factor = float(header.get("rope.scaling.factor") or header.get("rope.scale_linear") or 1.0)
    if "rope.scaling.type" not in _keys(header) and factor != 1.0:
        scaling = "linear"  # files of 2023 have the factor alone
    if scaling == "linear" and factor != 1.0:
        rope |= {"rope_type": "linear", "factor": factor}
    elif scaling == "yarn":
        rope |= _yarn(header, factor)
    elif scaling == "longrope" and "rope_factors_long.weight" not in header.tensors:
        raise refused(header, "has longrope positions and not their factors")
    elif scaling not in ("none", "linear", "longrope"):
        raise refused(header, f"scales its positions by {scaling!r}")
    if header.architecture != "phi3" and float(header.get("rope.scaling.attn_factor", 1.0)) != 1.0:
        raise refused(header, "has an attention factor beside its positions")
    factors = "rope_freqs.weight" in header.tensors
    if factors and rope["rope_type"] != "default":
        raise refused(header, "scales its positions in two ways")
    if factors:
        rope |= _frequencies(header, theta, turned)
    return rope


def _keys(header: Header) -> set[str]:
    prefix = f"{header.architecture}."
    return {key.removeprefix(prefix) for key in header.settings if key.startswith(prefix)}


def _yarn(header: Header, factor: float) -> dict[str, Any]:
    before = header.get("rope.scaling.original_context_length")
    if before is None:
        raise refused(header, "has yarn positions and does not say the context before them")
    rope = {
        "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": int(before),
    }  # fmt: skip
    for key in ("beta_fast", "beta_slow"):
        if (value := header.get(f"rope.scaling.yarn_{key}")) is not None:
            rope[key] = float(value)
    return rope


def _frequencies(header: Header, theta: float, turned: int) -> dict[str, Any]:
    """Llama 3's factors by frequency, which a file holds as a tensor."""
    factors = header.dense("rope_freqs.weight").astype(np.float64)
    if factors.shape != (turned // 2,):
        raise refused(header, f"has {factors.size} rotary factors for {turned} dimensions")
    if np.allclose(factors, 1.0, rtol=0, atol=1e-6):
        return {}
    low, high, before = _LLAMA3
    largest = float(factors.max())
    wavelengths = 2 * math.pi * theta ** (np.arange(0, turned, 2) / turned)
    smooth = np.clip((before / wavelengths - low) / (high - low), 0.0, 1.0)
    if np.allclose(1 / factors, (1 - smooth) / largest + smooth, rtol=1e-5):
        return {
            "rope_type": "llama3", "factor": largest, "low_freq_factor": low,
            "high_freq_factor": high, "original_max_position_embeddings": before,
        }  # fmt: skip
    # Any other factors: `longrope` divides frequencies by a list, here by one for all lengths.
    return {
        "rope_type": "longrope", "short_factor": factors.tolist(), "long_factor": factors.tolist(),
        "attention_factor": 1.0, "factor": 1.0,
        "original_max_position_embeddings": _number(header, "context_length"),
    }  # fmt: skip


def _window(header: Header) -> int | None:
    value = header.get("attention.sliding_window")
    return int(value) if value else None


def _has_bias(header: Header, *parts: str) -> bool:
    return any(f"blk.0.{part}.bias" in header.tensors for part in parts)


def _llama(header: Header) -> tuple[str, dict[str, Any]]:
    values = _common(header)
    attention = _has_bias(header, "attn_q", "attn_k", "attn_v", "attn_output")
    mlp = _has_bias(header, "ffn_gate", "ffn_up", "ffn_down")
    window = _window(header)
    if window is not None:
        if attention or mlp:
            raise refused(header, "has both an attention window and biases")
        return "mistral", {**values, "sliding_window": window}
    name = " ".join(
        str(header.settings.get(f"general.{key}", ""))
        for key in ("name", "basename", "base_model.0.name", "finetune")
    )
    if re.search("mistral|zephyr", name, re.I) and values["rope_parameters"]["rope_theta"] == 1e4:
        # Mistral 7B v0.1 looks 4096 tokens back, later ones (theta 1e6) at everything.
        shape = tuple(values[key] for key in _MISTRAL_SHAPE)
        if shape == tuple(_MISTRAL_SHAPE.values()):
            return "mistral", {**values, "sliding_window": _WINDOW_OF_MISTRAL}
        raise refused(
            header, f"is of the first Mistral kind ({name.strip()}) and does not say its window"
        )
    return "llama", {**values, "attention_bias": attention, "mlp_bias": mlp}


def _qwen2(header: Header) -> tuple[str, dict[str, Any]]:
    return "qwen2", {**_drop_key(_common(header), "head_dim", header), **_qwen_window(header)}


def _qwen3(header: Header) -> tuple[str, dict[str, Any]]:
    biased = _has_bias(header, "attn_q", "attn_k", "attn_v", "attn_output")
    return "qwen3", {**_common(header), "attention_bias": biased, **_qwen_window(header)}


def _qwen_window(header: Header) -> dict[str, Any]:
    window = _window(header)
    if window is None:
        return {"use_sliding_window": False}
    layer_types = _layer_types(header)
    if layer_types is None:
        raise refused(header, "has an attention window and does not say in which layers")
    return {"use_sliding_window": True, "sliding_window": window, "layer_types": layer_types}


def _drop_key(values: dict[str, Any], key: str, header: Header) -> dict[str, Any]:
    """The values for a kind whose heads share the hidden size."""
    if values[key] * values["num_attention_heads"] != values["hidden_size"]:
        raise refused(header, "has heads of a size that its architecture does not have")
    return {name: value for name, value in values.items() if name != key}


def _phi3(header: Header) -> tuple[str, dict[str, Any]]:
    values = _drop_key(_common(header), "head_dim", header)
    positions = values["max_position_embeddings"]
    window = _window(header)
    if "attention.sliding_window" not in _keys(header):
        if positions == 4096:
            window = _WINDOW_OF_PHI3_4K
        elif positions < 4096:
            raise refused(header, "does not say its attention's window (convert it anew)")
    before = header.get("rope.scaling.original_context_length")
    lists = [f"rope_factors_{name}.weight" for name in ("short", "long")]
    if any(name in header.tensors for name in lists):
        if before is None or not all(name in header.tensors for name in lists):
            raise refused(header, "has rotary factors and not all that belongs to them")
        short, long = (header.dense(name).tolist() for name in lists)
        rope = {**values["rope_parameters"], "rope_type": "longrope",
                "short_factor": short, "long_factor": long, "factor": positions / before,
                "original_max_position_embeddings": int(before)}  # fmt: skip
        if (stretch := header.get("rope.scaling.attn_factor")) is not None:
            rope["attention_factor"] = float(stretch)
        values["rope_parameters"] = rope
    return "phi3", {
        **values, "sliding_window": window, "original_max_position_embeddings": before or positions,
    }  # fmt: skip


def _gemma(header: Header) -> tuple[str, dict[str, Any]]:
    return "gemma", _common(header)


def _gemma2(header: Header) -> tuple[str, dict[str, Any]]:
    values = _common(header)
    window = _window(header)
    if window is None:
        raise refused(header, "does not say its attention's window")
    layer_types = _layer_types(header)
    return "gemma2", {
        **values,
        **({} if layer_types is None else {"layer_types": layer_types}),
        "sliding_window": window,
        **_gemma_scores(header, values, _GEMMA2_27B_LAYERS),
    }


def _gemma3(header: Header) -> tuple[str, dict[str, Any]]:
    values = _common(header)
    window = _window(header)
    if window is None:
        raise refused(header, "does not say its attention's window")
    local = {"rope_type": "default", "rope_theta": float(header.get("rope.freq_base_swa", 1e4))}
    layers = values["num_hidden_layers"]
    layer_types = _layer_types(header) or [
        "full_attention" if (place + 1) % _GEMMA3_PATTERN == 0 else "sliding_attention"
        for place in range(layers)
    ]
    return "gemma3_text", {
        **values,
        "sliding_window": window,
        "layer_types": layer_types,
        "rope_parameters": {
            "full_attention": values["rope_parameters"], "sliding_attention": local,
        },
        **_gemma_scores(header, values, _GEMMA3_27B_LAYERS),
    }  # fmt: skip


def _gemma_scores(header: Header, values: dict[str, Any], largest: int) -> dict[str, Any]:
    """What Gemma does to its scores, where it is not as the configuration class has it.

    By what they are divided no file says. It is 256 in every released size but the largest, which
    llama.cpp knows by its layers.
    """
    softcaps = {
        key: header.get(key)
        for key in ("attn_logit_softcapping", "final_logit_softcapping")
        if header.get(key) is not None
    }
    if values["num_hidden_layers"] == largest:
        scale = values["hidden_size"] // values["num_attention_heads"]
        return {**softcaps, "query_pre_attn_scalar": scale}
    if values["head_dim"] != _GEMMA_HEAD:
        _warn_once(
            f"{header.path}: its heads have {values['head_dim']} dimensions and those of every "
            f"released Gemma of its depth {_GEMMA_HEAD}; the file does not say by what scores are "
            f"divided, {_GEMMA_HEAD} is taken"
        )
    return {**softcaps, "query_pre_attn_scalar": _GEMMA_HEAD}


@functools.cache
def _warn_once(message: str) -> None:
    """A header is read several times on the way to a model."""
    log.warning(message)


def _layer_types(header: Header) -> list[str] | None:
    """Which layers have a window, where the header says so."""
    pattern, layers = header.get("attention.sliding_window_pattern"), header.get("block_count")
    if pattern is None:
        return None
    if isinstance(pattern, list):
        windowed = [bool(has_window) for has_window in pattern]
        if len(windowed) != layers:
            raise refused(header, f"says windows for {len(windowed)} of {layers} layers")
    else:
        windowed = [(place + 1) % int(pattern) != 0 for place in range(layers)]
    return ["sliding_attention" if has_window else "full_attention" for has_window in windowed]


def _gpt2(header: Header) -> tuple[str, dict[str, Any]]:
    return "gpt2", {
        "n_embd": _number(header, "embedding_length"),
        "n_layer": _number(header, "block_count"),
        "n_head": _number(header, "attention.head_count"),
        "n_inner": _number(header, "feed_forward_length"),
        "n_positions": _number(header, "context_length"),
        "layer_norm_epsilon": _number(header, "attention.layer_norm_epsilon"),
        "vocab_size": _vocabulary(header),
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }


ARCHITECTURES: dict[str, Callable[[Header], tuple[str, dict[str, Any]]]] = {
    "llama": _llama, "qwen2": _qwen2, "qwen3": _qwen3, "phi3": _phi3, "gemma": _gemma,
    "gemma2": _gemma2, "gemma3": _gemma3, "gpt2": _gpt2,
}  # fmt: skip
