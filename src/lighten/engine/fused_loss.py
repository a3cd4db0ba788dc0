"""Cross-entropy in one kernel: losses and their gradients, in the logits' own memory.

In operations of PyTorch's own, softmax, normaliser and gradient read and write float32 logits some
eight times, which on a GPU takes longer than the head's products. Here each logit is read twice
and written once, in its own format; sums are float32. A GPU has a kernel in Triton, a processor
with bfloat16 one in C++ (`cpu/kernels`).

Dimensions: S positions, V vocabulary. Sources: the online normaliser, arXiv 1805.02867; computing
in place is the idea of Liger's kernel (arXiv 2410.10989).
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from lighten.cpu import kernels
from lighten.cpu.kernels import pointwise


def available(device: str, dtype: torch.dtype) -> bool:
    """Whether there is a kernel; of a GPU that is only planned for, what one would say.

    Args:
        device: `cpu` or `cuda`.
        dtype: Of the logits.
    """
    if device == "cpu":
        return dtype == torch.bfloat16 and kernels.available()
    return not torch.cuda.is_available() or importlib.util.find_spec("triton") is not None


@torch.library.custom_op("lighten::cross_entropy_", mutates_args={"logits"})
def cross_entropy_(logits: Tensor, labels: Tensor, scale: float, softcap: float) -> Tensor:
    """Turn raw logits into the gradients of each position's loss by them, and return the losses.

    Args:
        logits: [S, V], contiguous, overwritten.
        labels: [S].
        scale: Factor on the logits.
        softcap: c in c · tanh(logits / c); 0: none.

    Returns:
        [S] negative log-likelihoods, float32.
    """
    if pointwise.takes(logits):
        return pointwise.cross_entropy_(logits, labels, scale, softcap)
    if not logits.is_cuda:
        return plain(logits, labels, scale, softcap)
    from lighten.cpu import cross_entropy_kernel

    return cross_entropy_kernel.run(logits, labels, scale, softcap)


@cross_entropy_.register_fake
def _(logits: Tensor, labels: Tensor, scale: float, softcap: float) -> Tensor:
    del labels, scale, softcap
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def plain(logits: Tensor, labels: Tensor, scale: float, softcap: float) -> Tensor:
    """What the kernel computes, in operations of PyTorch's own."""
    final = logits.float() * scale
    if softcap:
        final = torch.tanh(final / softcap) * softcap
    nll = torch.nn.functional.cross_entropy(final, labels, reduction="none")
    gradient = final.softmax(-1)
    gradient[torch.arange(len(labels), device=labels.device), labels] -= 1.0
    if softcap:
        gradient *= 1.0 - (final / softcap).square()
    logits.copy_(gradient * scale)
    return nll
