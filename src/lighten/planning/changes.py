"""What would need less memory: each change planned like the rest, the cheapest first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lighten.errors import UserError
from lighten.planning.result import Change, Plan
from lighten.recipe import Recipe
from lighten.recipe.fields import AdapterFields
from lighten.recipe.offloading import SPREADING
from lighten.recipe.section import LORA_LEARNING_RATE

# A recipe in, its plan out: the device and the data are the caller's.
Planner = Callable[[Recipe], Plan]
SHORTEST = 128  # tokens; less is no context to train on
# Whether this share of the time for looking is over.
Over = Callable[[float], bool]
ALONE = 0.5  # of that time, while no change alone is enough: the rest is for several together


@dataclass(frozen=True)
class Idea:
    """A change that has not been planned yet.

    Attributes:
        what: In words.
        settings: What to set.
        same_result: Whether the run computes the same, up to rounding.
    """

    what: str
    settings: dict[str, Any]
    same_result: bool


def cheapest(
    recipe: Recipe,
    plan: Plan,
    planner: Planner,
    *,
    over: Over = lambda _: False,
    is_planned: Callable[[Recipe], bool] = lambda _: False,
) -> tuple[Change, ...]:
    """Changes that need less memory, the best first; combined where none is enough alone.

    First what fits, then by slowdown; among equals what leaves the result as it is. A change that
    saves nothing is left out.

    Args:
        recipe: What does not fit.
        plan: Its plan.
        planner: Plans a recipe for the same device and data.
        over: Whether to look no further: every change is a plan, and a user waits.
        is_planned: Whether a recipe is planned already: that takes no time any more.
    """
    changes: list[tuple[Idea, Change]] = []
    for idea in ideas(recipe, plan):
        enough = any(change.fits for _, change in changes)
        if over(1.0 if enough else ALONE) and not _is_planned(recipe, idea, is_planned):
            continue
        change = _planned(recipe, plan, idea, planner)
        if change is not None and change.saves_bytes > 0:
            changes.append((idea, change))
    changes.sort(key=lambda entry: _rank(*entry))
    single = [change for _, change in changes]
    if changes and not any(change.fits for change in single):
        together = _together(recipe, plan, [idea for idea, _ in changes], planner, over)
        if together is not None:
            return (together, *single)
    return tuple(single)


def ideas(recipe: Recipe, plan: Plan) -> Iterator[Idea]:
    """What could be changed in this recipe, without knowing yet what it gives.

    What one flag does and most saves by is first, in case there is no time for all of them.
    """
    if not recipe.gradient_checkpointing:
        yield Idea("gradient checkpointing", {"gradient_checkpointing": True}, True)
    elif recipe.gradient_checkpointing_layers > 1 or recipe.gradient_checkpointing_part != "layer":
        yield Idea(
            "gradient checkpointing of every layer",
            {"gradient_checkpointing_layers": 1, "gradient_checkpointing_part": "layer"}, True,
        )  # fmt: skip
    if recipe.method == "lora" and recipe.peft is None:
        if not recipe.load_in_4bit:
            settings = {"load_in_4bit": True, "load_in_8bit": False}
            yield Idea("the base in 4 bits (QLoRA)", settings, False)
        elif not recipe.bnb_4bit_use_double_quant:
            settings = {"bnb_4bit_use_double_quant": True}
            yield Idea("the scales of the 4 bits quantised too", settings, False)
    yield from _offloading(recipe, plan)
    if smaller := smaller_micro_batch(recipe, plan.shape.rows, plan.shape.tokens_per_row):
        settings, rows = smaller
        yield Idea(f"micro-batches of {rows}, as many rows per step as before", settings, True)
    if recipe.method == "full":
        yield Idea("LoRA adapters in place of all weights", _as_lora(), False)
        settings = {**_as_lora(), "load_in_4bit": True}
        yield Idea("LoRA adapters over the base in 4 bits (QLoRA)", settings, False)
    if recipe.optim in ("adamw_torch", "adamw_torch_fused"):
        yield Idea("an 8-bit optimiser", {"optim": "adamw_8bit"}, False)
    if recipe.dtype == "float32" and not recipe.load_in_4bit:
        yield Idea("the base in bfloat16 or float16", {"dtype": "auto"}, False)
    if recipe.max_length // 2 >= SHORTEST and plan.shape.tokens_per_row > recipe.max_length // 2:
        half = recipe.max_length // 2
        yield Idea(f"rows of {half} tokens at most", {"max_length": half}, False)
    cohort = len(recipe.cohort())
    if cohort > 1:
        yield Idea(f"{cohort} runs, one per adapter", _largest_alone(recipe), True)


def _offloading(recipe: Recipe, plan: Plan) -> Iterator[Idea]:
    """Layers, or state, somewhere else until they are needed; the results stay as they are."""
    on_gpu = plan.memory.allocated is not None
    if recipe.method == "full" and recipe.offload_optimizer == "none":
        what, where = ("in main memory", "cpu") if on_gpu else ("on a disk", "nvme")
        yield Idea(f"AdamW's state {what}", {"offload_optimizer": where}, True)
    if on_gpu and recipe.method == "full" and recipe.offload_params == "none":
        strategy = recipe.strategy if recipe.strategy in SPREADING else "zero3"
        settings = {"strategy": strategy, "offload_params": "cpu"}
        yield Idea("weights, gradients and AdamW's state in main memory", settings, True)
    if recipe.offload_base != "none" or recipe.method != "lora":
        return
    if on_gpu:
        yield Idea("the base in main memory, streamed to the GPU", {"offload_base": "cpu"}, True)
    else:
        yield Idea("the base on disk, streamed", {"offload_base": "disk"}, True)


def smaller_micro_batch(
    recipe: Recipe, rows: int, tokens_per_row: int
) -> tuple[dict[str, Any], str] | None:
    """Settings for half the micro-batch with as many rows per step, and the size in words.

    None where one row is all there is. `per_device_train_batch_size` times
    `gradient_accumulation_steps` stays the same, so that the result does, too.

    Args:
        recipe: As it is.
        rows: Rows of the largest micro-batch, of all adapters that share it.
        tokens_per_row: The longest of them.
    """
    batch, steps = recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps
    # Of several adapters in one pass a micro-batch has as many rows of each.
    each = min(rows, batch)
    if each <= 1:
        return None
    half = each // 2
    if rows < batch and recipe.tokens_per_microbatch is not None:
        # The token budget cuts the micro-batch, not the number of rows.
        tokens = half * tokens_per_row
        return {"tokens_per_microbatch": tokens}, f"{tokens} tokens"
    while batch % half:
        half -= 1
    settings = {
        "per_device_train_batch_size": half,
        "gradient_accumulation_steps": steps * (batch // half),
    }
    return settings, "one row" if half == 1 else f"{half} rows"


def _as_lora() -> dict[str, Any]:
    return {"method": "lora", "trainable_layers": None, "learning_rate": LORA_LEARNING_RATE}


def _largest_alone(recipe: Recipe) -> dict[str, Any]:
    """The settings of the cohort's adapter of the highest rank, as the only one."""
    largest = max(recipe.cohort(), key=lambda adapter: adapter.lora_r)
    settings = {name: getattr(largest, name) for name in AdapterFields.model_fields}
    return {"adapters": None, **settings}


def _planned(recipe: Recipe, plan: Plan, idea: Idea, planner: Planner) -> Change | None:
    """The change with its figures; None where the settings do not go together."""
    try:
        changed = planner(recipe.changed(idea.settings))
    except UserError:
        return None  # what cannot be run is no advice
    return Change(
        what=idea.what,
        settings=idea.settings,
        saves_bytes=plan.memory.expected - changed.memory.expected,
        slowdown=_slowdown(plan, changed),
        fits=changed.fits(),
        differing=differing(recipe, idea.settings),
    )


def _is_planned(recipe: Recipe, idea: Idea, is_planned: Callable[[Recipe], bool]) -> bool:
    try:
        return is_planned(recipe.changed(idea.settings))
    except UserError:
        return False


def differing(recipe: Recipe, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of some settings those that a recipe does not have already, by default or as given."""
    return {name: value for name, value in settings.items() if getattr(recipe, name) != value}


def _slowdown(plan: Plan, changed: Plan) -> float | None:
    """Seconds per token over those before: a shorter row is not a faster one."""
    if plan.time is None or changed.time is None or not plan.time.seconds:
        return None
    if not (plan.time.whole and changed.time.whole):
        return None
    before, after = plan.time.seconds / _tokens(plan), changed.time.seconds / _tokens(changed)
    return after / before


def _tokens(plan: Plan) -> int:
    return max(1, plan.step_tokens or 1)


def _rank(idea: Idea, change: Change) -> tuple[int, float, int, int]:
    fits = {True: 0, None: 1, False: 2}[change.fits]
    slowdown = change.slowdown if change.slowdown is not None else math.inf
    # A per cent more or less is the prediction's noise: then the result decides.
    return fits, round(slowdown, 2), int(not idea.same_result), -change.saves_bytes


def _together(
    recipe: Recipe, plan: Plan, saving_ideas: list[Idea], planner: Planner, over: Over
) -> Change | None:
    """The first ideas that fit when taken together, each halved or repeated as far as it goes."""
    parts: dict[frozenset[str], Idea] = {}  # by what it sets: a repeated idea is told once
    current_plan = plan
    if over(1.0) or _least(recipe, saving_ideas, planner) is False:
        return None  # one plan in place of a dozen
    for idea in sorted(saving_ideas, key=_resort):
        if "adapters" in idea.settings:
            continue  # another run is no part of this one
        for repeated in _repeated(idea, recipe, _joined(parts), current_plan):
            if over(1.0):
                return None
            try:
                changed = planner(recipe.changed({**_joined(parts), **repeated.settings}))
            except UserError:
                break
            if changed.memory.expected >= current_plan.memory.expected:
                break
            parts[frozenset(repeated.settings)], current_plan = repeated, changed
            if changed.fits():
                current_plan = _leave_out(parts, saving_ideas, recipe, changed, planner, over)
                settings = _joined(parts)
                return Change(
                    "; ".join(part.what for part in parts.values()), settings,
                    plan.memory.expected - current_plan.memory.expected,
                    _slowdown(plan, current_plan), True, differing(recipe, settings),
                )  # fmt: skip
    return None


def _joined(parts: Mapping[frozenset[str], Idea]) -> dict[str, Any]:
    return {name: value for part in parts.values() for name, value in part.settings.items()}


def _leave_out(
    parts: dict[frozenset[str], Idea], ideas: Sequence[Idea], recipe: Recipe, fitting: Plan,
    planner: Planner, over: Over,
) -> Plan:  # fmt: skip
    """Take out the parts that are not needed beside what came after them; what is left, planned.

    Without the last one they did not fit, nor does one of the ideas alone.
    """
    each = [[key] for key in [*parts][-2::-1]]
    # All between at once first: the two that save most are often enough.
    between = [*parts][1:-1]
    for keys in [between, *each] if len(between) > 1 else each:
        fewer = {other: part for other, part in parts.items() if other not in keys}
        alone = next(iter(fewer.values())) if len(fewer) == 1 else None
        if alone in ideas or len(fewer) == len(parts):  # planned already
            continue
        if over(1.0):
            break
        try:
            changed = planner(recipe.changed(_joined(fewer)))
        except UserError:
            continue
        if changed.fits():
            for key in keys:
                del parts[key]
            fitting = changed
    return fitting


def _resort(idea: Idea) -> int:
    """What leaves the result as it is first; then what moves much, which takes long.

    A shorter context, which a user notices most, is the last resort.
    """
    if "max_length" in idea.settings:
        return 3
    moves = idea.settings.keys() & {"offload_base", "offload_optimizer", "offload_params"}
    return 2 if moves else int(not idea.same_result)


def _least(recipe: Recipe, saving_ideas: Sequence[Idea], planner: Planner) -> bool | None:
    """Whether everything together, each as far as it goes, fits; None where that cannot be told."""
    settings: dict[str, Any] = {}
    for idea in saving_ideas:
        if "adapters" not in idea.settings:
            settings |= idea.settings
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps",
                 "tokens_per_microbatch"):  # fmt: skip
        if name in settings:
            settings[name] = 1  # rows per step decide nothing about the peak of one of them
    if "max_length" in settings:
        settings["max_length"] = SHORTEST
    try:
        return planner(recipe.changed(settings)).fits()
    except UserError:
        return None


def _repeated(
    idea: Idea, recipe: Recipe, combined: Mapping[str, Any], current_plan: Plan
) -> Iterator[Idea]:
    """The idea, and again as long as it can be halved once more."""
    if not idea.settings.keys() & {
        "per_device_train_batch_size", "tokens_per_microbatch", "max_length",
    }:  # fmt: skip
        yield idea
        return
    if "max_length" in idea.settings:
        length = int(idea.settings["max_length"])
        while length >= SHORTEST:
            yield replace(
                idea, what=f"rows of {length} tokens at most", settings={"max_length": length}
            )
            length //= 2
        return
    rows, before = current_plan.shape.rows, dict(combined)
    while step := smaller_micro_batch(
        recipe.changed(before), rows, current_plan.shape.tokens_per_row
    ):
        settings, size = step
        yield replace(
            idea, what=f"micro-batches of {size}, as many rows per step as before",
            settings=settings,
        )  # fmt: skip
        before, rows = {**before, **settings}, max(1, rows // 2)
