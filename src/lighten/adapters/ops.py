"""The low-rank product of a cohort on one frozen linear layer: plain reference and fused form.

Dimensions: N rows of hidden vectors (batch × time, flattened), I input features, O output
features, r rank. A segment is the run of rows [start, stop) that belongs to one adapter:

    y[start:stop] = x[start:stop] Wᵀ + b + scale · drop(x[start:stop]) Aᵀ Bᵀ

with W [O, I] frozen, A [r, I] and B [O, r] in float32. Products run in x's format: PEFT casts x
to the adapter's float32 instead, which costs a float32 copy of every activation.
Source: LoRA, arXiv 2106.09685, section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lighten.adapters.frozen import product, weight_of


@dataclass(frozen=True)
class Dropout:
    """Which features of a segment's rows are dropped: recomputed from seeds, never stored.

    Attributes:
        probability: Share of the features dropped.
        seeds: One seed per example of the segment, so that an example's mask does not depend on
            which others share its micro-batch.
        lengths: Real tokens of each example; padding beyond is left as it is.
        widths: Rows that each example takes in x, at least its length.
    """

    probability: float
    seeds: tuple[int, ...]
    lengths: tuple[int, ...]
    widths: tuple[int, ...]

    def factors(self, features: int, like: Tensor) -> Tensor:
        """What x is multiplied with, [sum of widths, features]: 0 or 1 / (1 − p)."""
        keep = 1.0 - self.probability
        out = torch.ones(sum(self.widths), features, dtype=like.dtype)
        generator = torch.Generator()
        start = 0
        for seed, length, width in zip(self.seeds, self.lengths, self.widths, strict=True):
            generator.manual_seed(seed)
            kept = torch.rand(length, features, generator=generator) < keep
            out[start : start + length] = kept.to(like.dtype) / keep
            start += width
        return out.to(like.device)


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) of the flattened input, the scale of their adapter and its dropout."""

    start: int
    stop: int
    scale: float
    dropout: Dropout | None = None


def reference(
    x: Tensor, base: nn.Module, segments: Sequence[Segment], factors: Sequence[Tensor]
) -> Tensor:
    """The same value as `low_rank_linear`, left to autograd: what the fused form is tested against.

    Args:
        x: [..., I].
        base: The frozen `nn.Linear` or `Conv1D`.
        segments: Rows of the flattened x by adapter; rows in none take the base alone.
        factors: A and B of each segment, in turn.

    Returns:
        [..., O] in x's format.
    """
    flat = x.reshape(-1, x.shape[-1])
    out = product(base, flat)
    delta = torch.zeros_like(out)
    for segment, A, B in zip(segments, factors[::2], factors[1::2], strict=True):
        rows = flat[segment.start : segment.stop]
        if segment.dropout is not None:
            rows = rows * segment.dropout.factors(rows.shape[-1], rows)
        update = F.linear(F.linear(rows, A.to(x.dtype)), B.to(x.dtype)) * segment.scale
        delta = torch.cat([delta[: segment.start], update, delta[segment.stop :]])
    return (out + delta).view(*x.shape[:-1], out.shape[-1])


class _LowRankLinear(torch.autograd.Function):
    """`reference` with a hand-written backward.

    It keeps x once (layers that read the same x share that storage), the small products x Aᵀ and
    nothing else; the gradient of the frozen weight is never formed, and updates are added in
    place to the base's output.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: nn.Module, segments: Sequence[Segment], *factors: Tensor
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out = product(base, flat)
        inner = []
        for segment, A, B in zip(segments, factors[::2], factors[1::2], strict=True):
            rows = _dropped(flat[segment.start : segment.stop], segment)
            low = rows @ A.to(x.dtype).T
            out[segment.start : segment.stop].addmm_(low, B.to(x.dtype).T, alpha=segment.scale)
            inner.append(low)
        ctx.base, ctx.segments = base, segments
        ctx.save_for_backward(x, *factors, *inner)
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        segments: Sequence[Segment] = ctx.segments
        x, *saved = ctx.saved_tensors
        factors, inner = saved[: 2 * len(segments)], saved[2 * len(segments) :]
        flat = x.reshape(-1, x.shape[-1])
        grad = grad.reshape(-1, grad.shape[-1])
        grad_x = grad @ weight_of(ctx.base) if ctx.needs_input_grad[0] else None
        grad_factors: list[Tensor | None] = []
        for segment, A, B, low in zip(segments, factors[::2], factors[1::2], inner, strict=True):
            rows = slice(segment.start, segment.stop)
            scaled = grad[rows] @ B.to(x.dtype) * segment.scale  # [n, r]
            dropped = _dropped(flat[rows], segment)
            grad_B = (grad[rows].T @ low * segment.scale).to(B.dtype)
            grad_factors += [(scaled.T @ dropped).to(A.dtype), grad_B]
            if grad_x is not None and segment.dropout is None:
                grad_x[rows].addmm_(scaled, A.to(x.dtype))
            elif grad_x is not None and segment.dropout is not None:
                through = scaled @ A.to(x.dtype)
                grad_x[rows] += through * segment.dropout.factors(through.shape[-1], through)
        grad_x = None if grad_x is None else grad_x.view(x.shape)
        return (grad_x, None, None, *grad_factors)


def _dropped(rows: Tensor, segment: Segment) -> Tensor:
    if segment.dropout is None:
        return rows
    return rows * segment.dropout.factors(rows.shape[-1], rows)


def low_rank_linear(
    x: Tensor, base: nn.Module, segments: Sequence[Segment], factors: Sequence[Tensor]
) -> Tensor:
    """The frozen layer plus the low-rank update of each segment's adapter, fused.

    Args, shapes and value are those of `reference`.
    """
    if not segments:
        return base(x)
    return _LowRankLinear.apply(x, base, segments, *factors)
