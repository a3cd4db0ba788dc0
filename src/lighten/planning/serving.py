"""Memory of a base that serves with many adapters: weights, adapters and the KV cache.

Small pure functions of the configuration. Left out: what an engine compiles and records (vLLM's
CUDA graphs take 1 to 2 GiB more), speculative models, prefixes that sequences share, and the
fragments of the last block beyond the half block on average that paging costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

# Tokens per block of a paged KV cache, vLLM's default (Kwon et al., arXiv 2309.06180).
BLOCK_TOKENS = 16
# Tokens of one prefill batch, vLLM's default `max_num_batched_tokens` for an online server.
PREFILL_TOKENS = 2048
# Share of the GPU that vLLM takes by default (`gpu_memory_utilization`).
SHARE = 0.9
# bitsandbytes: a float32 scale per 64 weights; quantised, 8 bits per scale and a float32 per 256
# scales (QLoRA, arXiv 2305.14314, section 3). INT8: a float32 scale per output row, left out.
BYTES_PER_WEIGHT = {
    "float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "nf4": 0.5 + 4 / 64,
    "nf4 double": 0.5 + 1 / 64 + 4 / (64 * 256),
}  # fmt: skip

# Kinds of layers, as transformers calls them, that keep nothing of each token: a state at most.
KEEP_NOTHING = {"linear_attention", "conv", "mamba", "moe", "mlp"}


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps of each token.

    Attributes:
        numbers: Keys and values of one token, all heads.
        window: Tokens kept at most; None: all of them.
    """

    numbers: int
    window: int | None = None


@dataclass(frozen=True)
class Serving:
    """What a server needs.

    Attributes:
        model: The base.
        device: Where.
        parts: Bytes by part, in the order of the bar.
        capacity: What the server may take; None where that is not known.
        concurrency: Sequences at once.
        context: Tokens of each.
        most_sequences: As many of them would fit.
        tokens_per_s: At best, when all sequences are answered: each step reads all weights and
            caches once. None where the bandwidth is not known.
    """

    model: str
    device: str
    parts: dict[str, int]
    capacity: int | None
    concurrency: int
    context: int
    most_sequences: int | None
    tokens_per_s: float | None

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())

    def fits(self) -> bool | None:
        """Whether it fits; None where the capacity is not known."""
        return None if self.capacity is None else self.total <= self.capacity

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "total": self.total, "fits": self.fits()}


def layer_caches(config: Mapping[str, Any]) -> list[LayerCache]:
    """What each layer of an architecture caches, from its configuration.

    Knows grouped and multi-query attention, sliding windows of all or some layers, layers without
    a cache that grows (convolutions, linear attention, Mamba) or of their own (Gemma 3n's last
    ones), and DeepSeek's latent attention (arXiv 2405.04434, section 2.1: the compressed vector and
    one rotary key per token, for all heads).

    Args:
        config: The text model's configuration, as transformers completes it.
    """
    layers = int(_first(config, "num_hidden_layers", "n_layer"))
    kinds, windows = _kinds(config, layers)
    if KEEP_NOTHING.issuperset(kinds):
        return [LayerCache(0)] * layers
    heads = int(_first(config, "num_attention_heads", "n_head"))
    hidden = int(_first(config, "hidden_size", "n_embd"))
    if config.get("kv_lora_rank"):
        numbers = int(config["kv_lora_rank"]) + int(config["qk_rope_head_dim"])
    else:
        groups = 1 if config.get("multi_query") else config.get("num_key_value_heads") or heads
        numbers = 2 * int(groups) * int(config.get("head_dim") or hidden // heads)
    keep = layers - int(config.get("num_kv_shared_layers") or 0)
    return [
        LayerCache(numbers if place < keep and kind not in KEEP_NOTHING else 0, window)
        for place, (kind, window) in enumerate(zip(kinds, windows, strict=True))
    ]


def _kinds(config: Mapping[str, Any], layers: int) -> tuple[list[str], list[int | None]]:
    """Each layer's kind and window."""
    window = config.get("sliding_window")
    chunk = config.get("attention_chunk_size")
    kinds = list(config.get("layer_types") or [])
    if not kinds:
        everywhere = bool(window) and config.get("use_sliding_window", True)
        kinds = ["sliding_attention" if everywhere else "full_attention"] * layers
    windows = {"sliding_attention": window, "chunked_attention": chunk}
    return kinds, [windows.get(kind) for kind in kinds]


def _first(config: Mapping[str, Any], *names: str) -> Any:
    return next(config[name] for name in names if config.get(name) is not None)


def kv_cache_bytes(
    layers: Sequence[LayerCache], context: int, sequences: int, *, number_bytes: float = 2.0
) -> int:
    """Bytes of the KV cache of so many sequences of so many tokens, in whole blocks.

    Args:
        layers: What each layer keeps of a token.
        context: Tokens of each sequence, prompt and answer.
        sequences: At once.
        number_bytes: Of one number: 2 for 16 bits, 1 for a float8 cache.
    """
    total = 0.0
    for layer in layers:
        tokens = context if layer.window is None else min(context, layer.window)
        blocks = -(-tokens // BLOCK_TOKENS)
        total += sequences * blocks * BLOCK_TOKENS * layer.numbers * number_bytes
    return round(total)


def adapter_bytes(
    shapes: Sequence[tuple[int, int]], rank: int, *, number_bytes: float = 2.0
) -> int:
    """Bytes of one low-rank adapter: A [r, in] and B [out, r] for each layer.

    Args:
        shapes: (in, out) of each layer that it changes.
        rank: Of all adapters; an engine pads smaller ones to its largest.
        number_bytes: Of one number.
    """
    return round(sum(rank * (inside + outside) for inside, outside in shapes) * number_bytes)


def weight_bytes(linear: int, rest: int, storage: str, compute: str = "bfloat16") -> int:
    """Bytes of a base whose linear layers are stored in one way and the rest in another.

    Args:
        linear: Weights of the linear layers, the head not among them.
        rest: All others.
        storage: One of `BYTES_PER_WEIGHT`.
        compute: The same, for the rest.
    """
    return round(linear * BYTES_PER_WEIGHT[storage] + rest * BYTES_PER_WEIGHT[compute])


def workspace_bytes(
    hidden: int, intermediate: int, vocab: int, sequences: int, *, number_bytes: float = 2.0
) -> int:
    """Bytes of one prefill batch's activations in a layer, and of the logits that are sampled.

    The widest moment of a gated MLP: its input, gate, up and their product; and float32 logits of
    each sequence, twice while they are sorted.
    """
    layer = PREFILL_TOKENS * (2 * hidden + 3 * intermediate) * number_bytes
    return round(layer + 2 * 4 * sequences * vocab)
