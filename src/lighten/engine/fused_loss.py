"""Cross-entropy in one kernel: losses and their gradients, in the logits' own memory.

In operations of PyTorch's own, softmax, normaliser and gradient read and write float32 logits some
eight times, which on a GPU takes longer than the head's products. Here each logit is read and
written once or twice, in its own format; sums are float32. A GPU has a kernel in Triton, a
processor one in C++ (`cpu/kernels`).

Dimensions: S positions, V vocabulary. Sources: the online normaliser, arXiv 1805.02867; computing
in place is the idea of Liger's kernel (arXiv 2410.10989).
"""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch
from torch import Tensor

from lighten.cpu.kernels import formats, pointwise
from lighten.wording import first_line

log = logging.getLogger(__name__)
BFLOAT16_SINCE = (8, 0)  # compute capability from which Triton converts numbers to bfloat16


def available(device: str, hidden: Tensor) -> bool:
    """Whether there is a kernel; of a GPU that is only planned for, what one would say.

    Args:
        device: `cpu` or `cuda`.
        hidden: What the logits are made of, and in whose format; a plan's is on the processor.
    """
    if device == "cpu":
        return formats.available(hidden.dtype)
    if not hidden.is_cuda:
        return not torch.cuda.is_available() or importlib.util.find_spec("triton") is not None
    return obstacle(hidden.dtype, hidden.device) is None


@functools.cache
def obstacle(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why Triton makes no kernel here, told once; None: it does.

    It has to compile one to know: that wants a C compiler and Python's headers, which images made
    for running alone leave out, and a GPU that Triton still knows.

    Args:
        dtype: Of the logits.
        device: The GPU.
    """
    why = _obstacle(dtype, device)
    if why is not None:
        log.warning("losses are formed by PyTorch's operations, without a kernel: %s", why)
    return why


def _obstacle(dtype: torch.dtype, device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "there is no Triton, which writes a GPU's code"
    capability = torch.cuda.get_device_capability(device)
    if dtype == torch.bfloat16 and capability < BFLOAT16_SINCE:
        return f"compute capability {capability[0]}.{capability[1]} has no bfloat16"
    try:
        from lighten.cpu import cross_entropy_kernel

        logits = torch.zeros(1, 16, dtype=dtype, device=device)
        cross_entropy_kernel.run(logits, logits.new_zeros(1, dtype=torch.int64), 1.0, 0.0)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a compiler, a linker or a driver: each has its own kind
        return first_line(error)
    return None


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
