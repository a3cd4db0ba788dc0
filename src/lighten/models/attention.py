"""Causal attention for processors: matrix products over blocks of queries.

PyTorch's flash kernel for CPUs is slower than plain matrix products at the lengths people
fine-tune with, its backward pass above all; plain attention computes the upper half of the scores
for nothing, repeats the keys of grouped queries, and keeps float32 scores. Here each block of
queries meets only the keys from its first row's beginning up to its own end, heads that share keys
share a product, and the backward pass keeps the probabilities alone, in the base's format. Rows may
stand behind each other in one packed row (`packed`): no padding is computed.

Dimensions: B rows, K key-value heads, G query heads per key-value head, T tokens, D features.
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
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "lighten_blocks"
# Queries per block: large enough to fill a matrix product, small enough to skip the upper half.
BLOCK = 128
# Attention implementations that keep rows apart which stand behind each other in one.
PACKS = frozenset({NAME, "flash_attention_2", "flash_attention_3"})


@dataclass(frozen=True)
class Block:
    """Queries [start, stop) and the keys [first, stop) that they may see some of.

    Attributes:
        start: First query.
        stop: One past the last query and the last key.
        first: First key.
        hidden: [stop − start, stop − from_key] bool, true where a query may not see a key.
        from_key: The first key for which `hidden` speaks; those before it are seen by all.
    """

    start: int
    stop: int
    first: int
    hidden: Tensor
    from_key: int

    @property
    def rows(self) -> slice:
        """The queries."""
        return slice(self.start, self.stop)

    @property
    def keys(self) -> slice:
        """The keys."""
        return slice(self.first, self.stop)


@functools.lru_cache(maxsize=16)
def blocks_of(starts: tuple[int, ...]) -> tuple[Block, ...]:
    """The blocks of queries of rows that stand behind each other.

    Args:
        starts: Where each row begins, and the end of the last.
    """
    found = []
    for first, end in pairwise(starts):
        count = -(-(end - first) // BLOCK)
        edges = [first + (end - first) * i // count for i in range(count + 1)]
        for start, stop in pairwise(edges):
            query, key = torch.arange(start, stop)[:, None], torch.arange(start, stop)
            found.append(Block(start, stop, first, key > query, start))
    return tuple(found)


@dataclass(frozen=True)
class _Packed:
    longest: int
    tokens: int
    blocks: tuple[Block, ...]


_packed: ContextVar[_Packed | None] = ContextVar("packed", default=None)


@contextmanager
def packed(starts: Sequence[int] | None) -> Iterator[None]:
    """What runs inside attends within rows that stand behind each other in one.

    Args:
        starts: Where each row begins, and the end of the last; None: rows are not packed.
    """
    lengths = [b - a for a, b in pairwise(starts or ())]
    own = _Packed(max(lengths), starts[-1], blocks_of(tuple(starts))) if starts else None
    before = _packed.set(own)
    try:
        yield
    finally:
        _packed.reset(before)


class _BlockAttention(torch.autograd.Function):
    """softmax(scale · Q Kᵀ + causal) V without the scores above the diagonal."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, blocks: Sequence[Block]
    ) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        query = query * scale
        kept = []
        for block in blocks:
            scores = _grouped(query, block) @ key[:, block.keys].mT
            later = _ungrouped(scores, block)[..., block.from_key - block.first :]
            later.masked_fill_(block.hidden.to(scores.device), float("-inf"))
            weights = scores.softmax(-1)  # float32 inside, rounded once
            out[:, :, block.rows] = _ungrouped(weights @ value[:, block.keys], block)
            kept.append(weights)
        ctx.scale, ctx.blocks = scale, blocks
        ctx.save_for_backward(query, key, value, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        grad_query, grad_key = torch.empty_like(query), torch.zeros_like(key)
        grad_value = torch.zeros_like(value)
        for block, weights in zip(ctx.blocks, kept, strict=True):
            upstream = _grouped(grad, block)
            grad_value[:, block.keys].baddbmm_(weights.mT, upstream)
            slope = upstream @ value[:, block.keys].mT
            slope = torch._softmax_backward_data(slope, weights, -1, weights.dtype)
            grad_query[:, :, block.rows] = _ungrouped(slope @ key[:, block.keys], block)
            grad_key[:, block.keys].baddbmm_(slope.mT, _grouped(query, block))
        return grad_query.mul_(ctx.scale), grad_key, grad_value, None, None


def _grouped(x: Tensor, block: Block) -> Tensor:
    """[B·K, G, T, ·] → [B·K, G · rows, ·]: the heads that share keys stand under each other."""
    return x[:, :, block.rows].flatten(1, 2)


def _ungrouped(x: Tensor, block: Block) -> Tensor:
    """The reverse of `_grouped` for one block."""
    return x.unflatten(1, (-1, block.stop - block.start))


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    blocks: Sequence[Block] | None = None,
) -> Tensor:
    """Causal attention of rows without padding to their left.

    Args:
        query: [B, K · G, T, D].
        key: [B, K, T, D].
        value: [B, K, T, D].
        scale: Factor on the scores.
        blocks: Of the packed rows that the T tokens are; None: each is one row.

    Returns:
        [B, K · G, T, D].
    """
    rows, heads, tokens, features = query.shape
    groups = heads // key.shape[1]
    q = query.reshape(rows * key.shape[1], groups, tokens, features)
    k, v = (x.reshape(-1, tokens, x.shape[-1]) for x in (key, value))
    blocks = blocks_of((0, tokens)) if blocks is None else blocks
    return _BlockAttention.apply(q, k, v, scale, blocks).view(rows, heads, tokens, v.shape[-1])


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As transformers calls it; whatever is not plain causal attention goes to PyTorch's own."""
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    plain = attention_mask is None and causal and not options.get("dropout")
    same = query.shape[2] == key.shape[2] > 1 and query.shape[-1] == value.shape[-1]
    if not (plain and same) or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    own = _packed.get()
    blocks = own.blocks if own is not None and query.shape[::2] == (1, own.tokens) else None
    out = block_attention(query, key, value, scale, blocks)
    return out.transpose(1, 2).contiguous(), None


def _mask(*args: Any, **options: Any) -> Tensor | None:
    """No mask where the blocks know themselves who sees whom, else PyTorch's."""
    own, window = _packed.get(), options.get("local_size")
    if (
        own is not None
        and options.get("q_length") == options.get("kv_length") == own.tokens
        and options.get("attention_mask") is None
        and not options.get("use_vmap")  # a mask of the model's own making
        and (window is None or own.longest <= window)
    ):
        return None
    return sdpa_mask(*args, **options)


def register() -> None:
    """Make the attention known to transformers under `NAME`."""
    # Compiled layers leave it as it is: its blocks differ from batch to batch.
    AttentionInterface.register(NAME, torch.compiler.disable(_forward))
    AttentionMaskInterface.register(NAME, _mask)
