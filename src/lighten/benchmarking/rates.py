"""Prompts of a timed answer, and the rates of its tokens.

Dimensions: B prompts side by side, T tokens of each.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from lighten.machine.timing import Timing

PERCENTILES = (50, 90, 99)


def random_prompts(model: Any, rows: int, tokens: int) -> Any:
    """Token ids [B, T], the same ones each time."""
    import torch

    vocab_size = int(model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (rows, tokens), generator=generator)


def figures(
    timing: Timing, firsts: Sequence[float], laps: Sequence[Sequence[float]], rows: int, tokens: int
) -> dict[str, Any]:
    """Rates and percentiles of a record.

    Args:
        timing: Of whole answers.
        firsts: Seconds to the first token of each repeat, those that warmed up first.
        laps: Seconds of each further token, by repeat.
        rows: B.
        tokens: T.
    """
    repeats = len(timing.samples)  # those that warmed up came first
    first = Timing(tuple(firsts[-repeats:]), timing.warmup, timing.bound)
    decode = Timing(tuple(sum(times) for times in laps[-repeats:]), timing.warmup, timing.bound)
    between = [lap for times in laps[-repeats:] for lap in times]
    return {
        "seconds": timing.to_dict(), "first_token_s": first.to_dict(),
        "decode_s": decode.to_dict(),
        "prefill_tokens_per_s": rows * tokens / first.median,
        "decode_tokens_per_s": rows * len(laps[-1]) / decode.median,
        "between_tokens_s": {f"p{p}": percentile(between, p) for p in PERCENTILES},
    }  # fmt: skip


def percentile(values: Sequence[float], percent: int) -> float:
    """A percentile of values, interpolated between neighbours."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
