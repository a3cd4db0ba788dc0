"""Memory of a model that answers in this process: weights, cache, the widest moment, the process.

Dimensions: B prompts side by side, T tokens of each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from lighten.generation.attention import grown
from lighten.generation.engine import PREFILL_TOKENS
from lighten.generation.linears import packs
from lighten.models import skeleton
from lighten.models.load import locate, weight_files
from lighten.models.stored import loaded_bytes
from lighten.planning import serving
from lighten.planning.memory import TOKENIZER_FACTOR
from lighten.planning.process_overhead import answer_context
from lighten.planning.serve import caches_of, sizes_of
from lighten.planning.storage_tracker import KERNEL_BYTES

SCORES_BYTES = 4  # of one score of attention in float32, which softmax computes in


def answer_peak(
    model: str,
    *,
    dtype: str,
    prompt_tokens: int,
    new_tokens: int,
    rows: int = 1,
    attention: str = "sdpa",
    adapter_bytes: int = 0,
    device: str = "cpu",
    slots: int | None = None,
    revision: str | None = None,
) -> int:
    """Bytes at the peak of greedy answers, as `PeakMemory` measures it.

    Args:
        model: As for `models.load`; only its configuration is read.
        dtype: Of weights, cache and products.
        prompt_tokens: T, read at once.
        new_tokens: Written after them.
        rows: B.
        attention: transformers' name of the kernel.
        adapter_bytes: Of an adapter beside the weights.
        device: `cpu` or `cuda`, where the process's own memory is not measured.
        slots: Answers that our engine has room for; None: transformers answers.
        revision: Of a hub model.

    Raises:
        UserError: No such model.
    """
    shape = skeleton(model, revision=revision)
    config = shape.config.get_text_config()
    number = serving.BYTES_PER_WEIGHT[dtype]
    path = locate(model, revision=revision, weights=False)[1]
    weights: float = loaded_bytes(shape, number, weight_files(path))
    caches, cached = caches_of(shape), prompt_tokens + new_tokens
    cached_rows, read = rows, rows * prompt_tokens
    if slots is None and getattr(config, "new_decoder_architecture", None):
        # transformers keeps Falcon's grouped keys and values once for each head that reads them.
        copies = int(config.num_attention_heads) // serving.key_heads(config)
        caches = [replace(layer, numbers=copies * layer.numbers) for layer in caches]
    if slots is not None:
        # All slots have as much room, whatever a layer's window. Where it grew, what was there
        # before has left holes that nothing so large fits. Prompts are read in pieces.
        caches = [replace(layer, window=None) for layer in caches]
        cached, cached_rows = _slot_tokens(prompt_tokens, cached), slots
        read = min(read, PREFILL_TOKENS)
        if device == "cpu":
            weights += _packed_head_bytes(shape, model, dtype, number, revision)
    cache = serving.kv_cache_bytes(caches, cached, cached_rows, number_bytes=number)
    cache += serving.state_bytes(caches, cached_rows, number_bytes=number)
    widest = max(moments(config, rows, read / rows, number, attention).values())
    process = _process_bytes(model, revision) if device == "cpu" else 0
    if device == "cpu" and slots is None:
        process += kernel_bytes(dtype, attention, new_tokens)
    return round(weights + adapter_bytes + cache + widest + process)


def _slot_tokens(prompt_tokens: int, tokens: int) -> int:
    """Tokens that a slot has room for in the end, and that it had room for before it last grew."""
    room = before = 0
    for needed in (*range(PREFILL_TOKENS, prompt_tokens, PREFILL_TOKENS), prompt_tokens, tokens):
        if (larger := grown(room, needed)) > room:
            room, before = larger, room
    return room + before


def _packed_head_bytes(
    shape: PreTrainedModel, model: str, dtype: str, number: float, revision: str | None
) -> float:
    """A head that is the embedding too is packed beside it.

    Not counted where weights are a mapped file's: then few rows of the embedding are read again.
    """
    head, embedding = shape.get_output_embeddings(), shape.get_input_embeddings()
    source, _ = locate(model, revision=revision, weights=False)
    stored = str(getattr(shape.config, "dtype", None)).removeprefix("torch.")
    if source == "packaged":  # made dense on this machine, in float32
        stored = "float32"
    mapped = source != "gguf" and stored == dtype
    if head is None or head.weight is not embedding.weight or mapped:
        return 0.0
    packed = packs(torch.empty(0, dtype=getattr(torch, dtype)))
    rows, columns = head.weight.shape  # type: ignore[misc]  # typed as a module by nn.Module
    return rows * columns * number if packed else 0.0


def _process_bytes(model: str, revision: str | None) -> int:
    """What a process takes that answers, and its tokenizer."""
    file = locate(model, revision=revision, weights=False)[1] / "tokenizer.json"
    tokenizer = TOKENIZER_FACTOR * file.stat().st_size if file.is_file() else 0
    return answer_context().bytes + int(tokenizer)


def kernel_bytes(dtype: str, attention: str, new_tokens: int) -> int:
    """What oneDNN's kernels take where each token meets one key more than the one before.

    Two products of a new shape, then, of which it keeps the kernels; only eager attention asks it.

    Args:
        dtype: Of the products.
        attention: transformers' name of the kernel.
        new_tokens: Written one by one.
    """
    return 2 * new_tokens * KERNEL_BYTES if attention == "eager" and dtype != "float32" else 0


def resident_after(model: str, *, storage: str, rest: str, revision: str | None = None) -> int:
    """Bytes that stay once a quantised model has answered, as its receipt counts them.

    Neither its tokenizer is among them nor the code that runs it.

    Args:
        model: The base before it was quantised, as for `models.load`.
        storage: Of its linear layers, one of `serving.BYTES_PER_WEIGHT`.
        rest: The same, of its other weights.
        revision: Of a hub model.

    Raises:
        UserError: No such model.
    """
    sizes = sizes_of(skeleton(model, revision=revision))
    weights = serving.weight_bytes(sizes.linear_numbers, sizes.rest, storage, rest)
    return weights + answer_context().model_bytes


def moments(
    config: Any, rows: int, tokens: float, number: float, attention: str
) -> dict[str, float]:
    """Bytes beside weights and cache at the moments of a prompt that hold most.

    Args:
        config: Of the text model.
        rows: B.
        tokens: T.
        number: Bytes of one number.
        attention: transformers' name of the kernel: `eager` keeps all scores.
    """
    hidden, heads = config.hidden_size, serving.widest(config, "num_attention_heads") or 0
    wide = serving.widest(config, "intermediate_size") or 4 * hidden
    read = rows * tokens
    # A gated MLP: what goes around it, its input, gate, up and their product.
    layer = read * (2 * hidden + 3 * wide) * number
    # What goes around attention, its input, query and output; scores and their softmax.
    attended = 4 * read * hidden * number
    if attention == "eager":
        attended += rows * heads * tokens**2 * (number + SCORES_BYTES)
    logits = 2 * rows * config.vocab_size * number  # a token's beside those of the one before
    return {"layer": layer, "attention": attended, "logits": logits}
