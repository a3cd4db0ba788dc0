"""Causal attention for processors: matrix products over blocks of queries.

PyTorch's flash kernel for CPUs is slower than plain matrix products at the lengths people
fine-tune with, its backward pass above all; plain attention computes the upper half of the scores
for nothing, repeats the keys of grouped queries, and keeps float32 scores. Here each block of
queries meets only the keys up to its own end, heads that share keys share a product, and the
backward pass keeps the probabilities alone, in the base's format. In float32, and on processors
that multiply bfloat16 in that, a kernel does all of it (`kernels/attention.py`) and keeps no
probability either. Without a compiler to make it long rows, whose probabilities grow with the
square of their length, go to PyTorch's flash kernel, and so do all rows in a format whose products
the processor emulates.

Rows may stand behind each other in one (`packed_rows.py`).

Dimensions: B rows, K key-value heads, G query heads per key-value head, T tokens, D features, N
tokens of a packed row, Z = B · K.

On CUDA devices PyTorch's own kernels are the best there is, but the only ones that read grouped
keys as they are want half precision and compute capability 8.0: for a T4, or in float32, it falls
back to plain attention, which keeps all scores. `_forward_repeated` repeats the keys there, so that
the memory-efficient kernel takes them (benchmarks/gpu_suite.py: 96 against 2552 MiB).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lighten.cpu.kernels import attention as kernel
from lighten.cpu.kernels import formats
from lighten.machine import hardware
from lighten.machine.hardware import Choice
from lighten.models.packed_rows import Group, groups_of, packing, starts_within

NAME, REPEATS = "lighten_blocks", "lighten_repeats"
GROUPED_SINCE = (8, 0)  # compute capability from which half precision's kernels read grouped keys
# Attention implementations that keep rows apart which stand behind each other in one.
PACKS = frozenset({NAME, "flash_attention_2", "flash_attention_3"})
# What the setting `attn_implementation` calls ours.
_SETTING = {NAME: "sdpa", REPEATS: "sdpa"}
# Queries per block: large enough to fill a matrix product, small enough to skip the upper half.
BLOCK = 128
# Models whose layers pass on which window their mask has: they need no mask.
WINDOWED = frozenset({
    "cohere2", "exaone4", "gemma3_text", "ministral", "mistral", "mixtral", "olmo3", "phi3",
    "qwen2", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
})  # fmt: skip
# Longer rows are the flash kernel's: from about here on it is as quick as blocks.
LONGEST_IN_BLOCKS = 1024


def setting_of(name: str) -> str:
    """What the setting `attn_implementation` calls an attention that transformers has by a name."""
    return _SETTING.get(name, name)


def _attend(query: Tensor, key: Tensor, value: Tensor, window: int) -> tuple[Tensor, list[Tensor]]:
    """softmax(Q Kᵀ + causal) V and, by block, the probabilities: the scale is in Q already.

    Args:
        query: [Z, G, T, D].
        key: [Z, T, D].
        value: [Z, T, D].
        window: How many keys a query sees, its own last; 0: all before it.
    """
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    probabilities = []
    for block in _blocks(query.shape[2]):
        seen = _seen(block, window)
        scores = _stacked(query, block) @ key[:, seen].mT
        _hide(_unstacked(scores, block), block, seen, window)
        weights = scores.softmax(-1)  # float32 inside, rounded once
        out[:, :, block] = _unstacked(weights @ value[:, seen], block)
        probabilities.append(weights)
    return out, probabilities


def _attend_backward(
    query: Tensor, key: Tensor, value: Tensor, probabilities: Sequence[Tensor], grad: Tensor,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the three inputs of `_attend`."""
    grad_query, grad_key = torch.empty_like(query), torch.zeros_like(key)
    grad_value = torch.zeros_like(value)
    for block, weights in zip(_blocks(query.shape[2]), probabilities, strict=True):
        seen, upstream = _seen(block, window), _stacked(grad, block)
        grad_value[:, seen].baddbmm_(weights.mT, upstream)
        gradient = upstream @ value[:, seen].mT
        gradient = torch._softmax_backward_data(gradient, weights, -1, weights.dtype)
        grad_query[:, :, block] = _unstacked(gradient @ key[:, seen], block)
        grad_key[:, seen].baddbmm_(gradient.mT, _stacked(query, block))
    return grad_query, grad_key, grad_value


def _seen(block: slice, window: int) -> slice:
    """The keys of which a block's queries see any."""
    return slice(max(0, block.start + 1 - window) if window else 0, block.stop)


def _hide(scores: Tensor, block: slice, seen: slice, window: int) -> None:
    """Leave out of [..., block, seen] what comes after each query, or too long before it."""
    size = block.stop - block.start
    square = torch.ones(size, size, dtype=torch.bool, device=scores.device)
    scores[..., -size:].masked_fill_(square.triu(1), float("-inf"))
    if window and block.stop - window > seen.start:
        earlier = square.tril_(block.start - window - seen.start)
        scores[..., :size].masked_fill_(earlier, float("-inf"))


def _blocks(tokens: int) -> list[slice]:
    """Equal blocks of queries, none longer than BLOCK."""
    count = -(-tokens // BLOCK)
    edges = [tokens * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def _stacked(x: Tensor, block: slice) -> Tensor:
    """[Z, G, T, ·] → [Z, G · block, ·]: the heads that share keys stand under each other."""
    return x[:, :, block].flatten(1, 2)


def _unstacked(x: Tensor, block: slice) -> Tensor:
    """The reverse of `_stacked`."""
    return x.unflatten(1, (-1, block.stop - block.start))


class _BlockAttention(torch.autograd.Function):
    """Causal attention of rows under each other, or packed into one."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        groups: tuple[Group, ...] | None,
        window: int,
    ) -> Tensor:
        ctx.scale, ctx.groups, ctx.window = scale, groups, window
        ctx.shapes = query.shape, key.shape, value.shape
        if groups is None:
            parts = [(_by_key(query, key.shape[1]), key.flatten(0, 1), value.flatten(0, 1))]
        else:
            parts = [
                (_by_key_packed(group.gathered(query), key.shape[1]),
                 group.gathered(key).flatten(0, 1), group.gathered(value).flatten(0, 1))
                for group in groups
            ]  # fmt: skip
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        saved: list[Tensor] = []
        ctx.block_counts = []
        for number, (q, k, v) in enumerate(parts):
            q = q * scale
            attended, probabilities = _attend(q, k, v, window)
            saved += [q, k, v, *probabilities]
            ctx.block_counts.append(len(probabilities))
            if groups is None:
                out = attended.view(out.shape)
            else:
                groups[number].put_back(_by_head(attended, groups[number].rows), out)
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        keys = ctx.shapes[1][1]
        outs = [grad.new_empty(shape) for shape in ctx.shapes]
        for number, block_count in enumerate(ctx.block_counts):
            (q, k, v, *weights), saved = saved[: 3 + block_count], saved[3 + block_count :]
            if ctx.groups is None:
                upstream = _by_key(grad, keys)
            else:
                group = ctx.groups[number]
                gathered = group.without_padding(group.gathered(grad))
                upstream = _by_key_packed(gathered, keys)
            gradients = _attend_backward(q, k, v, weights, upstream, ctx.window)
            gradients[0].mul_(ctx.scale)
            if ctx.groups is None:
                outs = [
                    gradient.view(out.shape) for gradient, out in zip(gradients, outs, strict=True)
                ]
                continue
            group.put_back(_by_head(gradients[0], group.rows), outs[0])
            for gradient, out in zip(gradients[1:], outs[1:], strict=True):
                group.put_back(gradient.unflatten(0, (keys, group.rows)), out)
        return *outs, None, None, None


def _by_key(x: Tensor, keys: int) -> Tensor:
    """[B, K · G, T, D] → [Z, G, T, D]."""
    return x.reshape(x.shape[0] * keys, -1, *x.shape[2:])


def _by_key_packed(x: Tensor, keys: int) -> Tensor:
    """[K · G, rows, T, D] → [K · rows, G, T, D]."""
    return x.unflatten(0, (keys, -1)).transpose(1, 2).flatten(0, 1)


def _by_head(x: Tensor, rows: int) -> Tensor:
    """The reverse of `_by_key_packed`."""
    return x.unflatten(0, (-1, rows)).transpose(1, 2).flatten(0, 1)


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    starts: tuple[int, ...] | None = None,
    window: int = 0,
) -> Tensor:
    """Causal attention of rows without padding to their left.

    Args:
        query: [B, K · G, T, D].
        key: [B, K, T, D].
        value: [B, K, T, D]; here alone D may be another.
        scale: Factor on the scores.
        starts: Where each of the packed rows begins that the T tokens are (B is 1), and T.
        window: How many keys a query sees, its own last; 0: all before it.

    Returns:
        [B, K · G, T, D].
    """
    if kernel.takes(query, key, value):
        out: Tensor = kernel.Attention.apply(query, key, value, scale, list(starts or ()), window)
        return out
    edges = starts or (0, query.shape[2])
    longest = max(b - a for a, b in pairwise(edges))
    if min(longest, window or longest) > LONGEST_IN_BLOCKS or _emulated(query.dtype):
        return _flash_attention(query, key, value, scale, edges, window)
    groups = None if starts is None else groups_of(starts, query.device)
    blocks: Tensor = _BlockAttention.apply(query, key, value, scale, groups, window)
    return blocks


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, edges: Sequence[int], window: int
) -> Tensor:
    """`block_attention` by PyTorch's kernel, which reads repeated keys faster than grouped ones.

    It knows no window: as many queries at once meet their keys under a mask.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    outs = []
    for first, last in pairwise(edges):
        if not 0 < window < last - first:
            q, k, v = (x[:, :, first:last] for x in (query, key, value))
            outs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale))
            continue
        for start in range(first, last, window):
            queries = range(start, min(start + window, last))
            keys = range(max(first, start + 1 - window), queries.stop)
            q = query[:, :, queries.start : queries.stop]
            k, v = (x[:, :, keys.start : keys.stop] for x in (key, value))
            mask = _window_mask(queries, keys, window, query.device)
            outs.append(F.scaled_dot_product_attention(q, k, v, mask, scale=scale))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def _window_mask(queries: range, keys: range, window: int, device: torch.device) -> Tensor:
    """[queries, keys]: whether each sees each."""
    query = torch.arange(queries.start, queries.stop, device=device)[:, None]
    key = torch.arange(keys.start, keys.stop, device=device)[None]
    return (key <= query) & (key > query - window)


@functools.cache
def _emulated(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies numbers of a format only by way of others."""
    name = str(dtype).removeprefix("torch.")
    return hardware.formats("cpu").get(name, "yes").startswith("emulated")


@torch.library.custom_op("lighten::attention_here", mutates_args=())
def attention_here(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.attention.attention` among the rows that `packed` says as it runs.

    A compiler that was shown where rows begin would compile each batch anew.

    Returns:
        Its two results, and [T + 1] where rows begin, from there on −1.
    """
    starts = starts_within(query) or ()
    padded_starts = torch.full((query.shape[2] + 1,), -1, dtype=torch.int64)
    padded_starts[: len(starts)] = torch.tensor(starts, dtype=torch.int64)
    return *kernel.attention(query, key, value, scale, list(starts), window), padded_starts


@attention_here.register_fake
def _(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    del rest
    return *kernel.outputs(query), query.new_empty(query.shape[2] + 1, dtype=torch.int64)


@torch.library.custom_op("lighten::attention_here_backward", mutates_args=())
def attention_here_backward(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, padded_starts: Tensor,
    grad: Tensor, scale: float, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the three inputs of `attention_here`, from them and its results."""
    starts = padded_starts[padded_starts >= 0].tolist()
    return kernel.attention_backward(query, key, value, out, sums, grad, scale, starts, window)


@attention_here_backward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *unused: Any) -> tuple[Tensor, Tensor, Tensor]:
    del unused
    return kernel.gradients(query, key, value)


class _AttentionHere(torch.autograd.Function):
    """`attention_here` with its gradients."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int
    ) -> Tensor:
        results = torch.ops.lighten.attention_here(query, key, value, scale, window)
        ctx.save_for_backward(query, key, value, *results)
        ctx.settings = scale, window
        return results[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = torch.ops.lighten.attention_here_backward(
            *ctx.saved_tensors, grad, *ctx.settings
        )
        return *gradients, None, None


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As transformers calls it; whatever is not plain causal attention goes to PyTorch's own."""
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    plain = attention_mask is None and causal and not options.get("dropout")
    whole = query.shape[2] == key.shape[2] > 1
    window = _window(module, options)
    if not (plain and whole) or options.get("position_bias") is not None:
        if attention_mask is None and window and query.shape[2] == key.shape[2]:
            tokens = range(query.shape[2])
            attention_mask = _window_mask(tokens, tokens, window, query.device)[None, None]
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # Of this code alone: `is_compiling` says so of all that runs while a thread compiles.
    if torch.compiler.is_dynamo_compiling():
        out = _AttentionHere.apply(query, key, value, scale, window)
    else:
        out = block_attention(query, key, value, scale, starts_within(query), window)
    return out.transpose(1, 2).contiguous(), None


# A compiler leaves the blocks as they are: they differ from batch to batch.
_forward_uncompiled = torch.compiler.disable(_forward)


def _forward_in_kernel(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """`_forward`, of which a compiler sees the kernel as one operation."""
    # DeepSeek V3's values are narrower than its keys.
    fits = kernel.fits(query) and query.shape[-1] == value.shape[-1]
    if torch.compiler.is_dynamo_compiling() and not fits:
        return _forward_uncompiled(module, query, key, value, *args, **options)
    return _forward(module, query, key, value, *args, **options)


def _forward_repeated(
    reads_grouped_keys: bool, module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
    attention_mask: Tensor | None, **options: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """PyTorch's own; keys and values are repeated where no kernel reads grouped ones."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1 or (reads_grouped_keys and query.dtype != torch.float32):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if options.get("is_causal") is None:
        options["is_causal"] = getattr(module, "is_causal", True)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    # Of a module it would read how often keys are to be repeated.
    return sdpa_attention_forward(_NO_MODULE, query, key, value, attention_mask, **options)


_NO_MODULE = nn.Module()


def _window(module: nn.Module, options: Mapping[str, Any]) -> int:
    """How many keys a layer's queries see where it has no mask; 0: all before them."""
    known = getattr(getattr(module, "config", None), "model_type", None) in WINDOWED
    return int(options.get("sliding_window") or 0) if known else 0


def _mask(*args: Any, **options: Any) -> Tensor | None:
    """No mask where the attention knows itself who sees whom, else PyTorch's."""
    rows, window, config = packing(), options.get("local_size"), options.get("config")
    whole = (
        options.get("q_length") == options.get("kv_length")
        and options.get("attention_mask") is None
        and not options.get("use_vmap")  # a mask of the model's own making
    )
    windowed = getattr(config, "model_type", None) in WINDOWED
    if whole and rows is not None and options.get("q_length") == rows.tokens:
        if window is None or windowed or rows.longest <= window:
            return None
    # transformers allows it for causal and for sliding masks that nothing else is mixed into.
    elif whole and windowed and options.get("allow_is_causal_skip") and not options["q_offset"]:
        return None
    return sdpa_mask(*args, **options)


def register() -> None:
    """Make the attention known to transformers under `NAME`."""
    AttentionInterface.register(NAME, _forward_in_kernel)
    AttentionMaskInterface.register(NAME, _mask)


def choice(dtype: torch.dtype) -> Choice:
    """How a base of this format attends under `NAME`, and why."""
    why_not = formats.obstacle(dtype)
    if why_not is None:
        return Choice("sdpa in a kernel", "compiled for this processor; it keeps no probabilities")
    if _emulated(dtype):
        reason = "PyTorch's flash kernel: products in blocks are slow where they are emulated"
        return Choice("sdpa", reason)
    return Choice(
        "sdpa in blocks",
        f"plain products beat PyTorch's flash kernel on rows up to {LONGEST_IN_BLOCKS} tokens; "
        f"{why_not}",
    )


def register_repeated(capability: tuple[int, int]) -> None:
    """Make the attention known to transformers under `REPEATS`.

    Args:
        capability: Compute capability of the device.
    """
    reads = capability >= GROUPED_SINCE
    AttentionInterface.register(REPEATS, functools.partial(_forward_repeated, reads))
    AttentionMaskInterface.register(REPEATS, sdpa_mask)
