"""A training of some steps on the user's data: its times, its memory, and what it learnt.

{"module": "lighten.benchmarking.learning", ...} is a job of `lighten.jobs`.
"""

from __future__ import annotations

import tempfile
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten.recipe.steps import rows_per_step

if TYPE_CHECKING:
    from lighten.recipe import Recipe
    from lighten.training.rows import Rows

# Rows that a short training has at least: one of so many is its longest.
LONGEST_OF = 32


def run(
    recipe: Mapping[str, Any],
    *,
    kind: str,
    steps: int,
    measures_loss: bool = True,
    adapter: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Train in the training loop itself; no checkpoint is written.

    Args:
        recipe: Completed.
        kind: `cpu` or `cuda`.
        steps: Optimiser steps.
        measures_loss: Measure the held-out loss of what was trained.
        adapter: Folder that the trained adapter is written to; None: it is not kept.

    Yields:
        `step_seconds`, `step_tokens` and memory; then `losses`, summed over each held-out row's
        supervised tokens, with their number.

    Raises:
        UserError: Something the user can mend.
    """
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from lighten import runs
    from lighten.cpu import allocator
    from lighten.engine.validation import held_out
    from lighten.machine.hardware import PeakMemory, take
    from lighten.recipe import Recipe
    from lighten.training import run as training  # with all that a training imports
    from lighten.training.base import load_base, tokenizer_of
    from lighten.training.checkpoints import TrainerState
    from lighten.training.export import export_adapter
    from lighten.training.loop import Loop
    from lighten.training.prepare import prepare
    from lighten.training.progress import TrainingProgress
    from lighten.training.rows import load_rows

    assert training is not None
    with tempfile.TemporaryDirectory(prefix="lighten-audit-") as scratch:
        folder = Path(scratch)
        settings = Recipe.model_validate(
            {**recipe, "output_dir": scratch, "max_steps": steps, "report_to": []}
        )
        set_seed(0)
        allocator.keep_pages(kind)
        take(kind)
        accelerator = Accelerator(cpu=kind == "cpu")
        rows = select_rows(load_rows(settings, tokenizer_of(settings)), settings, steps)
        memory = PeakMemory(kind)  # of the training: a run's data were read for its plan, too
        base = load_base(settings, str(accelerator.device), learns=True)
        # The loss is measured once, after the last step and outside of what is timed.
        setup = prepare(settings, accelerator, base, replace(rows, held_out=None))
        before = _samples(setup)
        progress = TrainingProgress(enabled=False)
        Loop(setup, folder, TrainerState(), progress, memory, saves=False).run()
        _require_moved(before, _samples(setup))
        lines = list(runs.read_lines(folder / runs.METRICS))
        peak = memory.read()
        (learner,) = setup.adapters
        parameters = sum(p.numel() for p in learner.parameters.values())
        yield {
            "step_seconds": [line["seconds"] for line in lines],
            "step_tokens": [line["tokens"] for line in lines],
            "train_losses": [line["loss"] for line in lines],
            "peak_bytes": peak["peak_bytes"], "memory_by": peak["method"],
            "reserved_bytes": peak.get("reserved_bytes"), "parameters": parameters,
            "shipped_bytes": shipped_bytes(setup, learner.name),
            "choices": {name: choice.value for name, choice in setup.choices.items()},
        }  # fmt: skip
        if measures_loss and rows.held_out is not None and len(rows.held_out.rows):
            losses = held_out(
                setup.objective, rows.held_out.rows, learner.name,
                max_rows=settings.per_device_eval_batch_size,
                max_tokens=setup.tokens_per_microbatch, device=accelerator.device,
            )  # fmt: skip
            yield {"losses": [list(pair) for pair in zip(losses.nll, losses.tokens, strict=True)]}
        if adapter is not None and settings.method == "lora":
            export_adapter(setup, learner.name, Path(adapter))


def select_rows(rows: Rows, recipe: Recipe, steps: int) -> Rows:
    """As many training rows as some steps take, evenly spread over the data.

    All of them are trained on, so that the longest step of the plan is among those that are made.
    One row of `LONGEST_OF` is as long as the longest that is taken, and that one always is: memory
    then does not hang on how many steps there was time for.

    Args:
        rows: Of the data.
        recipe: Says how many make a step.
        steps: Optimiser steps.
    """
    count = steps * rows_per_step(recipe)
    if len(rows.train.rows) <= count:
        return rows
    lengths = [len(row.input_ids) for row in rows.train.rows]
    shorter_share = 1.0 - 1.0 / LONGEST_OF
    longest = sorted(lengths)[int(shorter_share * (len(lengths) - 1))]
    candidates = [place for place, length in enumerate(lengths) if length <= longest]
    count = min(count, len(candidates))
    places = [candidates[i * len(candidates) // count] for i in range(count)]
    if all(lengths[place] < longest for place in places):
        as_long = next(place for place in candidates if lengths[place] == longest)
        places[bisect_left(places, as_long) - 1] = as_long
    selected = [rows.train.rows[place] for place in places]
    counts = replace(
        rows.train.counts, examples=count, rows=count,
        tokens=sum(len(row.input_ids) for row in selected),
        supervised_tokens=sum(sum(row.supervised[1:]) for row in selected),
    )  # fmt: skip
    return replace(rows, train=replace(rows.train, rows=selected, counts=counts))


def shipped_bytes(setup: Any, adapter: str) -> int:
    """What the files of the training's result hold: an adapter, or every weight of the model."""
    if setup.recipe.method == "lora":
        contents = dict(setup.trained.contents(adapter, base_model=setup.base.name, revision=None))
        return sum(
            len(content) if isinstance(content, bytes) else content.size
            for content in contents.values()
        )
    # Weights that are tied are stored once, in the format of the products.
    stored = {p.data_ptr(): p.numel() for p in setup.base.model.parameters()}
    size = 4 if setup.base.dtype.value == "float32" else 2
    return size * sum(stored.values())


def _samples(setup: Any) -> list[Any]:
    from lighten.planning.probe import samples_of

    return samples_of([p for adapter in setup.adapters for p in adapter.parameters.values()])


def _require_moved(before: list[Any], after: list[Any]) -> None:
    """Trap 51: the time of a model that does not train says nothing."""
    import torch

    from lighten.errors import UserError

    if all(bool(torch.equal(a, b)) for a, b in zip(before, after, strict=True)):
        raise UserError("nothing was trained: no weight has changed after these steps")
