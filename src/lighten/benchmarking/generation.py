"""Answers: prefill, decode, time to the first token and between tokens, memory.

Dimensions: B prompts side by side, T tokens of each, N tokens answered.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any


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
    engine: str = "transformers",
) -> Iterator[dict[str, Any]]:
    """Records of one variant in one engine, one for each prompt length and batch size.

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
        engine: `transformers`, or `lighten` for `lighten.generation`, whose one record says why
            where it does not take the model or the adapter.
    """
    import torch

    from lighten import adapters, models
    from lighten.artifacts.source import copy_companions, open_source
    from lighten.benchmarking.engine import answer_together
    from lighten.cpu import allocator
    from lighten.errors import UserError
    from lighten.evaluation.engine import open_engine
    from lighten.evaluation.generate import head_reads_whole_rows
    from lighten.machine.hardware import PeakMemory, take
    from lighten.quantization.merge import merge

    take(device)
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
        folders = {"adapter": Path(adapter)} if variant == "adapter" and adapter else {}
        answers: Callable[..., dict[str, Any]] = answer
        if engine == "lighten":
            try:
                opened = open_engine(base, folders, slots=max(batch_sizes))
            except UserError as error:
                yield {"variant": variant, "engine": engine, "why": str(error)}
                return
            answers = partial(answer_together, opened, next(iter(folders), None))
        elif folders:
            context = adapters.load(base.model, folders).using("adapter")
        limits = models.limits_of(base.model)
        shapes = [
            (rows, tokens) for tokens in sorted(prompt_tokens) for rows in sorted(batch_sizes)
        ]
        with context, head_reads_whole_rows(base.model), torch.inference_mode():
            for rows, tokens in shapes:
                cell = {"variant": variant, "engine": engine, "prompt_tokens": tokens,
                        "batch_size": rows, "new_tokens": new_tokens}  # fmt: skip
                if limits.room(tokens, new_tokens) < new_tokens:
                    yield {**cell, "why": f"the model has no {tokens + new_tokens} positions"}
                    continue
                allocator.trim()
                memory.restart()
                timings = answers(base.model, rows, tokens, new_tokens, device, budget_s)
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
    from transformers import DynamicCache

    from lighten import models
    from lighten.benchmarking.rates import figures, random_prompts
    from lighten.machine.timing import measure_step, synchronize

    cache_argument = models.cache_argument(model)
    prompt = random_prompts(model, rows, tokens).to(model.device)
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
    return figures(timing, firsts, laps, rows, tokens)
