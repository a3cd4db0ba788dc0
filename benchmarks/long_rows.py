"""Attention of long rows on a processor, forward and backward: ours against PyTorch's.

    python benchmarks/long_rows.py       # the last line is JSON

Each cell is one layer's attention of one row, in turns with `scaled_dot_product_attention`: plainly
causal, or within a window, which PyTorch is told by a mask. Ratios are times, ours over PyTorch's
faster way with grouped or repeated keys, each the least of its repeats. `threads` is one thread's
time over that of all. `ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2` shows a laptop's.

Dimensions: H query heads, K key-value heads, T tokens, D features.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import machine

# Heads, key-value heads and features of SmolLM2-135M and of Gemma 3 1B, and the latter's window.
SHAPES = {"smollm2-135m": (9, 3, 64, 0), "gemma-3-1b": (4, 1, 256, 0),
          "gemma-3-1b, window": (4, 1, 256, 512)}  # fmt: skip
DTYPES = ("float32", "bfloat16")


def ways(window: int, tokens: int) -> dict[str, Callable[..., Tensor]]:
    """Ours and PyTorch's, of q [1, H, T, D], k and v [1, K, T, D]."""
    from lighten.models.attention import block_attention

    def theirs(repeat: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if repeat:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        mask = None
        if 0 < window < tokens:
            mask = torch.ones(tokens, tokens, dtype=torch.bool).tril_().triu_(1 - window)
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, enable_gqa=not repeat
        )

    return {
        "ours": lambda q, k, v: block_attention(q, k, v, q.shape[-1] ** -0.5, None, window),
        "grouped": lambda q, k, v: theirs(False, q, k, v),
        "repeated": lambda q, k, v: theirs(True, q, k, v),
    }


def cell(shape: str, dtype: str, tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds of each way with all threads, and of ours with one."""
    heads, key_heads, features, window = SHAPES[shape]
    torch.manual_seed(0)
    inputs = [
        torch.randn(1, count, tokens, features, dtype=getattr(torch, dtype), requires_grad=True)
        for count in (heads, key_heads, key_heads)
    ]
    upstream = torch.randn_like(inputs[0])
    seconds: dict[str, float] = {}

    def run(name: str, attend: Callable[..., Tensor]) -> None:
        began = time.perf_counter()
        torch.autograd.grad(attend(*inputs), inputs, upstream)
        spent = time.perf_counter() - began
        seconds[name] = min(spent, seconds.get(name, spent))

    attends, threads = ways(window, tokens), torch.get_num_threads()
    for _ in range(repeats + 1):  # the first one warms up
        for name, attend in attends.items():
            run(name, attend)
        torch.set_num_threads(1)
        run("one thread", attends["ours"])
        torch.set_num_threads(threads)
    theirs = min(seconds["grouped"], seconds["repeated"])
    return {
        "shape": shape, "dtype": dtype, "tokens": tokens, "seconds": seconds,
        "ratio": seconds["ours"] / theirs, "threads": seconds["one thread"] / seconds["ours"],
    }  # fmt: skip


def main(words: Sequence[str] | None = None) -> None:
    """Parse, measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="512,2048,8192")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args(words)
    before, cells = machine.before_start(), []
    for dtype in arguments.dtypes.split(","):
        for shape in SHAPES:
            for tokens in map(int, arguments.lengths.split(",")):
                cells.append(cell(shape, dtype, tokens, arguments.repeats))
                last = cells[-1]
                milliseconds = 1000 * last["seconds"]["ours"]
                print(f"{dtype}, {shape}, {tokens} tokens: {milliseconds:.1f} ms, "
                      f"{last['ratio']:.2f} of PyTorch's; {last['threads']:.2f} times one thread",
                      flush=True)  # fmt: skip
    result = {"cells": cells, "threads": torch.get_num_threads()}
    machine.store("long_rows", result, before, {"too few repeats": arguments.repeats < 3})
    print(json.dumps({f"{c['dtype']}, {c['shape']}, {c['tokens']}": round(c["ratio"], 3)
                      for c in cells}))  # fmt: skip


if __name__ == "__main__":
    main()
