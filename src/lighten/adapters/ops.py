"""The low-rank products of a cohort on frozen linear layers: plain reference and fused form.

Dimensions: N rows of hidden vectors (batch × time, flattened), I input features, O output
features, r rank, R ranks of several factors side by side. A part is what one adapter adds to one
layer on its run of rows [start, stop):

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
from lighten.cpu import dropout
from lighten.cpu.products import add_linear, linear, linear_into, opaque, shaped

# On a GPU a product costs its launch: up to this many ranks side by side, the parts of several
# adapters become one product over all rows in which a row's foreign ranks are zeroed. Zero times
# what is not finite is not zero: whoever finds such gradients forms them again with `merge` off.
MERGED_RANKS = 256


# Multipliers of a 32-bit finaliser (x ^ x >> 16, · M1, x ^ x >> 15, · M2, x ^ x >> 16) whose output
# bits depend evenly on all input bits: https://github.com/skeeto/hash-prospector, "lowbias32".
_M1, _M2 = 0x7FEB352D, 0x846CA68B - 2**32


def _mix32_(x: Tensor) -> Tensor:
    """Scramble each int32 of x, in place."""
    shifted = x >> 16
    x ^= shifted.bitwise_and_(0xFFFF)  # int32 shifts copy the sign in; the mask takes it out
    x *= _M1
    torch.bitwise_right_shift(x, 15, out=shifted)
    x ^= shifted.bitwise_and_(0x1FFFF)
    x *= _M2
    torch.bitwise_right_shift(x, 16, out=shifted)
    x ^= shifted.bitwise_and_(0xFFFF)
    return x


def mixed_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers (FNV-1a over their 64-bit words)."""
    state = 0xCBF29CE484222325
    for number in numbers:
        state = ((state ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 29
    return state >> 1


def row_hashes(
    seeds: Sequence[int], widths: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """A number for every row of a segment, from its example's seed and its place in the example.

    An example's numbers do not depend on which others share its micro-batch, nor on padding.

    Args:
        seeds: One of 63 bits per example.
        widths: Rows of each example.
        device: Where the numbers go.

    Returns:
        [sum of widths], int32.
    """
    places = torch.cat([torch.arange(width, dtype=torch.int32) for width in widths])
    repeats = torch.tensor(widths)
    halves = torch.tensor([[(s & 0xFFFFFFFF) - 2**31, (s >> 32) - 2**31] for s in seeds])
    # A plan's tensors have no values to count the rows by.
    rows = halves.to(torch.int32).repeat_interleave(repeats, dim=0, output_size=sum(widths))
    low, high = rows.unbind(1)
    return _mix32_(_mix32_(places + low) ^ high).to(device)


@dataclass(frozen=True, eq=False)
class Dropout:
    """Which features of a segment's rows are dropped: a function of counters, never stored.

    Whether a feature is kept follows from a number of its row, one of its column and of the input
    alone (a counter-based generator), formed on the device that needs it: the same when a layer is
    recomputed, when a batch is split otherwise, and in every cohort.

    Attributes:
        probability: Share of the features dropped, in steps of 2^-16.
        rows: `row_hashes` of the segment, [n].
        salt: Of the layers that read the input: they drop the same features of it.
    """

    probability: float
    rows: Tensor
    salt: int

    def of(self, x: Tensor) -> Tensor:
        """X [n, I] with its features dropped and the rest over 1 − p, in its format."""
        if dropout.takes(x):
            out: Tensor = torch.ops.lighten.dropped(x, self.rows, *self._drawing())
            return out
        return x * self.factors(x.shape[-1], x)

    def add_to_(self, total: Tensor, x: Tensor) -> None:
        """Add `of(x)` to a total of x's shape, in place."""
        if dropout.takes(x) and total.is_contiguous():
            torch.ops.lighten.add_dropped_(total, x, self.rows, *self._drawing())
        else:
            total.addcmul_(x, self.factors(x.shape[-1], x))

    def factors(self, features: int, like: Tensor) -> Tensor:
        """What x is multiplied with, [n, features] in the format of `like`: 0 or 1 / (1 − p)."""
        salt, threshold, scale = self._drawing()
        pairs = torch.arange(-(-features // 2), dtype=torch.int32, device=self.rows.device)
        columns = _mix32_(pairs + salt)
        # Each 32-bit number decides on two features.
        drawn = _mix32_(self.rows[:, None] ^ columns).view(torch.int16)[:, :features]
        # 16 bits do not hold a threshold that keeps all.
        return (drawn <= threshold - 1).to(like.dtype).mul_(scale)

    def _drawing(self) -> tuple[int, int, float]:
        """The salt; below which number of 16 bits a feature is kept; 1 / (1 − p)."""
        keep = 1.0 - self.probability
        return self.salt & 0x7FFFFFFF, max(1, round(keep * 2**16)) - 2**15, 1 / keep


@dataclass(frozen=True)
class Part:
    """What one adapter adds to one layer: its rows of the flattened input, scale and dropout.

    Attributes:
        start: First row.
        stop: One past the last row.
        scale: Factor before B A.
        dropout: Of these rows, or None.
        layer: Which of the layers that share the input.
    """

    start: int
    stop: int
    scale: float
    dropout: Dropout | None = None
    layer: int = 0


def reference(
    x: Tensor, bases: Sequence[nn.Module], parts: Sequence[Part], factors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The values of `low_rank_linears`, left to autograd: what the fused form is tested against.

    Args:
        x: [..., I].
        bases: The frozen layers that read x.
        parts: What the adapters add; rows in none take the base alone.
        factors: A and B of each part, in turn.

    Returns:
        [..., O] of each layer, in x's format.
    """
    flat = x.reshape(-1, x.shape[-1])
    outs = [product(base, flat) for base in bases]
    for part, A, B in zip(parts, factors[::2], factors[1::2], strict=True):
        rows = flat[part.start : part.stop]
        if part.dropout is not None:
            rows = rows * part.dropout.factors(rows.shape[-1], rows)
        update = F.linear(F.linear(rows, A.to(x.dtype)), B.to(x.dtype)) * part.scale
        above, below = part.start, len(flat) - part.stop
        outs[part.layer] = outs[part.layer] + F.pad(update, (0, 0, above, below))
    return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in outs)


@dataclass(frozen=True)
class _Block:
    """Parts whose products are formed together, in the order of their layers.

    Attributes:
        start: First row of any of them.
        stop: One past the last.
        order: Which of all parts these are.
        parts: They themselves.
    """

    start: int
    stop: int
    order: tuple[int, ...]
    parts: tuple[Part, ...]

    def inner(self, factors: Sequence[Tensor], like: Tensor) -> Tensor:
        """Every A under each other, [R, I]."""
        return torch.cat([factors[2 * i] for i in self.order]).to(like.dtype)

    def outer(self, factors: Sequence[Tensor], like: Tensor) -> list[tuple[int, slice, Tensor]]:
        """For each layer: which of the R ranks are its own, and its B side by side, [O, own]."""
        products = []
        rank = 0
        for layer in sorted({part.layer for part in self.parts}):
            factors_of_layer = [
                factors[2 * i + 1] for i, part in self._counted() if part.layer == layer
            ]
            stacked = (
                torch.cat(factors_of_layer, 1) if len(factors_of_layer) > 1 else factors_of_layer[0]
            )
            products.append((layer, slice(rank, rank + stacked.shape[1]), stacked.to(like.dtype)))
            rank += stacked.shape[1]
        return products

    def scaled(self, low: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """Each rank times its scale, and zero on rows of other adapters; in place, [n, R]."""
        if all(part.scale == self.parts[0].scale for part in self.parts) and self._alike():
            return low.mul_(self.parts[0].scale)
        ranks = [factors[2 * i].shape[0] for i in self.order]
        if self._alike():
            scales = [part.scale for part, rank in zip(self.parts, ranks, strict=True)
                      for _ in range(rank)]  # fmt: skip
            return low.mul_(torch.tensor(scales, dtype=low.dtype, device=low.device))
        mask = low.new_zeros(low.shape)
        column = 0
        for part, rank in zip(self.parts, ranks, strict=True):
            rows = slice(part.start - self.start, part.stop - self.start)
            mask[rows, column : column + rank] = part.scale
            column += rank
        return low.mul_(mask)

    def _alike(self) -> bool:
        return all((p.start, p.stop) == (self.start, self.stop) for p in self.parts)

    def _counted(self) -> list[tuple[int, Part]]:
        return list(zip(self.order, self.parts, strict=True))


def launches_cost(x: Tensor) -> bool:
    """Whether one larger product beats several small ones on x's device."""
    return x.is_cuda


def _blocks(parts: Sequence[Part], ranks: Sequence[int], *, merge: bool) -> list[_Block]:
    """Parts on the same rows together; with `merge` all of them, while they are few ranks."""
    groups: dict[Any, list[int]] = {}
    merge = merge and sum(ranks) <= MERGED_RANKS
    for i, part in enumerate(parts):
        rows = (part.start, part.stop)
        if part.dropout is not None:  # what is dropped is some rows' and some layers' alone
            key: Any = (*rows, part.dropout.salt)
        else:
            key = "all" if merge else rows
        groups.setdefault(key, []).append(i)
    blocks = []
    for group in groups.values():
        order = tuple(sorted(group, key=lambda i: parts[i].layer))
        joined = tuple(parts[i] for i in order)
        start, stop = min(part.start for part in joined), max(part.stop for part in joined)
        blocks.append(_Block(start, stop, order, joined))
    return blocks


class _LowRankLinears(torch.autograd.Function):
    """`reference` with a hand-written backward.

    It keeps x once for all layers that read it, the small products x Aᵀ and nothing else; the
    gradient of a frozen weight is never formed, and updates are added in place to the base's
    output.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bases: Sequence[nn.Module], parts: Sequence[Part], merge: bool,
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        flat = x.reshape(-1, x.shape[-1])
        outs = [product(base, flat) for base in bases]
        blocks = _blocks(
            parts, [A.shape[0] for A in factors[::2]], merge=merge and launches_cost(x)
        )
        lows = []
        for block in blocks:
            rows = _dropped(flat[block.start : block.stop], block.parts[0])
            low = block.scaled(linear(rows, block.inner(factors, x)), factors)
            for layer, columns, B in block.outer(factors, x):
                outs[layer][block.start : block.stop].addmm_(low[:, columns], B.T)
            lows.append(low)
        ctx.bases, ctx.blocks = bases, blocks
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *factors, *lows)
        return tuple(shaped(out, x) for out in outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        blocks: list[_Block] = ctx.blocks
        x, *saved = ctx.saved_tensors
        factors, lows = saved[: len(saved) - len(blocks)], saved[len(saved) - len(blocks) :]
        flat = x.reshape(-1, x.shape[-1])
        gradients_out = {
            layer: grad.reshape(-1, grad.shape[-1])
            for layer, grad in enumerate(grads)
            if grad is not None
        }
        grad_x: Tensor | None = None
        if ctx.needs_input_grad[0]:
            for layer, grad in gradients_out.items():
                weight = weight_of(ctx.bases[layer])
                grad_x = add_linear(grad_x, grad, weight.T)
        factor_gradients: list[Tensor | None] = [None] * len(factors)
        for block, low in zip(blocks, lows, strict=True):
            span = slice(block.start, block.stop)
            gradients = torch.zeros_like(low)  # of x Aᵀ, [n, R]
            grads_B: dict[int, Tensor] = {}
            for layer, columns, B in block.outer(factors, x):
                if layer in gradients_out:
                    linear_into(gradients[:, columns], gradients_out[layer][span], B.T)
                    # [own, O]: reading the gradient row by row is twice as fast as its transpose.
                    grads_B[layer] = linear(low[:, columns].T, gradients_out[layer][span].T)
            gradients = block.scaled(gradients, factors)
            A = block.inner(factors, x)
            drop = block.parts[0].dropout
            grad_A = linear(gradients.T, _dropped(flat[span], block.parts[0]).T)
            _hand_out(block, grad_A, grads_B, factors, factor_gradients)
            if grad_x is None:
                continue
            if drop is None:
                grad_x[span].addmm_(gradients, A)
            else:
                drop.add_to_(grad_x[span], gradients @ A)
        grad_x = None if grad_x is None else grad_x.view(x.shape)
        return (grad_x, None, None, None, *factor_gradients)


# From `addmm_` a compiler makes `addmm`, which copies what is added to: two of three times as much
# memory as the product itself moves. So it is not shown what happens in place.
_LIBRARY = torch.library.Library("lighten", "FRAGMENT")
_LIBRARY.define(
    "linear_plus(Tensor x, Tensor weight, Tensor? bias, Tensor low, Tensor B) -> Tensor"
)
_LIBRARY.define("sum_of_products(Tensor[] left, Tensor[] right) -> Tensor")


@torch.library.impl(_LIBRARY, "linear_plus", "CompositeExplicitAutograd")
def _linear_plus(x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, B: Tensor) -> Tensor:
    return linear(x, weight, bias).addmm_(low, B.T)


@torch.library.register_fake("lighten::linear_plus")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, B: Tensor) -> Tensor:
    del bias, low, B
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.impl(_LIBRARY, "sum_of_products", "CompositeExplicitAutograd")
def _sum_of_products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    total: Tensor | None = None
    for left_factor, right_factor in zip(left, right, strict=True):
        total = add_linear(total, left_factor, right_factor.T)
    assert total is not None
    return total


@torch.library.register_fake("lighten::sum_of_products")
def _(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return left[0].new_empty(left[0].shape[0], right[0].shape[1])


class _LoneLinears(torch.autograd.Function):
    """`_LowRankLinears` for one adapter on every row, in operations that a compiler can follow.

    It gets the weights as they are, dense, in place of the modules.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, count: int, scales: tuple[float, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        weights, biases, As, Bs = (tensors[i * count : (i + 1) * count] for i in range(4))
        A = torch.cat(As).to(x.dtype)
        low = opaque(x, A)
        outs = []
        column = 0
        for weight, bias, B, scale in zip(weights, biases, Bs, scales, strict=True):
            low_products = low[:, column : column + B.shape[1]]
            column += B.shape[1]
            outs.append(
                torch.ops.lighten.linear_plus(x, weight, bias, low_products * scale, B.to(x.dtype))
            )
        ctx.save_for_backward(x, low, A, *weights, *Bs)
        ctx.scales = scales
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, low, A, *tensors = ctx.saved_tensors
        count = len(ctx.scales)
        weights, Bs = tensors[:count], tensors[count:]
        gradients, grads_B = [], []
        column = 0
        for grad, B, scale in zip(grads, Bs, ctx.scales, strict=True):
            low_products = low[:, column : column + B.shape[1]]
            column += B.shape[1]
            gradients.append(opaque(grad, B.to(x.dtype).T) * scale)
            grads_B.append((opaque(low_products.T, grad.T) * scale).T.to(B.dtype))
        gradient = torch.cat(gradients, 1)
        grad_A = opaque(gradient.T, x.T).to(Bs[0].dtype).split([B.shape[1] for B in Bs])
        grad_x = torch.ops.lighten.sum_of_products([*grads, gradient], [*weights, A])
        return (grad_x, None, None, *[None] * (2 * count), *grad_A, *grads_B)


def lone_linears(
    x: Tensor,
    bases: Sequence[nn.Module],
    scales: Sequence[float],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Dense frozen layers plus one adapter on every row: `low_rank_linears` under a compiler."""
    flat = x.reshape(-1, x.shape[-1])
    weights = [weight_of(base) for base in bases]
    biases = [base.bias for base in bases]
    outs = _LoneLinears.apply(flat, len(bases), tuple(scales), *weights, *biases, *As, *Bs)
    return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in outs)


def _hand_out(
    block: _Block,
    grad_A: Tensor,
    grads_B: dict[int, Tensor],
    factors: Sequence[Tensor],
    factor_gradients: list[Tensor | None],
) -> None:
    """Cut the block's gradients, [R, I] and [own, O] by layer, into those of its parts."""
    column, last, within = 0, None, 0
    for i, part in zip(block.order, block.parts, strict=True):
        rank = factors[2 * i].shape[0]
        within = 0 if part.layer != last else within
        last = part.layer
        if part.layer in grads_B:
            factor_gradients[2 * i] = grad_A[column : column + rank].to(factors[2 * i].dtype)
            rows = grads_B[part.layer][within : within + rank]
            factor_gradients[2 * i + 1] = rows.T.to(factors[2 * i + 1].dtype)
        column += rank
        within += rank


def _dropped(rows: Tensor, part: Part) -> Tensor:
    if part.dropout is None:
        return rows
    return part.dropout.of(rows)


def low_rank_linears(
    x: Tensor, bases: Sequence[nn.Module], parts: Sequence[Part], factors: Sequence[Tensor],
    *, merge: bool = True,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Frozen layers that read the same x, plus the low-rank updates of the adapters, fused.

    Args, shapes and values are those of `reference`.

    Args:
        x: [..., I].
        bases: The frozen layers that read x.
        parts: What the adapters add.
        factors: A and B of each part, in turn.
        merge: Let adapters share products where launches cost; False: what is not finite in one
            of them stays its own.
    """
    if not parts:
        return tuple(base(x) for base in bases)
    out: tuple[Tensor, ...] = _LowRankLinears.apply(x, bases, parts, merge, *factors)
    return out
