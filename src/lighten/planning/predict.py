"""The verb `plan`: a recipe and a device in, the prediction out, with what would make it fit."""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lighten import cpu
from lighten.data import lengths_of as token_lengths
from lighten.data.sources import size_here
from lighten.errors import UserError
from lighten.machine.devices import Device
from lighten.machine.hardware import processor_name, slow_format
from lighten.models import Description, Limits, describe, known, limits
from lighten.models.load import TOKENIZER_FILES, locate
from lighten.planning import calibration
from lighten.planning.changes import ALONE, cheapest, ideas
from lighten.planning.data_cost import cost_of, with_data
from lighten.planning.planner import Planner
from lighten.planning.result import Change, Plan, StepTime
from lighten.planning.trace import plan_recipe
from lighten.recipe import Recipe
from lighten.recipe.section import seconds
from lighten.recipe.spread import require_ranks
from lighten.recipe.steps import rows_per_step, steps_per_epoch, total_steps
from lighten.training.base import require_trainable, tokenizer_of
from lighten.training.rows import Rows, cached_rows, load_rows, sample_rows
from lighten.wording import counted

# Of larger data a sample is encoded for a plan alone, if they are not in the cache; data beyond
# what is read in seconds are not read: rows are then taken to be max_length long.
LARGEST_DATA_BYTES, LARGEST_SAMPLED_BYTES = 32 * 2**20, 2**30
SAMPLE_ROWS = 2000
# A user waits no longer than about this for what would need less; then what there is is told.
MOST_CHANGES_S = 30.0
# The first step of a run takes as long as so many later ones: the loss is compared with the model's
# own, memory is touched for the first time, kernels are chosen (SmolLM2 on two cores).
FIRST_STEP = 2.0
AT_ONCE = 4  # changes that are planned side by side before the clock is looked at
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


def plan(
    recipe: Recipe,
    device: Device,
    *,
    rows: Rows | None = None,
    read_data: bool = True,
    calibrate: bool = True,
    changes: bool = True,
    on_plan: Callable[[Plan], None] | None = None,
    ranks: int = 1,
) -> Plan:
    """Predict memory and time of a recipe on a device.

    Args:
        recipe: What would be trained; without a dataset its rows are taken to be `max_length` long.
        device: Where.
        rows: The encoded data, if it is at hand.
        read_data: Read and encode the recipe's data where that is quick.
        calibrate: Correct by what earlier runs on this machine measured.
        changes: Where it does not surely fit, look for what would.
        on_plan: Given the plan before changes are looked for, each of which is a plan of its own.
        ranks: That would train it, of which this is the plan of one, all states on it.

    Raises:
        UserError: The model cannot be described, or the recipe does not fit it; or no run would
            come of the data.
    """
    require_trainable(recipe)
    notes: list[str] = []
    if locate(recipe.model_name_or_path, revision=recipe.revision, weights=False)[0] == "known":
        notes.append(f"the model is not on this machine; its shape is known from {known.SOURCE}")
    if device.memory_alone:
        notes.append(f"of {device.label} only the memory is known, so no time is predicted "
                     f"({device.source})")  # fmt: skip
    if (slow := slow_format_of(recipe, device)) is not None:
        notes.append(slow)
    if recipe.sweep.grid:
        notes.append(
            f"the sweep of {', '.join(recipe.sweep.grid)} is left out: this is one training with "
            "the recipe's own settings, and lighten sweep trains several adapters in one pass, "
            "which is planned where the recipe lists them (lora_r: [8, 32])"
        )
    if rows is None and read_data:
        rows = read_rows(recipe, notes)
    lengths = lengths_of(rows)
    planner = planner_for(device, rows, calibrate=calibrate, ranks=ranks)
    predicted = planner(recipe)
    per_step = rows_per_step(recipe, ranks)
    # Without data only the recipe can say how many there are.
    steps = recipe.max_steps if lengths is None else total_steps(recipe, len(lengths), per_step)
    run_s = run_seconds(recipe, predicted, steps, lengths, ranks)
    if recipe.max_time is not None:
        epoch = None if lengths is None else steps_per_epoch(len(lengths), per_step)
        steps, run_s, note = _within_time(recipe, steps, run_s, predicted.time, epoch)
        notes.append(note)
    predicted = replace(predicted, steps=steps, run_seconds=run_s, notes=(*predicted.notes, *notes))
    if on_plan is not None:
        on_plan(predicted)
    if changes and predicted.capacity is not None and predicted.fits() is not True:
        changes_found, cut = changes_of(recipe, predicted, planner)
        predicted = replace(predicted, changes=changes_found, notes=(*predicted.notes, *cut))
    return predicted


def slow_format_of(recipe: Recipe, device: Device) -> str | None:
    """That a device only emulates the format of a recipe, and which one it computes; or None."""
    name = "this processor" if device.kind == "cpu" else device.label
    return slow_format(recipe.compute_dtype, device.formats, name, device.kind)


def planner_for(
    device: Device, rows: Rows | None = None, *, calibrate: bool = True, ranks: int = 1
) -> Planner:
    """What plans recipes for one device and data.

    Args:
        device: Where.
        rows: The encoded data; a recipe's own `max_length` cuts its rows further. Without it rows
            have `max_length` tokens, all of them supervised, which is the most.
        calibrate: Correct by what earlier runs on this machine measured.
        ranks: As `plan` takes it.
    """
    lengths = lengths_of(rows)
    supervised = supervised_share(rows)
    cost = cost_of(rows) if rows is not None else None
    machine = machine_name(device) if calibrate else None
    pairs = calibration.pairs() if machine else []

    def planned(recipe: Recipe) -> Plan:
        require_ranks(recipe, ranks)
        cut: tuple[int, int] | list[int] | None = longest_rows(recipe)
        if lengths is not None:
            cut = [min(length, recipe.max_length) for length in lengths]
        with warnings.catch_warnings():
            # What is prepared for a GPU that is not here warns that it is not here.
            warnings.simplefilter("ignore", UserWarning)
            predicted = plan_recipe(
                recipe, device, rows_tokens=cut, supervised=supervised, ranks=ranks
            )
        if cost is not None:
            predicted = with_data(predicted, cost, on_processor=device.kind == "cpu")
        return calibration.corrected(predicted, machine, pairs) if machine else predicted

    # A forked process has one thread, and a processor's workers are as many as its threads allow.
    return Planner(planned, in_processes=machine_name(device) is None and device.kind != "cpu")


def longest_rows(recipe: Recipe) -> tuple[int, int] | None:
    """Rows of a step without data, and tokens of each, where positions end before `max_length`."""
    longest, _ = _limits(recipe).longest(recipe.max_length)
    if longest == recipe.max_length:
        return None
    return rows_per_step(recipe), longest


def _limits(recipe: Recipe) -> Limits:
    return _limits_of(recipe.model_name_or_path, recipe.revision, recipe.trust_remote_code)


@functools.lru_cache(maxsize=8)
def _limits_of(name: str, revision: str | None, trust_remote_code: bool) -> Limits:
    """Kept, because a search plans one model many times."""
    return limits(name, revision=revision, trust_remote_code=trust_remote_code)


def changes_of(
    recipe: Recipe, predicted: Plan, planner: Planner
) -> tuple[tuple[Change, ...], list[str]]:
    """What would need less than a plan, the cheapest first, and why not all was looked at."""
    begun, cut = time.monotonic(), False

    def over(share: float) -> bool:
        nonlocal cut
        late = time.monotonic() - begun > share * MOST_CHANGES_S
        cut = cut or late
        return late

    settings = [idea.settings for idea in ideas(recipe, predicted)]
    for place in range(0, len(settings), AT_ONCE):
        if not over(ALONE):
            planner.plan_ahead(_valid(recipe, settings[place : place + AT_ONCE]))
    changes = cheapest(recipe, predicted, planner, over=over, is_planned=planner.knows)
    notes = [f"not all changes could be planned: {missing}" for missing in planner.missing]
    if cut:
        notes.append(
            f"no further changes were looked for within {MOST_CHANGES_S:.0f} s; "
            "lighten plan --search does"
        )
    return changes, notes


def _valid(recipe: Recipe, changes: Sequence[Mapping[str, Any]]) -> Iterator[Recipe]:
    """The recipe with each of the changes that go together with the rest of it."""
    for settings in changes:
        with contextlib.suppress(UserError):
            yield recipe.changed(settings)


def lengths_of(rows: Rows | None) -> list[int] | None:
    """Tokens of each row, or as a sample has them; None where there is no data."""
    if rows is None:
        return None
    lengths = token_lengths(rows.train.rows)
    if rows.of_rows is None:
        return lengths
    return [lengths[place * len(lengths) // rows.of_rows] for place in range(rows.of_rows)]


def supervised_share(rows: Rows | None) -> float:
    """Share of the data's tokens that are supervised; all of them where there is no data."""
    if rows is None or not rows.train.counts.tokens:
        return 1.0
    return rows.train.counts.supervised_tokens / rows.train.counts.tokens


def _within_time(
    recipe: Recipe,
    steps: int | None,
    run_s: float | None,
    step: StepTime | None,
    epoch: int | None,
) -> tuple[int | None, float | None, str]:
    """Steps, their seconds and a sentence on what `max_time` allows at the predicted speed.

    Args:
        recipe: It has a `max_time`.
        steps: That the data and `num_train_epochs` make.
        run_s: What they would take.
        step: The planned step's time.
        epoch: Steps of one pass over the data; None: without data.
    """
    limit, limit_s = recipe.max_time, seconds(str(recipe.max_time))
    if step is None:
        return steps, None, (
            f"max_time {limit}: no time is predicted here; training measures how many steps fit"
        )  # fmt: skip
    if steps is None or run_s is None or epoch is None:
        count = max(1, int(limit_s / step.seconds))
        return count, count * step.seconds, (
            f"max_time {limit}: about {counted(count, 'step')} of this size, evaluations left out"
        )  # fmt: skip
    fitting = steps * limit_s / run_s
    count = min(steps, max(1, int(fitting)))
    sentence = (
        f"max_time {limit}: about {counted(count, 'step')} of {steps:,}, {count / epoch:.2g} of an "
        "epoch"
    )
    if fitting < 1:
        sentence = f"max_time {limit} is too short for a step, and one is made all the same"
    elif count == steps:
        sentence = f"max_time {limit} is enough for all {counted(steps, 'step')}"
    return count, run_s * count / steps, f"{sentence}, at the predicted speed without evaluations"


def run_seconds(
    recipe: Recipe, predicted: Plan, steps: int | None, lengths: Sequence[int] | None, ranks: int
) -> float | None:
    """Seconds of all steps: the planned step is the largest, others take less by their tokens.

    The first one counts as `FIRST_STEP`. Of several ranks each takes its part of a step's rows.
    """
    if predicted.time is None or steps is None or not predicted.step_tokens:
        return None
    counted_steps = steps - 1 + FIRST_STEP
    if lengths is None:
        return predicted.time.seconds * counted_steps
    per_token = predicted.time.seconds / predicted.step_tokens
    mean = sum(min(length, recipe.max_length) for length in lengths) / len(lengths)
    rows = min(rows_per_step(recipe), len(lengths) / ranks) * len(recipe.cohort())
    return per_token * mean * rows * counted_steps


def described(recipe: Recipe) -> Description:
    """A recipe's base by its configuration."""
    return describe(
        recipe.model_name_or_path, revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
    )  # fmt: skip


def parameters_of(model: str) -> int | None:
    """Parameters of a model by its name; None where it cannot be described."""
    try:
        return describe(model).total_parameters
    except UserError:
        return None


def machine_name(device: Device) -> str | None:
    """This machine's name in the calibration file; None for a device that is elsewhere."""
    if not device.is_here:
        return None
    if device.kind == "cpu":
        plain = "" if cpu.enabled() else f", {cpu.PLAIN}"
        return f"cpu: {processor_name()}, {torch.get_num_threads()} threads{plain}"
    return f"cuda: {device.label}"


def read_rows(
    recipe: Recipe,
    notes: list[str],
    progress: Callable[[int, int], None] | None = None,
    *,
    all_rows: bool = False,
) -> Rows | None:
    """The recipe's data, encoded, or a sample of them; nothing is downloaded for that.

    Args:
        recipe: Which data, and how.
        notes: Receives sentences about them.
        all_rows: All of them however large they are, because they are to be trained on.
        progress: Log how many examples are encoded, and of how many.

    Raises:
        UserError: No run would come of these data: a row is broken, refused by the template, or has
            an id that the model does not have.
    """
    longest = f"every row is taken to have {_limits(recipe).longest(recipe.max_length)[1]}"
    if not recipe.dataset:
        notes.append(f"no data set is given: {longest}")
        return None
    size = size_here(recipe.dataset)
    if size is None and not all_rows:
        notes.append(f"the data are not on this machine: {longest}")
        return None
    size = size or 0
    if size > LARGEST_SAMPLED_BYTES and not all_rows:
        notes.append(f"the data's {size / 1e6:,.0f} MB are not read for a plan: {longest}")
        return None
    source, path = locate(
        recipe.model_name_or_path, revision=recipe.revision, weights=False,
        code=recipe.trust_remote_code,
    )  # fmt: skip
    tokenizer_files = TOKENIZERS if source in ("hub", "known") else TOKENIZER_FILES
    if source != "gguf" and not any((path / name).is_file() for name in tokenizer_files):
        notes.append(f"the model's tokenizer is not on this machine: {longest}")
        return None
    rows = _rows_for(recipe, tokenizer_of(recipe), progress, all_rows=all_rows, size=size)
    if rows.of_rows is not None:
        notes.append(
            f"{len(rows.train.rows):,} of {rows.of_rows:,} rows were encoded for this plan, evenly "
            "spread over the data; a longer row among the others needs more"
        )
    notes.extend(rows.notes)
    return rows


def _rows_for(
    recipe: Recipe,
    tokenizer: Any,
    progress: Callable[[int, int], None] | None,
    *,
    all_rows: bool,
    size: int,
) -> Rows:
    """All rows, or a sample where they are many and were never encoded."""
    if all_rows or size <= LARGEST_DATA_BYTES:
        return load_rows(recipe, tokenizer, progress)
    return cached_rows(recipe, tokenizer) or sample_rows(recipe, tokenizer, SAMPLE_ROWS)
