"""Rounding a weight to 4 bits so that a layer's outputs change least: GPTQ (arXiv 2210.17323).

A column is rounded at a time, and the columns that are left take over its error, as the inputs'
second moments say. Columns of large inputs come first (act-order), with scales that are chosen
beforehand, so that groups stay where they are. It is a Cholesky factor and one pass over the
columns: no learning, and seconds for a layer that learnt rounding takes a minute for.

Dimensions: O outputs, I inputs, G = I / g groups of g inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOWEST, HIGHEST = -8, 7
DAMPING = 0.01  # of the mean second moment, added to each; the paper's
BLOCK = 128  # columns whose errors the rest takes over at once; the paper's
# Scales that are tried for a group: shares of the one that its largest number asks for.
SHARES = tuple(1.0 - 0.01 * step for step in range(41))
SMALLEST = 1e-7  # of a scale in float16


@dataclass(frozen=True)
class Scales:
    """How a format stores scales.

    Attributes:
        dtype: Its format of floating point: a scale is rounded to it before weights are.
        signed: A scale may be negative, so that the largest number of a group becomes -8 whatever
            its sign.
    """

    dtype: torch.dtype
    signed: bool

    def stored(self, scales: Tensor) -> Tensor:
        """As they are read back, in float32."""
        return scales.to(self.dtype).float()


HALF = Scales(torch.float16, signed=True)


def plain_scales(weight: Tensor, group_size: int, kind: Scales = HALF) -> Tensor:
    """Scales [O, G] that clip no number of their group.

    Args:
        weight: [O, I].
        group_size: g.
        kind: How they are stored.
    """
    groups = weight.unflatten(1, (-1, group_size))
    high, low = groups.amax(-1), groups.amin(-1)
    if kind.signed:
        scales = torch.where(high.abs() > low.abs(), high, low) / LOWEST
    else:
        scales = torch.maximum(high / HIGHEST, low / LOWEST)
    least = torch.full_like(scales, SMALLEST)
    return kind.stored(torch.where(scales.abs() < SMALLEST, least, scales))


def searched_scales(
    weight: Tensor, group_size: int, importance: Tensor, kind: Scales = HALF
) -> Tensor:
    """Scales [O, G] of the least weighted error: large numbers may be clipped for the others' sake.

    Args:
        weight: [O, I].
        group_size: g.
        importance: Of each input, [I].
        kind: How they are stored.
    """
    groups = weight.unflatten(1, (-1, group_size))
    weights = importance.unflatten(0, (-1, group_size))
    widest = plain_scales(weight, group_size, kind)
    best, least = widest, torch.full_like(widest, torch.inf)
    for share in SHARES:
        scales = kind.stored(widest * share)
        error = _rounded(groups, scales[..., None]).mul_(scales[..., None]).sub_(groups)
        errors = error.square_().mul_(weights).sum(-1)
        better = errors < least
        best, least = torch.where(better, scales, best), torch.where(better, errors, least)
    return best


def rounded_plainly(weight: Tensor, group_size: int, kind: Scales = HALF) -> tuple[Tensor, Tensor]:
    """Each number to its nearest: integers [O, I] in int8, scales [O, G]."""
    scales = plain_scales(weight, group_size, kind)
    groups = weight.unflatten(1, (-1, group_size))
    return _rounded(groups, scales[..., None]).flatten(1).to(torch.int8), scales


def rounded(
    weight: Tensor, moments: Tensor, group_size: int, kind: Scales = HALF
) -> tuple[Tensor, Tensor]:
    """A weight rounded for the inputs that it will see.

    Args:
        weight: [O, I], float32.
        moments: Sum over inputs x of x xᵀ, [I, I], float32.
        group_size: g.
        kind: How scales are stored.

    Returns:
        Integers [O, I] in int8 and scales [O, G] in float32, exact in the format of `kind`.
    """
    inputs = weight.shape[1]
    moments = moments.clone()
    moments.diagonal().add_(DAMPING * moments.diagonal().mean() + 1e-12)
    importance = moments.diagonal().clone()
    scales = searched_scales(weight, group_size, importance, kind)
    order = torch.argsort(importance, descending=True, stable=True)
    adjusted = weight[:, order]  # what columns are to become, errors of earlier ones added
    factor = _factor(moments[order][:, order])
    columns = scales[:, order // group_size]  # [O, I]
    integers = torch.empty_like(adjusted)
    for start in range(0, inputs, BLOCK):
        stop = min(start + BLOCK, inputs)
        block, errors = adjusted[:, start:stop], torch.empty_like(adjusted[:, start:stop])
        within = factor[start:stop, start:stop]
        for place in range(stop - start):
            scale = columns[:, start + place]
            integers[:, start + place] = _rounded(block[:, place], scale)
            error = block[:, place] - integers[:, start + place] * scale
            error /= within[place, place]
            block[:, place + 1 :].addr_(error, within[place, place + 1 :], alpha=-1)
            errors[:, place] = error
        adjusted[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return integers[:, torch.argsort(order)].to(torch.int8), scales


def _factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse, damped further where that is indefinite."""
    for _ in range(6):
        lower, failed = torch.linalg.cholesky_ex(moments)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        moments.diagonal().add_(10 * DAMPING * moments.diagonal().mean())
    raise FloatingPointError("the calibration rows' activations are not finite")


def _rounded(values: Tensor, scales: Tensor) -> Tensor:
    return values.div(scales).round_().clamp_(LOWEST, HIGHEST)
