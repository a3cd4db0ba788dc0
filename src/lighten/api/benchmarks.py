"""The verbs that measure: `bench` and `audit`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten import path_checks
from lighten.path_checks import RunLike

if TYPE_CHECKING:
    from lighten.benchmarking.audit import Audit
    from lighten.recipe import Recipe


def bench(
    target: RunLike,
    parts: str | Sequence[str] = (),
    *,
    adapter: str | None = None,
    memory: str | int | None = None,
    output: str | os.PathLike[str] | None = None,
    prompt_tokens: Sequence[int] | None = None,
    batch_sizes: Sequence[int] | None = None,
    new_tokens: int | None = None,
    lengths: Sequence[int] | None = None,
    seconds: float | None = None,
    log: Callable[[str], None] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Measure a model or a run on this machine: `bench("smollm2-135m", ["size", "train"])`.

    Args:
        target: A model; or a run, of which the adapter and the merged model are measured too.
        parts: One or more of `size`, `generate`, `attention`, `train`, `max-batch`; none: all.
        adapter: Of a run with several, which.
        memory: What a process may hold, such as `8GiB`; None: nine tenths of what is free.
        output: Where the file goes; None: `bench.json` in a run's folder, and none for a model.
        prompt_tokens: Prompt lengths of `generate`.
        batch_sizes: Prompts answered together in `generate`.
        new_tokens: Tokens of an answer.
        lengths: Row lengths of `attention`.
        seconds: For the repeats of each figure.
        log: Given a line about what is being done.
        overrides: Settings of the recipe for `train` and `max-batch`.

    Returns:
        What the file holds: machine, versions, settings and `records`.

    Raises:
        UserError: Something the user can mend.
    """
    target = path_checks.text_of(target)
    path_checks.require_answerable(target)
    from lighten.api.recipes import plannable
    from lighten.benchmarking import running

    options: dict[str, Any] = {
        "prompt_tokens": None if prompt_tokens is None else tuple(prompt_tokens),
        "batch_sizes": None if batch_sizes is None else tuple(batch_sizes),
        "new_tokens": new_tokens,
        "lengths": None if lengths is None else tuple(lengths),
        "memory_bytes": None if memory is None else running.bytes_of(memory),
        "seconds": seconds,
    }
    settings = running.Settings(**{k: v for k, v in options.items() if v is not None})
    run = path_checks.run_of(target) if path_checks.is_run(target) else None

    def recipe(base: str) -> Recipe:
        if run is None:
            return plannable(model_name_or_path=base, **overrides)
        return plannable(run.recipe(), **overrides)

    return running.bench(
        target if run is None else str(run.folder),
        (parts,) if isinstance(parts, str) else parts, recipe=recipe, adapter=adapter,
        output=None if output is None else Path(output).expanduser(), settings=settings, log=log,
    )  # fmt: skip


def audit(
    model: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str],
    budget: str = "30m",
    output_dir: str | os.PathLike[str] | None = None,
    memory: str | int | None = None,
    examples: int = 100,
    steps: int | None = None,
    prompt_tokens: int = 64,
    new_tokens: int = 32,
    long_tokens: int | None = None,
    log: Callable[[str], None] = lambda _: None,
    **overrides: Any,
) -> Audit:
    """Measure the plain way beside every technique: `audit("smollm2-135m", data="train.jsonl")`.

    Writes `audit.json` after each row, and the page `report.html`. Called again it goes on where it
    was stopped, and tries rows again that failed but did not run out of memory; with a larger
    budget it measures what the smaller one left out.

    Args:
        model: The base.
        data: Training examples, and held-out ones as `lighten train` finds them.
        budget: Time for all of it: `90s`, `30m`, `2h`.
        output_dir: Where; default `runs/audit-MODEL`.
        memory: What a process may hold, such as `8GiB`; None: nine tenths of what is free.
        examples: Held-out examples that losses are measured on.
        steps: Of each training; None: as many as the budget has room for.
        prompt_tokens: Of a prompt whose answer is timed.
        new_tokens: Of that answer.
        long_tokens: Of a long row; None: as many as the budget has room for; 0: none.
        log: Given a line about what is being done.
        overrides: Settings of the recipe that all rows share; none that the rows themselves decide.

    Raises:
        UserError: Something the user can mend.
    """
    from lighten.api.recipes import recipe_of
    from lighten.benchmarking import running
    from lighten.benchmarking.audit import Settings
    from lighten.benchmarking.audit import audit as measure
    from lighten.benchmarking.techniques import DECIDED
    from lighten.errors import UserError
    from lighten.paths import named
    from lighten.recipe import aliases
    from lighten.recipe.section import duration
    from lighten.reporting.audit_page import write_audit_page

    model = os.fspath(model)
    path_checks.require_model(model)
    for name in aliases.translate(overrides)[0]:
        if name in DECIDED:
            raise UserError(f"{name} has no effect on an audit: {DECIDED[name]}")
    try:
        budget_s = duration(budget)
    except ValueError as error:
        raise UserError(f"--budget {budget}: {error}") from error
    settings = Settings(
        budget_s, None if memory is None else running.bytes_of(memory), examples, steps,
        prompt_tokens, new_tokens, long_tokens,
    )  # fmt: skip
    name = named(Path(model)).name.removesuffix(".gguf")
    folder = Path("runs") / f"audit-{name}" if output_dir is None else Path(output_dir)

    def recipe(changes: Mapping[str, Any]) -> Recipe:
        shared = {"model_name_or_path": model, "dataset": os.fspath(data)}
        return recipe_of(None, **{**shared, **overrides, **changes})

    result = measure(model, recipe=recipe, folder=folder.expanduser(), settings=settings, log=log)
    write_audit_page(result.folder)
    return result


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
    from lighten.benchmarking import comparing

    return comparing.compare(comparing.read(Path(before)), comparing.read(Path(after)))
