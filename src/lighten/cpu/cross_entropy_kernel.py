"""The kernel of `fused_loss`, in Triton: import it only where there is a CUDA device."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits that a program holds at a time
WARPS = 16


def run(logits: Tensor, labels: Tensor, scale: float, softcap: float) -> Tensor:
    """As `fused_loss.cross_entropy_`."""
    losses = torch.empty(len(labels), dtype=torch.float32, device=logits.device)
    _gradients[(len(labels),)](
        logits, labels, losses, logits.stride(0), logits.shape[1], scale, softcap or 1.0,
        HAS_CAP=softcap != 0.0, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return losses


@triton.jit
def _final(logits, at, columns, scale, softcap, HAS_CAP: tl.constexpr):
    x = tl.load(logits + at, mask=at < columns, other=0.0).to(tl.float32) * scale
    if HAS_CAP:
        x = softcap * (2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0)  # tanh
    return x


@triton.jit
def _gradients(
    logits, labels, losses, stride, columns, scale, softcap,
    HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    label_logit = _final(logits, label, columns, scale, softcap, HAS_CAP)
    largest = -float("inf")
    total = 0.0
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = _final(logits, at, columns, scale, softcap, HAS_CAP)
        x = tl.where(at < columns, x, -float("inf"))
        now = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - now) + tl.sum(tl.exp(x - now), 0)
        largest = now
    normaliser = largest + tl.log(total)
    tl.store(losses + row, normaliser - label_logit)
    tl.debug_barrier()  # every thread has read the label's logit before one overwrites it
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = _final(logits, at, columns, scale, softcap, HAS_CAP)
        gradient = tl.exp(x - normaliser) - tl.where(at == label, 1.0, 0.0)
        if HAS_CAP:
            gradient = gradient * (1.0 - (x / softcap) * (x / softcap))
        tl.store(logits + at, (gradient * scale).to(logits.dtype.element_ty), mask=at < columns)
