"""Memory of a base that serves with many adapters: weights, adapters, KV cache and states.

Small pure functions of the configuration. Left out: what an engine compiles and records (vLLM's
CUDA graphs take 1 to 2 GiB more), speculative models, prefixes that sequences share, and the
fragments of the last block beyond the half block on average that paging costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lighten.errors import UserError

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

# Kinds of layers, as transformers calls them, that keep nothing that grows with the tokens.
WITHOUT_CACHE = {"linear_attention", "conv", "mamba", "moe", "mlp"}
# Of all kinds those that keep a state whose size does not depend on the tokens.
WITH_STATE = {"linear_attention", "conv", "mamba", "hybrid", "hybrid_sliding"}
WINDOWED = {"sliding_attention", "hybrid_sliding", "reference_sliding_attention"}
# transformers keeps recurrent states in float32, whatever the format of the weights.
RECURRENT_BYTES = 4


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps of a sequence.

    Attributes:
        numbers: Keys and values of one token, all heads.
        window: Tokens kept at most; None: all of them.
        convolution: Numbers of the last inputs of a convolution, in the cache's format.
        recurrent: Numbers of a state that runs over the tokens, in float32.
        state_known: Whether these two are all that it keeps beside keys and values.
    """

    numbers: int
    window: int | None = None
    convolution: int = 0
    recurrent: int = 0
    state_known: bool = True


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
        tokens_per_s: At best, when all sequences are answered: each step reads caches and weights
            once, of experts and adapters those that so many sequences use. None where the
            bandwidth is not known.
        left_out: What else it needs, of which the size is not known.
    """

    model: str
    device: str
    parts: dict[str, int]
    capacity: int | None
    concurrency: int
    context: int
    most_sequences: int | None
    tokens_per_s: float | None
    left_out: tuple[str, ...] = ()

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


def layer_caches(config: Any) -> list[LayerCache]:
    """What each layer of an architecture caches of a token, from its configuration.

    Knows grouped and multi-query attention, layers with heads of their own (Gemma 4's global ones),
    sliding windows of all or some layers, layers without a cache that grows (convolutions, linear
    attention, Mamba) or of their own (Gemma 3n's last ones), and DeepSeek's latent attention
    (arXiv 2405.04434, section 2.1: the compressed vector and one rotary key per token, for all
    heads).

    Args:
        config: The text model's configuration, as transformers completes it.

    Raises:
        UserError: It does not say how many layers there are.
    """
    configs = layer_configs(config)
    kinds = list(getattr(config, "layer_types", None) or [None] * len(configs))
    modes = getattr(config, "kv_sharing_modes", None)
    if modes is None:
        shared = int(getattr(config, "num_kv_shared_layers", None) or 0)
        modes = [None] * (len(configs) - shared) + ["reuse"] * shared
    return [
        _layer_cache(layer, kind, reads_others=mode == "reuse")
        for layer, kind, mode in zip(configs, kinds, modes, strict=True)
    ]


def layer_configs(config: Any) -> list[Any]:
    """Each layer's configuration: one for all of them, unless they differ in more than their kind.

    Raises:
        UserError: It does not say how many layers there are.
    """
    # Read as an attribute: it may be another's name, or a property, and in no dictionary.
    layers = getattr(config, "num_hidden_layers", None)
    if layers is None:
        kind = getattr(config, "model_type", "this architecture")
        raise UserError(f"{kind}: its configuration does not say how many layers it has")
    if getattr(config, "is_heterogeneous", False):
        return [config.per_layer_config[place] for place in range(layers)]
    return [config] * int(layers)


def widest(config: Any, name: str) -> int | None:
    """The largest of a setting's values over all layers; None where no layer has it."""
    values = [getattr(layer, name, None) for layer in layer_configs(config)]
    listed = [value if isinstance(value, list | tuple) else [value] for value in values]
    return max((int(number) for numbers in listed for number in numbers if number), default=None)


def _layer_cache(config: Any, kind: str | None, *, reads_others: bool) -> LayerCache:
    """What one layer caches of a token.

    Args:
        config: The layer's.
        kind: As transformers calls it; None: the same for all layers.
        reads_others: It has no keys and values of its own.
    """
    heads = getattr(config, "num_attention_heads", None)
    if kind is None and heads is None:  # RWKV and xLSTM
        kind = "linear_attention"
    window = getattr(config, "sliding_window", None)
    if kind == "chunked_attention":
        window = config.attention_chunk_size
    elif kind not in WINDOWED and (kind or not getattr(config, "use_sliding_window", True)):
        window = None
    cached = kind not in WITHOUT_CACHE and not reads_others
    return LayerCache(
        token_numbers(config) if cached else 0, window or None, state_known=kind not in WITH_STATE
    )


def token_numbers(config: Any) -> int:
    """Numbers of a token's keys and values in a layer with attention, by the layer's config."""
    if rank := getattr(config, "kv_lora_rank", None):
        return int(rank) + int(config.qk_rope_head_dim)
    heads = int(config.num_attention_heads)
    keys = getattr(config, "head_dim", None) or config.hidden_size // heads
    values = getattr(config, "v_head_dim", None) or keys
    return key_heads(config) * (int(keys) + int(values))


def key_heads(config: Any) -> int:
    """Heads of keys and values of a layer with attention, by the layer's configuration."""
    # Falcon passes over `multi_query` in its newer architecture, where it is true all the same.
    newer = getattr(config, "new_decoder_architecture", None)
    if getattr(config, "multi_query", None) and not newer:
        return 1
    attention = getattr(config, "attn_config", None)  # DBRX
    if (grouped := getattr(attention, "kv_n_heads", None)) is not None:
        return int(grouped)
    for name in ("num_kv_heads", "num_key_value_heads"):
        if (grouped := getattr(config, name, None)) is not None:
            return int(grouped)
    return int(config.num_attention_heads)


def state_bytes(layers: Sequence[LayerCache], sequences: int, *, number_bytes: float = 2.0) -> int:
    """Bytes of what the layers keep of so many sequences, whatever their length.

    Args:
        layers: What each layer keeps.
        sequences: At once.
        number_bytes: Of one number of the model's format.
    """
    each = sum(
        layer.convolution * number_bytes + layer.recurrent * RECURRENT_BYTES for layer in layers
    )
    return round(sequences * each)


def share_read(experts: int, chosen: int, sequences: int) -> float:
    """Share of the experts that a step of so many sequences reads, were each as likely as others.

    Args:
        experts: Of a layer.
        chosen: By each token.
        sequences: At once, each with one token.
    """
    return 1.0 - (1.0 - min(1.0, chosen / experts)) ** sequences


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
