"""Shapes of well-known models, so that `plan` answers for them before anything is downloaded.

Public configurations: dimensions alone, no weights and no text. Read on 2026-11-28 from
`litgpt/config.py` (github.com/Lightning-AI/litgpt, commit 0006c973aa7d, which links each model's
own `config.json`); tied embeddings, which it does not state, from transformers' defaults and the
published parameter counts, against which the tests hold every shape. SmolLM3 is transformers' own
default (its `configuration_smollm3.py`); EXAONE 4.0 is the configuration in TensorRT-LLM's and
Ollama's tests of it, with the number of layers that its card states. Rope bases and positions are
of the same sources; the memory and time of a plan do not depend on the bases. Of Gemma 3 from 4B
on, which see pictures too, it is the language model.
"""

from __future__ import annotations

import difflib
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lighten.machine.hardware import cache_folder

SOURCE = "public configurations (litgpt/config.py and others), read on 2026-11-28"


@dataclass(frozen=True)
class Shape:
    """The dimensions of a model.

    Attributes:
        hub_id: What the hub calls it.
        config: Its `config.json`, as far as shapes and positions go.
        parameters: As published, in billions.
        siblings: Hub ids of the same shape: its instruction-tuned or base sibling.
    """

    hub_id: str
    config: dict[str, Any] = field(repr=False)
    parameters: float
    siblings: tuple[str, ...] = ()


def _llama(
    model_type: str, layers: int, width: int, heads: int, groups: int, inner: int, words: int,
    positions: int, theta: float, *, tied: bool = False, eps: float = 1e-5, **extra: Any,
) -> dict[str, Any]:  # fmt: skip
    """A configuration in the names that Llama's relatives share."""
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3",
             "phi3": "Phi3", "smollm3": "SmolLM3", "exaone4": "Exaone4"}  # fmt: skip
    return {
        "architectures": [f"{names[model_type]}ForCausalLM"], "model_type": model_type,
        "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
        "num_key_value_heads": groups, "intermediate_size": inner, "vocab_size": words,
        "max_position_embeddings": positions, "rope_theta": theta, "rms_norm_eps": eps,
        "tie_word_embeddings": tied, "dtype": "bfloat16", **extra,
    }  # fmt: skip


def _rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip


def _llama3(
    size: str, count: float, layers: int, width: int, heads: int, inner: int, factor: float, *,
    tied: bool = False,
) -> Shape:  # fmt: skip
    config = _llama("llama", layers, width, heads, 8, inner, 128256, 131072, 5e5, tied=tied,
                    rope_scaling=_rope(factor))  # fmt: skip
    name = f"meta-llama/Llama-{size}"
    return Shape(name, config, count, (f"{name}-Instruct",))


def _qwen25(
    size: str, count: float, layers: int, width: int, heads: int, groups: int, inner: int,
    words: int, positions: int, *, tied: bool = False, eps: float = 1e-6,
) -> Shape:  # fmt: skip
    config = _llama("qwen2", layers, width, heads, groups, inner, words, positions, 1e6, tied=tied,
                    eps=eps)  # fmt: skip
    name = f"Qwen/Qwen2.5-{size}"
    return Shape(name, config, count, (f"{name}-Instruct",))


def _qwen3(
    size: str, count: float, layers: int, width: int, heads: int, inner: int, *, tied: bool = False
) -> Shape:
    config = _llama("qwen3", layers, width, heads, 8, inner, 151936, 40960, 1e6, tied=tied,
                    eps=1e-6, head_dim=128)  # fmt: skip
    name = f"Qwen/Qwen3-{size}"
    return Shape(name, config, count, () if size == "32B" else (f"{name}-Base",))


def _gemma2(
    size: str, count: float, layers: int, width: int, heads: int, groups: int, inner: int,
    head: int, scalar: int,
) -> Shape:  # fmt: skip
    config = {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2",
        "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
        "num_key_value_heads": groups, "intermediate_size": inner, "head_dim": head,
        "query_pre_attn_scalar": scalar, "vocab_size": 256000, "max_position_embeddings": 8192,
        "sliding_window": 4096, "dtype": "bfloat16",
    }  # fmt: skip
    name = f"google/gemma-2-{size}"
    return Shape(name, config, count, (f"{name}-it",))


def _gemma3(
    size: str, count: float, layers: int, width: int, heads: int, groups: int, inner: int,
    window: int, *, head: int = 256, scalar: int = 256,
) -> Shape:  # fmt: skip
    config = {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
        "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
        "num_key_value_heads": groups, "intermediate_size": inner, "head_dim": head,
        "query_pre_attn_scalar": scalar, "vocab_size": 262144, "sliding_window": window,
        "max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
        "dtype": "bfloat16",
    }  # fmt: skip
    name = f"google/gemma-3-{size}"
    return Shape(f"{name}-it", config, count, (f"{name}-pt",))


def _smollm2(
    size: str, count: float, layers: int, width: int, heads: int, groups: int, inner: int,
    theta: float,
) -> Shape:  # fmt: skip
    config = _llama("llama", layers, width, heads, groups, inner, 49152, 8192, theta, tied=True)
    name = f"HuggingFaceTB/SmolLM2-{size}"
    return Shape(name, config, count, (f"{name}-Instruct",))


def _mistral(version: str, words: int, window: int | None) -> Shape:
    config = _llama("mistral", 32, 4096, 32, 8, 14336, words, 32768, 1e4,
                    sliding_window=window)  # fmt: skip
    name = f"mistralai/Mistral-7B-{version}"
    return Shape(name, config, 7.24 if window else 7.25,
                 (f"mistralai/Mistral-7B-Instruct-{version}",))  # fmt: skip


SHAPES = (
    _llama3("3.1-8B", 8.03, 32, 4096, 32, 14336, 8.0),
    _llama3("3.1-70B", 70.6, 80, 8192, 64, 28672, 8.0),
    _llama3("3.2-1B", 1.24, 16, 2048, 32, 8192, 32.0, tied=True),
    _llama3("3.2-3B", 3.21, 28, 3072, 24, 8192, 32.0, tied=True),
    _qwen25("0.5B", 0.494, 24, 896, 14, 2, 4864, 151936, 32768, tied=True),
    _qwen25("1.5B", 1.54, 28, 1536, 12, 2, 8960, 151936, 131072, tied=True),
    _qwen25("3B", 3.09, 36, 2048, 16, 2, 11008, 151936, 32768, tied=True),
    _qwen25("7B", 7.62, 28, 3584, 28, 4, 18944, 152064, 131072),
    _qwen25("14B", 14.8, 48, 5120, 40, 8, 13824, 152064, 131072, eps=1e-5),
    _qwen25("32B", 32.8, 64, 5120, 40, 8, 27648, 152064, 131072, eps=1e-5),
    _qwen3("0.6B", 0.596, 28, 1024, 16, 3072, tied=True),
    _qwen3("1.7B", 1.72, 28, 2048, 16, 6144, tied=True),
    _qwen3("4B", 4.02, 36, 2560, 32, 9728, tied=True),
    _qwen3("8B", 8.19, 36, 4096, 32, 12288),
    _qwen3("14B", 14.8, 40, 5120, 40, 17408),
    _qwen3("32B", 32.8, 64, 5120, 64, 25600),
    _gemma2("2b", 2.61, 26, 2304, 8, 4, 9216, 256, 256),
    _gemma2("9b", 9.24, 42, 3584, 16, 8, 14336, 256, 256),
    _gemma2("27b", 27.2, 46, 4608, 32, 16, 36864, 128, 144),
    _smollm2("135M", 0.135, 30, 576, 9, 3, 1536, 1e5),
    _smollm2("360M", 0.362, 32, 960, 15, 5, 2560, 1e5),
    _smollm2("1.7B", 1.71, 24, 2048, 32, 32, 8192, 1.3e5),
    _mistral("v0.1", 32000, 4096),
    _mistral("v0.3", 32768, None),
    Shape(
        "microsoft/phi-4",
        _llama("phi3", 40, 5120, 40, 10, 17920, 100352, 16384, 2.5e5, pad_token_id=None),
        14.7,
    ),
    Shape(
        "microsoft/Phi-3.5-mini-instruct",
        _llama("phi3", 32, 3072, 32, 32, 8192, 32064, 131072, 1e4,
               original_max_position_embeddings=4096),
        3.82,
    ),
    Shape(
        "microsoft/Phi-4-mini-instruct",
        _llama("phi3", 32, 3072, 24, 8, 8192, 200064, 131072, 1e4, tied=True,
               partial_rotary_factor=0.75, original_max_position_embeddings=4096),
        3.84, ("microsoft/Phi-4-mini-reasoning",),
    ),
    Shape(
        "HuggingFaceTB/SmolLM3-3B",
        _llama("smollm3", 36, 2048, 16, 4, 11008, 128256, 65536, 5e6, tied=True, eps=1e-6),
        3.08, ("HuggingFaceTB/SmolLM3-3B-Base",),
    ),
    Shape(
        "LGAI-EXAONE/EXAONE-4.0-1.2B",
        _llama("exaone4", 30, 2048, 32, 8, 4096, 102400, 65536, 1e6, tied=True, head_dim=64,
               sliding_window=None, layer_types=["full_attention"] * 30),
        1.28,
    ),
    Shape(
        "LGAI-EXAONE/EXAONE-4.0-32B",
        _llama("exaone4", 64, 5120, 40, 8, 27392, 102400, 131072, 1e6, head_dim=128,
               sliding_window=4096, sliding_window_pattern=4),
        32.0,
    ),
    _gemma3("1b", 1.0, 26, 1152, 4, 1, 6912, 512),
    # Language model's embedding and other parameters: Gemma 3 Technical Report, table 1.
    _gemma3("4b", 3.88, 34, 2560, 8, 4, 10240, 1024),
    _gemma3("12b", 11.77, 48, 3840, 16, 8, 15360, 1024),
    _gemma3("27b", 27.02, 62, 5376, 32, 16, 21504, 1024, head=128, scalar=168),
)  # fmt: skip


def _names() -> dict[str, tuple[Shape, str]]:
    """Shape and hub id by full id and by the part after the owner, in small letters."""
    by_name: dict[str, tuple[Shape, str]] = {}
    for shape in SHAPES:
        for hub_id in (shape.hub_id, *shape.siblings):
            by_name[hub_id.lower()] = by_name[hub_id.lower().rpartition("/")[2]] = shape, hub_id
    return by_name


_BY_NAME = _names()
# Fewer letters are the beginning of too many names.
SHORTEST_START = 4


def shape_of(name: str) -> tuple[Shape, str] | None:
    """A known shape and its hub id, by that id or what follows the owner in it; else None."""
    return _BY_NAME.get(name.lower())


def near(name: str) -> str | None:
    """The known name that resembles this one most, or begins with it, if any does."""
    typed = name.lower()
    matches = difflib.get_close_matches(typed, _BY_NAME, n=1, cutoff=0.75)
    if not matches and len(typed) >= SHORTEST_START:
        matches = [known for known in _BY_NAME if known.startswith(typed)]
    return matches[0] if matches else None


def folder_of(shape: Shape) -> Path:
    """A folder in lighten's cache with the shape's `config.json`, written anew."""
    folder = cache_folder() / "shapes" / shape.hub_id.replace("/", "--")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, encoding="utf-8", delete=False) as file:
        json.dump(shape.config, file, indent=1)
    os.replace(file.name, folder / "config.json")
    return folder
