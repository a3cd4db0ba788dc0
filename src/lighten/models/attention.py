"""Causal attention for processors: matrix products over blocks of queries.

PyTorch's flash kernel for CPUs is slower than plain matrix products at the lengths people
fine-tune with, its backward pass above all; plain attention computes the upper half of the scores
for nothing, repeats the keys of grouped queries, and keeps float32 scores. Here each block of
queries meets only the keys up to its end, heads that share keys share a product, and the backward
pass keeps the probabilities alone, in the base's format.

Dimensions: B rows, K key-value heads, G query heads per key-value head, T tokens, D features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "lighten_blocks"
# Queries per block: large enough to fill a matrix product, small enough to skip the upper half.
BLOCK = 128


class _BlockAttention(torch.autograd.Function):
    """softmax(scale · Q Kᵀ + causal) V without the scores above the diagonal."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        query = query * scale
        kept = []
        for rows in _blocks(query.shape[2]):
            scores = _grouped(query, rows) @ key[:, : rows.stop].mT
            _hide_later_keys(scores, rows)
            weights = scores.softmax(-1)  # float32 inside, rounded once
            out[:, :, rows] = _ungrouped(weights @ value[:, : rows.stop], rows)
            kept.append(weights)
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        grad_query, grad_key = torch.empty_like(query), torch.zeros_like(key)
        grad_value = torch.zeros_like(value)
        for rows, weights in zip(_blocks(query.shape[2]), kept, strict=True):
            upstream = _grouped(grad, rows)
            grad_value[:, : rows.stop].baddbmm_(weights.mT, upstream)
            slope = upstream @ value[:, : rows.stop].mT
            slope = torch._softmax_backward_data(slope, weights, -1, weights.dtype)
            grad_query[:, :, rows] = _ungrouped(slope @ key[:, : rows.stop], rows)
            grad_key[:, : rows.stop].baddbmm_(slope.mT, _grouped(query, rows))
        return grad_query.mul_(ctx.scale), grad_key, grad_value, None


def _blocks(tokens: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, tokens)) for start in range(0, tokens, BLOCK)]


def _grouped(x: Tensor, rows: slice) -> Tensor:
    """[B·K, G, T, ·] → [B·K, G · rows, ·]: the heads that share keys stand under each other."""
    return x[:, :, rows].flatten(1, 2)


def _ungrouped(x: Tensor, rows: slice) -> Tensor:
    """The reverse of `_grouped` for one block."""
    return x.unflatten(1, (-1, rows.stop - rows.start))


def _hide_later_keys(scores: Tensor, rows: slice) -> None:
    """Minus infinity, in place, where a query would see a key after it."""
    size = rows.stop - rows.start
    later = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu_(1)
    _ungrouped(scores, rows)[..., rows.start :].masked_fill_(later, float("-inf"))


def block_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of rows without padding to their left.

    Args:
        query: [B, K · G, T, D].
        key: [B, K, T, D].
        value: [B, K, T, D].
        scale: Factor on the scores.

    Returns:
        [B, K · G, T, D].
    """
    rows, heads, tokens, features = query.shape
    groups = heads // key.shape[1]
    q = query.reshape(rows * key.shape[1], groups, tokens, features)
    k, v = (x.reshape(-1, tokens, x.shape[-1]) for x in (key, value))
    return _BlockAttention.apply(q, k, v, scale).view(rows, heads, tokens, v.shape[-1])


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
    return block_attention(query, key, value, scale).transpose(1, 2).contiguous(), None


def register() -> None:
    """Make the attention known to transformers under `NAME`."""
    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
