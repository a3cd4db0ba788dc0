"""Causal attention for processors: matrix products over blocks of queries.

PyTorch's flash kernel for CPUs is slower than plain matrix products at the lengths people
fine-tune with, its backward pass above all; plain attention computes the upper half of the scores
for nothing, repeats the keys of grouped queries, and keeps float32 scores. Here each block of
queries meets only the keys up to its own end, heads that share keys share a product, and the
backward pass keeps the probabilities alone, in the base's format. Processors that multiply
bfloat16 do all of it in a kernel (`kernels/attention.cpp`), which keeps no probability either.

Rows may stand behind each other in one packed row (`packed`). Only the attention needs them under
each other: rows of like length are gathered, attended to together and put back, so that no other
layer computes padding.

Dimensions: B rows, K key-value heads, G query heads per key-value head, T tokens, D features, N
tokens of a packed row, Z = B · K.

On CUDA devices PyTorch's own kernels are the best there is, but the only ones that read grouped
keys as they are want half precision and compute capability 8.0: for a T4, or in float32, it falls
back to plain attention, which keeps all scores. `_forward_repeated` repeats the keys there, so that
the memory-efficient kernel takes them (benchmarks/gpu_suite.py: 96 against 2552 MiB).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lighten.cpu import kernels
from lighten.cpu.kernels import attention as kernel
from lighten.machine.hardware import Choice

NAME, REPEATS = "lighten_blocks", "lighten_repeats"
GROUPED_SINCE = (8, 0)  # compute capability from which half precision's kernels read grouped keys
# Attention implementations that keep rows apart which stand behind each other in one.
PACKS = frozenset({NAME, "flash_attention_2", "flash_attention_3"})
# What the setting `attn_implementation` calls ours.
_SETTING = {NAME: "sdpa", REPEATS: "sdpa"}
# Queries per block: large enough to fill a matrix product, small enough to skip the upper half.
BLOCK = 128
# A packed row this much shorter than the longest of its group starts another group.
ALIKE = 0.8


def setting_of(name: str) -> str:
    """What the setting `attn_implementation` calls an attention that transformers has by a name."""
    return _SETTING.get(name, name)


@dataclass(frozen=True)
class Group:
    """Packed rows of like length, to be laid under each other.

    Attributes:
        rows: How many.
        tokens: Of the longest.
        index: [rows · tokens] where each token stands in the packed row; padding repeats a row's
            last token.
        real: [real tokens] which of them are no padding.
    """

    rows: int
    tokens: int
    index: Tensor
    real: Tensor

    def gathered(self, x: Tensor) -> Tensor:
        """[1, heads, N, D] → [heads, rows, tokens, D]."""
        return x[0].index_select(1, self.index).unflatten(1, (self.rows, self.tokens))

    def put_back(self, x: Tensor, out: Tensor) -> None:
        """[heads, rows, tokens, D] → its places in [1, heads, N, D]."""
        flat = x.flatten(1, 2)
        if len(self.real) < len(self.index):
            flat = flat.index_select(1, self.real)
        out[0].index_copy_(1, self.index[self.real], flat)

    def without_padding(self, x: Tensor) -> Tensor:
        """[heads, rows, tokens, D] with zeros where it is padding."""
        if len(self.real) == len(self.index):
            return x
        mask = x.new_zeros(self.rows * self.tokens, 1)
        mask[self.real] = 1.0
        return x * mask.view(self.rows, self.tokens, 1)


@functools.lru_cache(maxsize=16)
def groups_of(starts: tuple[int, ...], device: torch.device | str = "cpu") -> tuple[Group, ...]:
    """Groups of rows of like length.

    Args:
        starts: Where each packed row begins, and the end of the last.
        device: Where the indices go.
    """
    rows = sorted(pairwise(starts), key=lambda row: row[0] - row[1])
    groups: list[list[tuple[int, int]]] = []
    for row in rows:
        longest = groups[-1][0][1] - groups[-1][0][0] if groups else 0
        if row[1] - row[0] < ALIKE * longest or not groups:
            groups.append([])
        groups[-1].append(row)
    packed_groups = []
    for group in groups:
        tokens = group[0][1] - group[0][0]
        places = torch.arange(tokens)
        index = torch.stack([(places + a).clamp_max(b - 1) for a, b in group])
        real = torch.stack([places < b - a for a, b in group]).flatten().nonzero()[:, 0]
        index, real = index.flatten().to(device), real.to(device)
        packed_groups.append(Group(len(group), tokens, index, real))
    return tuple(packed_groups)


@dataclass(frozen=True)
class _Packed:
    longest: int
    starts: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.starts[-1]


_packed: ContextVar[_Packed | None] = ContextVar("packed", default=None)


@contextmanager
def packed(starts: Sequence[int] | None) -> Iterator[None]:
    """What runs inside attends within rows that stand behind each other in one.

    Args:
        starts: Where each row begins, and the end of the last; None: rows are not packed.
    """
    longest = max((b - a for a, b in pairwise(starts or ())), default=0)
    before = _packed.set(_Packed(longest, tuple(starts)) if starts else None)
    try:
        yield
    finally:
        _packed.reset(before)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, list[Tensor]]:
    """softmax(Q Kᵀ + causal) V and, by block, the probabilities: the scale is in Q already.

    Args:
        query: [Z, G, T, D].
        key: [Z, T, D].
        value: [Z, T, D].
    """
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    probabilities = []
    for block in _blocks(query.shape[2]):
        scores = _stacked(query, block) @ key[:, : block.stop].mT
        size = block.stop - block.start
        later = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu_(1)
        _unstacked(scores, block)[..., block.start :].masked_fill_(later, float("-inf"))
        weights = scores.softmax(-1)  # float32 inside, rounded once
        out[:, :, block] = _unstacked(weights @ value[:, : block.stop], block)
        probabilities.append(weights)
    return out, probabilities


def _attend_backward(
    query: Tensor, key: Tensor, value: Tensor, probabilities: Sequence[Tensor], grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the three inputs of `_attend`."""
    grad_query, grad_key = torch.empty_like(query), torch.zeros_like(key)
    grad_value = torch.zeros_like(value)
    for block, weights in zip(_blocks(query.shape[2]), probabilities, strict=True):
        upstream = _stacked(grad, block)
        grad_value[:, : block.stop].baddbmm_(weights.mT, upstream)
        gradient = upstream @ value[:, : block.stop].mT
        gradient = torch._softmax_backward_data(gradient, weights, -1, weights.dtype)
        grad_query[:, :, block] = _unstacked(gradient @ key[:, : block.stop], block)
        grad_key[:, : block.stop].baddbmm_(gradient.mT, _stacked(query, block))
    return grad_query, grad_key, grad_value


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
    ) -> Tensor:
        ctx.scale, ctx.groups, ctx.shapes = scale, groups, (query.shape, key.shape, value.shape)
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
            attended, probabilities = _attend(q, k, v)
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
            gradients = _attend_backward(q, k, v, weights, upstream)
            gradients[0].mul_(ctx.scale)
            if ctx.groups is None:
                outs = [
                    gradient.view(out.shape) for gradient, out in zip(gradients, outs, strict=True)
                ]
                continue
            group.put_back(_by_head(gradients[0], group.rows), outs[0])
            for gradient, out in zip(gradients[1:], outs[1:], strict=True):
                group.put_back(gradient.unflatten(0, (keys, group.rows)), out)
        return *outs, None, None


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
) -> Tensor:
    """Causal attention of rows without padding to their left.

    Args:
        query: [B, K · G, T, D].
        key: [B, K, T, D].
        value: [B, K, T, D].
        scale: Factor on the scores.
        starts: Where each of the packed rows begins that the T tokens are (B is 1), and T.

    Returns:
        [B, K · G, T, D].
    """
    if kernel.takes(query, key, value):
        out: Tensor = kernel.Attention.apply(query, key, value, scale, list(starts or ()))
        return out
    groups = None if starts is None else groups_of(starts, query.device)
    blocks: Tensor = _BlockAttention.apply(query, key, value, scale, groups)
    return blocks


@torch.library.custom_op("lighten::attention_here", mutates_args=())
def attention_here(
    query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.attention.attention` among the rows that `packed` says as it runs.

    A compiler that was shown where rows begin would compile each batch anew.

    Returns:
        Its two results, and [T + 1] where rows begin, from there on −1.
    """
    starts = _starts_within(query) or ()
    padded_starts = torch.full((query.shape[2] + 1,), -1, dtype=torch.int64)
    padded_starts[: len(starts)] = torch.tensor(starts, dtype=torch.int64)
    return *kernel.attention(query, key, value, scale, list(starts)), padded_starts


@attention_here.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    del key, value, scale
    return *kernel.outputs(query), query.new_empty(query.shape[2] + 1, dtype=torch.int64)


@torch.library.custom_op("lighten::attention_here_backward", mutates_args=())
def attention_here_backward(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, padded_starts: Tensor,
    grad: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the three inputs of `attention_here`, from them and its results."""
    starts = padded_starts[padded_starts >= 0].tolist()
    return kernel.attention_backward(query, key, value, out, sums, grad, scale, starts)


@attention_here_backward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *unused: Any) -> tuple[Tensor, Tensor, Tensor]:
    del unused
    return kernel.gradients(query, key, value)


class _AttentionHere(torch.autograd.Function):
    """`attention_here` with its gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out, sums, padded_starts = torch.ops.lighten.attention_here(query, key, value, scale)
        ctx.save_for_backward(query, key, value, out, sums, padded_starts)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = torch.ops.lighten.attention_here_backward(*ctx.saved_tensors, grad, ctx.scale)
        return *gradients, None


def _starts_within(query: Tensor) -> tuple[int, ...] | None:
    """Where the packed rows begin that these queries are; None where they are not packed."""
    packing = _packed.get()
    fits = packing is not None and (query.shape[0], query.shape[2]) == (1, packing.tokens)
    return packing.starts if packing and fits else None


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As transformers calls it; whatever is not plain causal attention goes to PyTorch's own."""
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    plain = attention_mask is None and causal and not options.get("dropout")
    same_shape = query.shape[2] == key.shape[2] > 1 and query.shape[-1] == value.shape[-1]
    if not (plain and same_shape) or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if torch.compiler.is_compiling():
        out = _AttentionHere.apply(query, key, value, scale)
    else:
        out = block_attention(query, key, value, scale, _starts_within(query))
    return out.transpose(1, 2).contiguous(), None


# A compiler leaves the blocks as they are: they differ from batch to batch.
_forward_uncompiled = torch.compiler.disable(_forward)


def _forward_in_kernel(
    module: nn.Module, query: Tensor, *args: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """`_forward`, of which a compiler sees the kernel as one operation."""
    if torch.compiler.is_compiling() and not kernel.fits(query):
        return _forward_uncompiled(module, query, *args, **options)
    return _forward(module, query, *args, **options)


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


def _mask(*args: Any, **options: Any) -> Tensor | None:
    """No mask where the blocks know themselves who sees whom, else PyTorch's."""
    packing, window = _packed.get(), options.get("local_size")
    if (
        packing is not None
        and options.get("q_length") == options.get("kv_length") == packing.tokens
        and options.get("attention_mask") is None
        and not options.get("use_vmap")  # a mask of the model's own making
        and (window is None or packing.longest <= window)
    ):
        return None
    return sdpa_mask(*args, **options)


def register() -> None:
    """Make the attention known to transformers under `NAME`."""
    forward = _forward_in_kernel if kernels.available() else _forward_uncompiled
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, _mask)


def choice(dtype: torch.dtype) -> Choice:
    """How a base of this format attends under `NAME`, and why."""
    why_not = "bfloat16 alone has a kernel" if dtype != torch.bfloat16 else kernels.obstacle()
    if why_not is None:
        return Choice("sdpa in a kernel", "compiled for this processor; it keeps no probabilities")
    return Choice("sdpa in blocks", f"plain products beat PyTorch's flash kernel here; {why_not}")


def register_repeated(capability: tuple[int, int]) -> None:
    """Make the attention known to transformers under `REPEATS`.

    Args:
        capability: Compute capability of the device.
    """
    reads = capability >= GROUPED_SINCE
    AttentionInterface.register(REPEATS, functools.partial(_forward_repeated, reads))
    AttentionMaskInterface.register(REPEATS, sdpa_mask)
