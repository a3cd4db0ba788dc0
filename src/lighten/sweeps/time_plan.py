"""How many steps a sweep has time for: a look at the speed of its groups, then one number for all.

All arms make the same number of steps: arms that differ in steps say nothing about each other.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lighten.engine.schedule import in_steps
from lighten.evaluation.evaluation import Progress, held_out_examples
from lighten.recipe import Recipe
from lighten.recipe.section import seconds
from lighten.recipe.steps import rows_per_step, total_steps
from lighten.sweeps import costs, tuning
from lighten.sweeps.arms import FULL, Group, expand, full_arm, grid_of, group_arms
from lighten.sweeps.budget import RUNGS, Speed, Work, longest
from lighten.sweeps.measure import BASE, measure_run
from lighten.training.run import train
from lighten.training.time_budget import Pace, steps_within
from lighten.wording import counted, significant

# A look at the speed: the first step is not counted, it checks the loss and warms up.
LOOK_STEPS = 3
# Groups are looked at until this share of the budget is spent on it; of the others it is guessed.
LOOK_SHARE = 0.1


def swept_grid(recipe: Recipe) -> dict[str, list[Any]]:
    """The values by setting that are trained: of ranks that others are cut to, the largest."""
    grid = grid_of(recipe)
    if recipe.sweep.truncate:
        grid["lora_r"] = [max(grid["lora_r"])]
    return grid


def plan_of_arms(recipe: Recipe, folder: Path, measuring: Progress | None) -> dict[str, Any]:
    """As many steps for every arm as `max_time` allows one of them, by a look at the speed.

    Args:
        recipe: The sweep's.
        folder: The sweep's.
        measuring: Told how far measuring is.
    """
    # A search draws its arms later; they are as fast as the recipe's own adapter.
    arms = expand(recipe, {} if recipe.sweep.search else None)
    speed, wanted = look(recipe, group_arms(arms)[0], folder, measuring)
    steps = _steps_of_arm(recipe, speed, wanted)
    note = f"{steps} of {counted(wanted, 'step')} per arm, {recipe.max_time}"
    note += _warmup(recipe, steps, wanted)
    return {"steps": steps, "wanted_steps": wanted, "rung": recipe.eval_steps, "note": note}


def plan_of_budget(
    recipe: Recipe, folder: Path, budget_s: float, spent_s: float, measuring: Progress | None
) -> dict[str, Any]:
    """Look at the speed with a few steps, then lay out what the time does for.

    Args:
        recipe: The sweep's.
        folder: The sweep's.
        budget_s: For the whole sweep.
        spent_s: Of it until now.
        measuring: Told how far measuring is.
    """
    began = time.monotonic()
    tuned = recipe.sweep.tune is not None
    grid = swept_grid(recipe)
    arms = tuning.untuned_arms(recipe, grid) if tuned else expand(recipe, grid)
    groups = group_arms(arms)
    if FULL in recipe.sweep.reference:
        groups += group_arms([full_arm(recipe)])
    speeds, wanted = _speeds(recipe, groups, folder, LOOK_SHARE * budget_s, measuring)
    work = [Work(len(group.arms), speeds[group.name]) for group in groups]
    most = min(_steps_of_arm(recipe, each.speed, wanted) for each in work)
    left_s = budget_s - spent_s - (time.monotonic() - began)
    if BASE in recipe.sweep.reference:
        left_s -= work[0].speed.measuring_s
    if tuned:
        tried = tuning.tuning_arms(recipe, grid, tuning.rates_of(recipe, grid))
        step_s = sum(speeds[group.name].step_s * len(group.arms) for group in groups
                     if group.name != FULL) / len(arms)  # fmt: skip
        left_s -= min(left_s / 2, len(tried) * tuning.steps_of(wanted) * step_s)

    def rung(steps: int) -> int:
        if recipe.eval_steps is not None:
            eval_steps = in_steps(recipe.eval_steps, steps)
            if 2 <= steps / eval_steps <= 2 * RUNGS:
                return eval_steps
        return max(1, steps // RUNGS)

    steps = longest(work, left_s, most, rung)
    note = f"{counted(sum(each.arms for each in work), 'arm')}, {steps} of "
    note += f"{counted(wanted, 'step')}, {significant(budget_s / 60, 3)} min"
    note += _warmup(recipe, steps, wanted)
    return {"steps": steps, "wanted_steps": wanted, "rung": rung(steps), "note": note,
            "speeds": {name: speed.to_dict() for name, speed in speeds.items()}}  # fmt: skip


def speed_of(plan: Mapping[str, Any], group: Group) -> Speed:
    """A group's speed, as a plan of a budget has it."""
    return Speed(**plan["speeds"][group.name])


def share_of(plan: Mapping[str, Any], to_come: Sequence[Group]) -> float:
    """The share of the time that is left for the first group of those to come, by its work."""
    needs_s = [
        Work(len(group.arms), speed_of(plan, group)).needs_s(plan["steps"], plan["rung"])
        for group in to_come
    ]
    return needs_s[0] / sum(needs_s)


def look(
    sweep_recipe: Recipe, group: Group, folder: Path, measuring: Progress | None
) -> tuple[Speed, int]:
    """Measure a group's speed on a few steps, and how many steps a whole run has."""
    place = folder / "look"
    first = group.arms[0]
    recipe = group.recipe(place).changed(
        {"max_steps": LOOK_STEPS, "eval_steps": LOOK_STEPS, "save_steps": LOOK_STEPS,
         "max_time": None, "warmup_steps": None, "report_to": []}
    )  # fmt: skip
    shutil.rmtree(place, ignore_errors=True)
    began = time.monotonic()
    run = train(recipe, progress=False)
    took = time.monotonic() - began
    lines = run.metrics()
    took_s = {m["step"]: m["seconds"] for m in lines if m["kind"] == "train"}
    watched = [m["seconds"] for m in lines if m["kind"] == "eval"]
    short = sweep_recipe.changed({"evaluate.max_examples": sweep_recipe.evaluate.batch_size})
    names: list[tuple[str, str | None]] = [(first.name, group.adapter(first))]
    (measurement,) = measure_run(run, names, place, short, progress=measuring)
    examples = len(held_out_examples(sweep_recipe, None, test=False).examples)
    most = sweep_recipe.evaluate.max_examples or examples
    speed = Speed(
        step_s=(sum(took_s.values()) - took_s[1]) / (LOOK_STEPS - 1) / len(group.arms),
        evaluation_s=sum(watched) / len(watched),
        measuring_s=measurement.seconds * max(1.0, min(most, examples) / len(measurement.nll)),
        starting_s=took - sum(took_s.values()) - sum(watched),
    )
    rows = int(run.info()["data"]["train_rows"])
    shutil.rmtree(place)
    return speed, total_steps(sweep_recipe, rows, rows_per_step(sweep_recipe))


def _speeds(
    recipe: Recipe, groups: Sequence[Group], folder: Path, time_s: float, measuring: Progress | None
) -> tuple[dict[str, Speed], int]:
    """The speed of each group by its name, and how many steps a whole run has.

    Groups differ in what makes steps slow: the batch, the number format, DoRA, the model. The full
    reference differs most, and comes second.
    """
    began = time.monotonic()
    first, *others = groups
    of_first, wanted = look(recipe, first, folder, measuring)
    speeds = {first.name: of_first}
    for group in reversed(others):
        if time.monotonic() - began < time_s:
            speeds[group.name], _ = look(recipe, group, folder, measuring)
        elif group.name == FULL:
            products = costs.training_flops(0, 1) / costs.training_flops(1, 0)
            speeds[FULL] = replace(of_first, step_s=of_first.step_s * products)
        else:
            measured = [speed for name, speed in speeds.items() if name != FULL]
            speeds[group.name] = max(measured, key=lambda speed: speed.step_s)
    return speeds, wanted


def _warmup(recipe: Recipe, steps: int, wanted: int) -> str:
    return tuning.describe_warmup(tuning.shorter_warmup(recipe, steps / wanted), recipe)


def _steps_of_arm(recipe: Recipe, speed: Speed, wanted: int) -> int:
    """How many of the steps an arm has time for by `max_time`; all of them without one."""
    if recipe.max_time is None:
        return wanted
    pace = Pace(speed.step_s, speed.evaluation_s)
    every = recipe.eval_steps or wanted
    return steps_within(seconds(recipe.max_time), pace, wanted, every)
