"""The verb `bench`, as a Python function with the command line's names and meaning."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten import looked

if TYPE_CHECKING:
    from lighten.recipe import Recipe


def bench(
    target: str,
    parts: Sequence[str] = (),
    *,
    adapter: str | None = None,
    memory: str | int | None = None,
    output: str | os.PathLike[str] | None = None,
    prompt_tokens: Sequence[int] | None = None,
    batch_sizes: Sequence[int] | None = None,
    new_tokens: int | None = None,
    lengths: Sequence[int] | None = None,
    seconds: float | None = None,
    told: Callable[[str], None] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Measure a model or a run on this machine: `bench("smollm2-135m", ["size", "train"])`.

    Args:
        target: A model; or a run, of which the adapter and the merged model are measured too.
        parts: `size`, `generate`, `attention`, `train`, `max-batch`; none: all.
        adapter: Of a run with several, which.
        memory: What a process may hold, such as `8GiB`; None: nine tenths of what is free.
        output: Where the file goes; None: `bench.json` in a run's folder, and none for a model.
        prompt_tokens: Prompt lengths of `generate`.
        batch_sizes: Prompts answered together in `generate`.
        new_tokens: Tokens of an answer.
        lengths: Row lengths of `attention`.
        seconds: For the repeats of each figure.
        told: Hears what is being done.
        overrides: Settings of the recipe for `train` and `max-batch`.

    Returns:
        What the file holds: machine, versions, settings and `records`.

    Raises:
        UserError: Something the user can mend.
    """
    from lighten.api import plannable
    from lighten.bench import running

    given: dict[str, Any] = {
        "prompt_tokens": None if prompt_tokens is None else tuple(prompt_tokens),
        "batch_sizes": None if batch_sizes is None else tuple(batch_sizes),
        "new_tokens": new_tokens,
        "lengths": None if lengths is None else tuple(lengths),
        "memory_bytes": None if memory is None else running.bytes_of(memory),
        "seconds": seconds,
    }
    settings = running.Settings(**{k: v for k, v in given.items() if v is not None})
    run = looked.run_of(target) if looked.is_run(target) else None

    def recipe(base: str) -> Recipe:
        if run is None:
            return plannable(model_name_or_path=base, **overrides)
        return plannable(run.recipe(), **overrides)

    return running.bench(
        target if run is None else str(run.folder), parts, recipe=recipe, adapter=adapter,
        output=None if output is None else Path(output), settings=settings, told=told,
    )  # fmt: skip


def bench_compare(before: str | os.PathLike[str], after: str | os.PathLike[str]) -> dict[str, Any]:
    """Set two results of `lighten bench` beside each other.

    Args:
        before: File of the first.
        after: File of the second.

    Returns:
        `rows` with the ratio of each figure, its interval and a verdict; and `notes`.

    Raises:
        UserError: A file is not there, or is something else.
    """
    from lighten.bench import comparing

    return comparing.compare(comparing.read(Path(before)), comparing.read(Path(after)))
