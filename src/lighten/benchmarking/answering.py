"""Answers of a model in this process, and its held-out loss: a job of `lighten.jobs`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def run(
    recipe: Mapping[str, Any],
    *,
    device: str,
    dtype: str,
    attention: str,
    prompt_tokens: int,
    new_tokens: int,
    budget_s: float,
    adapter: str | None = None,
    merged: bool = False,
    measures_loss: bool = True,
) -> Iterator[dict[str, Any]]:
    """Time one answer at a time, then measure the held-out loss.

    Args:
        recipe: Completed: its base and its data.
        device: Where the model goes.
        dtype: Of the base.
        attention: transformers' name of the kernel.
        prompt_tokens: Of the prompt.
        new_tokens: Of the answer.
        budget_s: Seconds for the repeats.
        adapter: Folder in PEFT's format; None: the base alone.
        merged: The adapter is added into the weights.
        measures_loss: Measure the held-out loss.

    Yields:
        `decode_samples` (seconds per written token), rates and memory; then `losses` as in
        `lighten.benchmarking.learning`.

    Raises:
        UserError: Something the user can mend.
    """
    import torch

    from lighten import adapters, models
    from lighten.benchmarking import generation
    from lighten.benchmarking.size import file_bytes
    from lighten.cpu import allocator
    from lighten.evaluation.generate import head_reads_whole_rows
    from lighten.machine.hardware import PeakMemory, take
    from lighten.recipe import Recipe

    settings = Recipe.model_validate(recipe)
    take(device)
    allocator.keep_pages(device)
    memory = PeakMemory(device)
    with tempfile.TemporaryDirectory(prefix="lighten-audit-") as scratch:
        name, revision = settings.model_name_or_path, settings.revision
        if merged and adapter is not None:
            folder = Path(scratch) / "merged"
            merge_into(adapter, folder, dtype)
            name, revision = str(folder), None
        base = models.load(
            name, revision=revision, dtype=dtype, attn_implementation=attention, device=device,
            trust_remote_code=settings.trust_remote_code,
        )  # fmt: skip
        adapter_paths = {"adapter": Path(adapter)} if adapter is not None and not merged else {}
        trained = adapters.load(base.model, adapter_paths)
        adapter_name = next(iter(adapter_paths), None)
        allocator.trim()
        memory.restart()
        with trained.using(adapter_name), head_reads_whole_rows(base.model), torch.inference_mode():
            timings = generation.answer(base.model, 1, prompt_tokens, new_tokens, device, budget_s)
        peak = memory.read()
        shipped_bytes = (
            base.file_bytes if not adapter_paths else file_bytes(adapter_paths["adapter"])
        )
        yield {
            "decode_samples": [lap / (new_tokens - 1) for lap in timings["decode_s"]["samples"]],
            "prefill_tokens_per_s": timings["prefill_tokens_per_s"],
            "decode_tokens_per_s": timings["decode_tokens_per_s"],
            "peak_bytes": peak["peak_bytes"], "memory_by": peak["method"],
            "reserved_bytes": peak.get("reserved_bytes"), "shipped_bytes": shipped_bytes,
            "dtype": base.dtype.value, "attention": base.attention.value,
        }  # fmt: skip
        if measures_loss:
            yield from _losses(settings, base, trained, adapter_name)


def _losses(recipe: Any, base: Any, trained: Any, adapter: str | None) -> Iterator[dict[str, Any]]:
    from lighten.evaluation.likelihood import measure_loss
    from lighten.training.base import tokenizer_of
    from lighten.training.rows import load_rows

    rows = load_rows(recipe, tokenizer_of(recipe)).held_out
    if rows is None or not len(rows.rows):
        return
    losses = measure_loss(base, trained, rows.rows, adapter, recipe)
    yield {"losses": [list(pair) for pair in zip(losses.nll, losses.tokens, strict=True)]}


def merge_into(adapter: str, folder: Path, dtype: str) -> None:
    """Write a base with an adapter merged into it.

    Raises:
        UserError: The adapter cannot be merged without its own code.
    """
    from lighten.artifacts.source import copy_companions, open_source
    from lighten.errors import UserError
    from lighten.quantization.merge import Unmergeable, merge

    source = open_source(adapter)
    try:
        merge(source.base_folder, Path(adapter), folder, dtype=dtype,
              beside=lambda target: copy_companions(source, target))  # fmt: skip
    except Unmergeable as error:
        raise UserError(f"{adapter} cannot be merged: {error}") from error
