"""Answers: prefill, decode, time to the first token and between tokens, memory.

Dimensions: B prompts side by side, T tokens of each, N tokens answered.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

PERCENTILES = (50, 90, 99)


def run(
    model: str,
    *,
    variant: str,
    adapter: str | None,
    revision: str | None,
    device: str,
    dtype: str,
    prompt_tokens: Sequence[int],
    batch_sizes: Sequence[int],
    new_tokens: int,
    budget_s: float,
) -> Iterator[dict[str, Any]]:
    """Records of one variant, one for each prompt length and batch size.

    Args:
        model: As `lighten.models.load` takes it.
        variant: `base`, `adapter` (beside the base's weights) or `merged` (into them).
        adapter: Folder in PEFT's format; for `adapter` and `merged`.
        revision: Of the base on the hub.
        device: Where it goes.
        dtype: Of the base.
        prompt_tokens: T.
        batch_sizes: B.
        new_tokens: N, at least 2.
        budget_s: Seconds for the repeats of each record.
    """
    import torch

    from lighten import adapters, models
    from lighten.artifacts.source import copy_companions, open_source
    from lighten.cpu import allocator
    from lighten.evaluation.generate import head_reads_whole_rows
    from lighten.machine.hardware import PeakMemory
    from lighten.quantization.merge import merge

    allocator.keep_pages(device)
    memory = PeakMemory(device)
    with tempfile.TemporaryDirectory(prefix="lighten-bench-") as scratch:
        if variant == "merged":
            assert adapter is not None
            source, merged = open_source(adapter), Path(scratch) / "merged"
            merge(source.base_folder, Path(adapter), merged, dtype=_storage_dtype(dtype, device),
                  beside=lambda folder: copy_companions(source, folder))  # fmt: skip
            model, revision = str(merged), None
        base = models.load(model, revision=revision, dtype=dtype, device=device)
        context: Any = nullcontext()
        if variant == "adapter":
            assert adapter is not None
            context = adapters.load(base.model, {"adapter": Path(adapter)}).using("adapter")
        limits = models.limits_of(base.model)
        shapes = [
            (rows, tokens) for tokens in sorted(prompt_tokens) for rows in sorted(batch_sizes)
        ]
        with context, head_reads_whole_rows(base.model), torch.inference_mode():
            for rows, tokens in shapes:
                cell = {"variant": variant, "prompt_tokens": tokens, "batch_size": rows,
                        "new_tokens": new_tokens}  # fmt: skip
                if limits.room(tokens, new_tokens) < new_tokens:
                    yield {**cell, "why": f"the model has no {tokens + new_tokens} positions"}
                    continue
                memory.restart()
                timings = answer(base.model, rows, tokens, new_tokens, device, budget_s)
                peak = memory.read()
                yield {**cell, **timings, "dtype": base.dtype.value,
                       "peak_bytes": peak["peak_bytes"], "memory_by": peak["method"],
                       "reserved_bytes": peak.get("reserved_bytes")}  # fmt: skip


def _storage_dtype(dtype: str, device: str) -> str:
    from lighten.machine.hardware import choose_dtype

    return choose_dtype(dtype, device).value


def answer(
    model: Any, rows: int, tokens: int, new_tokens: int, device: str, budget_s: float
) -> dict[str, Any]:
    """Greedy answers to random prompts, timed token by token.

    Args:
        model: In eval mode.
        rows: B.
        tokens: T.
        new_tokens: N; each answer has exactly so many.
        device: Where it is.
        budget_s: Seconds for the repeats.
    """
    import inspect

    import torch
    from transformers import DynamicCache

    from lighten.machine.timing import Timing, measure_step, synchronize

    # transformers 5.24 calls it `cache`, and warns of the older name.
    parameters = inspect.signature(model.forward).parameters
    cache_argument = "cache" if "cache" in parameters else "past_key_values"

    generator = torch.Generator().manual_seed(0)
    vocab_size = int(model.get_input_embeddings().weight.shape[0])
    prompt = torch.randint(0, vocab_size, (rows, tokens), generator=generator).to(model.device)
    firsts: list[float] = []
    laps: list[list[float]] = []

    def generate() -> None:
        synchronize(device)
        began = time.perf_counter()
        options = {
            cache_argument: DynamicCache(config=model.config),
            "use_cache": True,
            "logits_to_keep": 1,
        }
        out = model(input_ids=prompt, **options)
        ids = out.logits[:, -1:].argmax(-1)
        synchronize(device)
        last = time.perf_counter()
        firsts.append(last - began)
        times: list[float] = []
        for _ in range(new_tokens - 1):
            out = model(input_ids=ids, **options)
            ids = out.logits[:, -1:].argmax(-1)
            synchronize(device)
            now = time.perf_counter()
            times.append(now - last)
            last = now
        laps.append(times)

    timing = measure_step(generate, device=device, budget_s=budget_s, least=3)
    repeats = len(timing.samples)  # those that warmed up came first
    first = Timing(tuple(firsts[-repeats:]), timing.warmup, timing.bound)
    decode = Timing(tuple(sum(times) for times in laps[-repeats:]), timing.warmup, timing.bound)
    between = [lap for times in laps[-repeats:] for lap in times]
    return {
        "seconds": timing.to_dict(), "first_token_s": first.to_dict(),
        "decode_s": decode.to_dict(),
        "prefill_tokens_per_s": rows * tokens / first.median,
        "decode_tokens_per_s": rows * (new_tokens - 1) / decode.median,
        "between_tokens_s": {f"p{p}": percentile(between, p) for p in PERCENTILES},
    }  # fmt: skip


def percentile(values: Sequence[float], percent: int) -> float:
    """A percentile of values, interpolated between neighbours."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
