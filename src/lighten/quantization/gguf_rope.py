"""Rotary positions of a transformers configuration as llama.cpp takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lighten.errors import UserError

Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass
class Rope:
    """Rotary positions.

    Attributes:
        values: Settings by key without the architecture.
        context: Longest sequence, tokens.
        tensors: Factors that frequencies are divided by, as tensors of the file.
        notes: What a user should know.
    """

    values: dict[str, Any]
    context: int
    tensors: dict[str, Floats] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def rope_of(config: Mapping[str, Any], architecture: str, head: int, where: str) -> Rope:
    """The rotary positions of a configuration.

    Args:
        config: Plain values, with `rope_parameters` or (before transformers 5) `rope_theta` and
            `rope_scaling`.
        architecture: llama.cpp's.
        head: Dimensions of a head.
        where: What an error calls the model.

    Raises:
        UserError: llama.cpp does not know them.
    """
    parameters = parameters_of(config)
    local = parameters.get("sliding_attention")
    full_attention = parameters.get("full_attention", parameters)
    kind = str(full_attention.get("rope_type", "default"))
    theta = float(full_attention.get("rope_theta", 10000.0))
    turned = int(head * float(full_attention.get("partial_rotary_factor") or 1.0))
    if turned != head and architecture != "phi3":
        raise _refused(where, f"turns {turned} of {head} dimensions of a head")
    rope = Rope(
        {"rope.freq_base": theta, "rope.dimension_count": turned},
        int(config["max_position_embeddings"]),
    )
    if local is not None:
        if str(local.get("rope_type", "default")) != "default":
            raise _refused(where, "scales the positions of its layers with a window")
        rope.values["rope.freq_base_swa"] = float(local["rope_theta"])
    if kind == "linear":
        rope.values |= {
            "rope.scaling.type": "linear",
            "rope.scaling.factor": float(full_attention["factor"]),
        }
    elif kind == "yarn":
        rope.values |= _yarn(config, full_attention, where)
    elif kind == "llama3":
        rope.tensors["rope_freqs.weight"] = _llama3(full_attention, theta, head)
    elif kind in ("longrope", "su"):
        _longrope(rope, config, full_attention, turned, where)
    elif kind == "dynamic":
        rope.notes.append(
            f"the context is {rope.context} tokens: llama.cpp does not stretch positions beyond as "
            "this model (rope type dynamic) does"
        )
    elif kind != "default":
        raise _refused(where, f"scales its positions by {kind!r}")
    if architecture == "phi3" and "rope.scaling.original_context_length" not in rope.values:
        rope.values["rope.scaling.original_context_length"] = int(
            config.get("original_max_position_embeddings") or rope.context
        )
    return rope


def parameters_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` as transformers makes them of all that a configuration says.

    `rope_scaling` is taken before them, and what neither says is looked for beside them.
    """
    scaling = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if "full_attention" in scaling:
        return scaling
    scaling["rope_type"] = scaling.get("rope_type", scaling.pop("type", "default"))
    full_attention = {
        "rope_theta": config.get("rope_theta", 10000.0),
        "partial_rotary_factor": config.get("partial_rotary_factor", 1.0),
        **scaling,
    }
    if "rope_local_base_freq" in config:  # Gemma 3 of before transformers 5
        local = {"rope_type": "default", "rope_theta": config["rope_local_base_freq"]}
        return {"full_attention": full_attention, "sliding_attention": local}
    return full_attention


def _refused(where: str, why: str) -> UserError:
    return UserError(
        f"{where} cannot become a GGUF file: it {why}, which llama.cpp does not compute for this "
        "architecture"
    )


def _yarn(config: Mapping[str, Any], rope: Mapping[str, Any], where: str) -> dict[str, Any]:
    if rope.get("truncate") is False:
        raise _refused(where, "has yarn positions that are not truncated")
    factor = float(rope["factor"])
    original_context = (
        rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    )
    values = {
        "rope.scaling.type": "yarn", "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(original_context),
    }  # fmt: skip
    for key, usual in {"beta_fast": 32, "beta_slow": 1}.items():
        # There are keys for both in the format; llama.cpp does not read them for these models.
        if (rope.get(key) or usual) != usual:
            raise _refused(where, f"has yarn positions with {key} {rope[key]}")
    attention = rope.get("attention_factor")
    if attention is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        attention = _stretch(factor, rope["mscale"]) / _stretch(factor, rope["mscale_all_dim"])
    if attention is not None and not math.isclose(attention, _stretch(factor), rel_tol=1e-6):
        # llama.cpp computes the usual one itself, and multiplies it by this.
        values["rope.scaling.attn_factor"] = float(attention) / _stretch(factor)
    return values


def _stretch(factor: float, scale: float = 1.0) -> float:
    """By what yarn multiplies attention (arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _llama3(rope: Mapping[str, Any], theta: float, head: int) -> Floats:
    """By what Llama 3 divides each frequency: long wavelengths by the factor, short ones by 1."""
    original_context = float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head, 2) / head)
    smooth = np.clip((original_context / wavelengths - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - smooth) / float(rope["factor"]) + smooth)).astype(np.float32)


def _longrope(
    target: Rope, config: Mapping[str, Any], rope: Mapping[str, Any], turned: int, where: str
) -> None:
    if rope.get("short_mscale") or rope.get("long_mscale"):
        raise _refused(where, "scales attention by the length (short_mscale, long_mscale)")
    original_context = int(
        config.get("original_max_position_embeddings")
        or rope.get("original_max_position_embeddings")
        or target.context
    )
    factor = rope.get("factor")
    if config.get("original_max_position_embeddings") or factor is None:
        factor = target.context / original_context
    attention = rope.get("attention_factor")
    if attention is None:
        attention = (
            math.sqrt(1 + math.log(factor) / math.log(original_context)) if factor > 1 else 1.0
        )
    for name in ("short", "long"):
        factors = np.asarray(rope[f"{name}_factor"], dtype=np.float32)
        if factors.shape != (turned // 2,):
            raise UserError(
                f"{where}: {name}_factor has {factors.size} numbers where {turned // 2} are turned"
            )
        target.tensors[f"rope_factors_{name}.weight"] = factors
    target.values |= {
        "rope.scaling.type": "longrope", "rope.scaling.attn_factor": float(attention),
        "rope.scaling.original_context_length": original_context,
    }  # fmt: skip
    if target.context > original_context:
        target.notes.append(
            f"open it with a context of at most {original_context} tokens for short texts: "
            "llama.cpp takes the factors of long texts for every text once its context is longer"
        )
