"""Attention alone, of one layer of the model's shape, over lengths: time, memory and their growth.

Dimensions: H query heads, K key-value heads, T tokens, D features. One row.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

KINDS = ("eager", "sdpa", "flex", "flash_attention_2", "flash_attention_3", "lighten")
WARM = 128  # tokens of a first call
_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def run(
    *, kind: str, heads: int, key_heads: int, features: int, lengths: Sequence[int], device: str,
    dtype: str, training: bool, budget_s: float,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Records of one implementation, one for each length, shortest first.

    Args:
        kind: One of `KINDS`.
        heads: H.
        key_heads: K.
        features: D.
        lengths: T.
        device: Where.
        dtype: Of queries, keys and values.
        training: The backward pass too.
        budget_s: Seconds for the repeats of each record.
    """
    import torch

    from lighten.cpu import allocator
    from lighten.engine.memory_errors import ran_out
    from lighten.machine.hardware import take
    from lighten.machine.timing import measure_step

    take(device)
    if obstacle(kind, device, training) is None:
        # What libraries take once, at their first call, is no length's.
        with contextlib.suppress(RuntimeError, ValueError, ImportError, NotImplementedError):
            first = [
                torch.ones(1, count, WARM, features, dtype=getattr(torch, dtype), device=device)
                .requires_grad_(training)
                for count in (heads, key_heads, key_heads)
            ]  # fmt: skip
            _step(functools.partial(implementation(kind, WARM, device), *first), first, training)
    for tokens in sorted(lengths):
        cell = {"kind": kind, "tokens": tokens, "training": training, "dtype": dtype}
        if (why := obstacle(kind, device, training)) is not None:
            yield {**cell, "why": why}
            continue
        memory = allocator.measure_peak(device)
        generator = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(1, count, tokens, features, generator=generator)
            .to(device, getattr(torch, dtype)).requires_grad_(training)
            for count in (heads, key_heads, key_heads)
        )  # fmt: skip
        try:
            attend = functools.partial(implementation(kind, tokens, device), q, k, v)
            step = functools.partial(_step, attend, (q, k, v), training)
            timing = measure_step(step, device=device, least=3, budget_s=budget_s)
        except (RuntimeError, ValueError, ImportError, NotImplementedError) as error:
            lines = str(error).strip().splitlines()
            yield {**cell, "why": lines[0] if lines else type(error).__name__,
                   "out_of_memory": ran_out(error)}  # fmt: skip
            continue
        peak = memory.read()
        yield {**cell, "seconds": timing.to_dict(), "peak_bytes": peak["peak_bytes"],
               "memory_by": peak["method"],
               "reserved_bytes": peak.get("reserved_bytes")}  # fmt: skip


def obstacle(kind: str, device: str, training: bool) -> str | None:
    """Why an implementation cannot be measured here; None: nothing is known against it."""
    if kind in _PACKAGES:
        if not device.startswith("cuda"):
            return "its kernels are for CUDA devices alone"
        if importlib.util.find_spec(_PACKAGES[kind]) is None:
            return f"{_PACKAGES[kind]} is not installed"
    if kind == "flex" and device == "cpu" and training:
        return "FlexAttention on a processor refuses inputs that want a gradient"
    return None


def implementation(kind: str, tokens: int, device: str) -> Callable[..., Any]:
    """Causal attention of queries [1, H, T, D], keys and values [1, K, T, D]."""
    import torch
    from torch.nn import functional

    if kind == "eager":
        return _eager
    if kind == "sdpa":
        return functools.partial(
            functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True
        )
    if kind == "flex":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def causal(_row: Any, _head: Any, query: Any, key: Any) -> Any:
            return query >= key

        mask = create_block_mask(causal, None, None, tokens, tokens, device)
        compiled = torch.compile(flex_attention, dynamic=False)
        return functools.partial(compiled, block_mask=mask, enable_gqa=True)
    if kind == "lighten":
        if not device.startswith("cpu"):  # on a GPU the product chooses PyTorch's kernels
            return _repeated
        from lighten.models.attention import block_attention

        return lambda q, k, v: block_attention(q, k, v, q.shape[-1] ** -0.5)
    return functools.partial(_flash, kind)


def _eager(q: Any, k: Any, v: Any) -> Any:
    """As transformers has it: all scores, softmax in float32."""
    import torch

    groups, tokens = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    mask = torch.full((tokens, tokens), float("-inf"), dtype=q.dtype, device=q.device).triu_(1)
    weights = torch.softmax(scores + mask, -1, dtype=torch.float32).to(q.dtype)
    return weights @ v


def _repeated(q: Any, k: Any, v: Any) -> Any:
    """PyTorch's kernels with keys repeated where none reads grouped ones."""
    from torch.nn import functional

    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def _flash(kind: str, q: Any, k: Any, v: Any) -> Any:
    module = importlib.import_module(_PACKAGES[kind])
    out = module.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _step(attend: Callable[[], Any], inputs: Sequence[Any], training: bool) -> None:
    import torch

    if not training:
        with torch.no_grad():
            attend()
        return
    for x in inputs:
        x.grad = None
    attend().sum().backward()


def growth(lengths: Sequence[int], values: Sequence[float]) -> float | None:
    """The exponent p of values ≈ c · lengthᵖ, fitted by least squares in logarithms.

    Args:
        lengths: In tokens.
        values: Above 0.

    Returns:
        p; None of fewer than three lengths.
    """
    points = [(math.log(n), math.log(x)) for n, x in zip(lengths, values, strict=True) if x > 0]
    if len(points) < 3:
        return None
    mean_x = math.fsum(x for x, _ in points) / len(points)
    mean_y = math.fsum(y for _, y in points) / len(points)
    top = math.fsum((x - mean_x) * (y - mean_y) for x, y in points)
    return top / math.fsum((x - mean_x) ** 2 for x, _ in points)
