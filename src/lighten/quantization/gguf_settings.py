"""From a transformers configuration to the settings of a GGUF file; what has no place is refused.

llama.cpp computes what its architectures compute, whatever a configuration says: a switch that it
does not know would be dropped in silence. Every such switch of the architectures here is therefore
looked at, and either written, folded into a weight, or refused. Keys and meanings: llama.cpp's
`gguf-py/gguf/constants.py` and `src/models/`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lighten.errors import UserError
from lighten.gguf_names import ARCHITECTURE_OF
from lighten.quantization.gguf_rope import Rope, rope_of

log = logging.getLogger(__name__)

_ACTIVATIONS: dict[str, set[str | None]] = {
    "gpt2": {"gelu_new", "gelu_pytorch_tanh"},
    "gemma": {"gelu_pytorch_tanh", "gelu", "gelu_new", None},
    "gemma2": {"gelu_pytorch_tanh", "gelu_new"}, "gemma3": {"gelu_pytorch_tanh", "gelu_new"},
}  # fmt: skip
# Layers of the sizes whose scores llama.cpp divides by the square root of hidden size / heads.
_LARGEST = {"gemma2": 46, "gemma3": 62}
# Layers from one without a window to the next, where a file does not say.
_PERIOD = {"gemma2": 2, "gemma3": 6}
_TIED_ALWAYS = ("gemma", "gemma2")


@dataclass
class Settings:
    """What a file says of its model.

    Attributes:
        architecture: llama.cpp's.
        values: By key without the architecture.
        rope: Rotary positions; None where positions are learnt.
        query_scale: Factor folded into the queries, where scores are divided by another number
            than llama.cpp divides them by.
        layers: Transformer layers.
        heads: Query heads.
        kv_heads: Key heads.
        vocabulary: Rows of the word embeddings.
        tied: Whether they are the head too.
        notes: What a user should know of the file, a sentence each.
    """

    architecture: str
    values: dict[str, Any]
    rope: Rope | None
    query_scale: float
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    notes: list[str] = field(default_factory=list)


def settings_of(config: Mapping[str, Any], where: str) -> Settings:
    """The settings of a model.

    Args:
        config: Its configuration as plain values.
        where: What an error calls it.

    Raises:
        UserError: llama.cpp has no such model here, or would compute another.
    """
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURE_OF:
        raise UserError(
            f"{where} is of the kind {kind!r}; GGUF files are written for "
            f"{', '.join(sorted(ARCHITECTURE_OF))}"
        )
    if config.get("quantization_config"):
        raise UserError(
            f"{where} is quantised already; a GGUF file is made from the original weights, so "
            "export from the unquantised base (or lighten export RUN --as merged)"
        )
    architecture = ARCHITECTURE_OF[kind]
    activation = (
        config.get("hidden_activation")
        or config.get("hidden_act")
        or config.get("activation_function")
        or (None if architecture == "gemma" else _default_activation(architecture))
    )
    if activation not in _ACTIVATIONS.get(architecture, {"silu", "swish"}):
        raise refused(where, f"its activation is {activation!r}")
    settings = (
        _gpt2(config, where) if architecture == "gpt2" else _common(config, architecture, where)
    )
    if architecture in _LARGEST:
        _gemma(config, settings, where)
    _limit_to_window(config, settings)
    return settings


def refused(where: str, why: str) -> UserError:
    """The sentence for a model that llama.cpp would compute otherwise."""
    return UserError(
        f"{where} cannot become a GGUF file: {why}, which llama.cpp does not compute for this "
        "architecture, so the file would hold another model"
    )


def folded_scale(name: str, settings: Settings) -> float:
    """What scores are multiplied by beyond llama.cpp's, folded into the queries.

    Gemma 3 normalises queries: there it goes into that norm.
    """
    if math.isclose(settings.query_scale, 1.0, rel_tol=1e-9):
        return 1.0
    part = "attn_q_norm" if settings.architecture == "gemma3" else "attn_q"
    return settings.query_scale if f".{part}." in name else 1.0


def _default_activation(architecture: str) -> str:
    if architecture == "gpt2":
        return "gelu_new"
    return "gelu_pytorch_tanh" if architecture.startswith("gemma") else "silu"


def _common(config: Mapping[str, Any], architecture: str, where: str) -> Settings:
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    # Qwen 2 and Phi 3 know no other size, whatever the file says.
    fixed = architecture in ("qwen2", "phi3")
    head = hidden // heads if fixed else int(config.get("head_dim") or hidden // heads)
    rope = rope_of(config, architecture, head, where)
    values: dict[str, Any] = {
        "context_length": rope.context,
        "embedding_length": hidden,
        "block_count": int(config["num_hidden_layers"]),
        "feed_forward_length": int(config["intermediate_size"]),
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "attention.key_length": head,
        "attention.value_length": head,
        "vocab_size": int(config["vocab_size"]),
        **rope.values,
    }
    default = architecture.startswith("gemma")
    tied = bool(config.get("tie_word_embeddings", default))
    if not tied and architecture in _TIED_ALWAYS:
        raise refused(where, "its head is not its word embeddings")
    settings = Settings(
        architecture, values, rope, 1.0, int(config["num_hidden_layers"]), heads, kv_heads,
        int(config["vocab_size"]), tied, list(rope.notes),
    )  # fmt: skip
    if architecture == "phi3":
        values["attention.sliding_window"] = int(config.get("sliding_window") or 0)
    if config.get("model_type") == "mistral" and config.get("sliding_window"):
        values["attention.sliding_window"] = int(config["sliding_window"])
    return settings


def _gpt2(config: Mapping[str, Any], where: str) -> Settings:
    for key, plain in {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
                       "add_cross_attention": False}.items():  # fmt: skip
        if config.get(key, plain) != plain:
            raise refused(where, f"{key} is {config[key]}")
    hidden, heads, layers = (int(config[key]) for key in ("n_embd", "n_head", "n_layer"))
    values: dict[str, Any] = {
        "context_length": int(config["n_positions"]),
        "embedding_length": hidden,
        "block_count": layers,
        "feed_forward_length": int(config.get("n_inner") or 4 * hidden),
        "attention.head_count": heads,
        "attention.layer_norm_epsilon": float(config["layer_norm_epsilon"]),
    }
    tied = bool(config.get("tie_word_embeddings", True))
    return Settings(
        "gpt2", values, None, 1.0, layers, heads, heads, int(config["vocab_size"]), tied
    )


def _gemma(config: Mapping[str, Any], settings: Settings, where: str) -> None:
    """Gemma 2 and 3: windows in some layers, scores divided by a number of their own."""
    architecture, values = settings.architecture, settings.values
    head, hidden = int(values["attention.key_length"]), int(config["hidden_size"])
    divided = hidden // settings.heads if settings.layers == _LARGEST[architecture] else head
    query_scalar = float(config.get("query_pre_attn_scalar") or 256)
    # Scores are query · key / sqrt(divided) there.
    settings.query_scale = math.sqrt(divided / query_scalar)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        cap = config.get(name)
        if cap:
            values[name] = float(cap)
        if architecture == "gemma2" and not cap:
            raise refused(where, f"{name} is off")
    if architecture == "gemma3" and config.get("attn_logit_softcapping"):
        raise refused(where, "it caps attention scores")
    if config.get("use_bidirectional_attention"):
        raise refused(where, "its attention is not causal")
    window = config.get("sliding_window")
    period = _period(config, settings.layers, _PERIOD[architecture], where)
    if window and period != 1:
        values["attention.sliding_window"] = int(window)
        if period != _PERIOD[architecture]:
            values["attention.sliding_window_pattern"] = period
    elif architecture == "gemma2":
        # llama.cpp takes a window of 4096 where a file says none.
        values["attention.sliding_window"] = int(values["context_length"])


def _period(config: Mapping[str, Any], layers: int, usual: int, where: str) -> int:
    """Layers from one without a window to the next; more than there are where all have one."""
    kinds = config.get("layer_types")
    if kinds is None:
        return int(config.get("sliding_window_pattern") or usual)
    is_full = [kind == "full_attention" for kind in kinds]
    for period in (usual, *range(1, layers + 2)):
        if is_full == [(layer + 1) % period == 0 for layer in range(layers)]:
            return period
    raise refused(where, "its layers with and without a window do not alternate regularly")


def _limit_to_window(config: Mapping[str, Any], settings: Settings) -> None:
    """llama.cpp has no windows for these: the model is right up to the window, and not beyond."""
    window = config.get("sliding_window")
    if settings.architecture not in ("llama", "qwen2", "qwen3", "phi3") or not window:
        return
    if settings.architecture.startswith("qwen") and not config.get("use_sliding_window"):
        return
    kinds = config.get("layer_types")
    if kinds is not None and "sliding_attention" not in kinds:
        return
    if int(window) < int(settings.values["context_length"]):
        settings.values["context_length"] = int(window)
        settings.notes.append(
            f"the context is limited to {window} tokens, the window of its attention: llama.cpp "
            "computes this architecture without windows and would answer otherwise beyond"
        )
