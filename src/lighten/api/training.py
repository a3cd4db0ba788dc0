"""The verbs that train: `train`, `sweep`, and `run` from the recipe to the report."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten import path_checks
from lighten.api.recipes import RecipeLike, recipe_of
from lighten.api.results import Progress, evaluate, report
from lighten.errors import NoHeldOut, UserError
from lighten.parallel import launch, meeting
from lighten.parallel.foreign import MEND
from lighten.parallel.launch import Launch
from lighten.quantization.verbs import quantize
from lighten.recipe import EvaluateOptions, Recipe, aliases, spread
from lighten.runs import Run
from lighten.training import restarting
from lighten.wording import typed

if TYPE_CHECKING:
    from lighten.evaluation.result import Evaluation
    from lighten.sweeps.result import SweepResult


def train(
    recipe: RecipeLike | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
    planned: bool = True,
    force: bool = False,
    processes: int | None = None,
    gpus: int | None = None,
    **overrides: Any,
) -> Run:
    """Train: `train("recipe.yaml", learning_rate=1e-4)` or `train(model=…, dataset=…)`.

    Args:
        recipe: A recipe, its file, a mapping of settings, a run (whose place a new one takes), or
            None to take settings from the overrides alone.
        resume: Go on from the newest whole checkpoint of the run folder, as is done too where
            torchrun or SLURM has started an unfinished run again.
        progress: Show what happens on standard error.
        planned: Predict memory and time first, and compare at the end; `LIGHTEN_PLAN=off` in the
            environment turns it off for all runs.
        force: Train although the plan says that it does not fit.
        processes: Train as so many ranks on this machine's processor.
        gpus: Train as one rank on each of so many GPUs of this machine.
        overrides: Settings by name.

    Raises:
        UserError: Something the user can mend; the plan says that it surely does not fit; a rank
            was lost, and the others were ended.
        Interrupted: A signal to stop; the state is saved and the run is marked interrupted.
    """
    place = launch.recognise()  # what it says is needed before anything else looks at the rank
    count = launch.rank_count(place, processes=processes, gpus=gpus)
    chosen = _as_configured(recipe_of(recipe, **overrides), place)
    spread.require_ranks(chosen, max(count, place.world_size))
    # Of several ranks the first decides it once they have met: others may know of a restart.
    again = None
    if not resume and place.main:
        again = restarting.goes_on(chosen, launch.restarted_by())
    if again is not None and place.world_size == 1:
        chosen.notices.append(restarting.note(again))
        resume = True
    done = None
    going_on = resume or again is not None
    if going_on or not (launch.is_elastic(place) and Run.goes_on(chosen.run_folder)):
        done = path_checks.finished(chosen, resume=going_on, announce=progress and place.main)
    if done is not None and place.world_size == 1:
        return done
    if count > 1:
        return _train_as_ranks(
            chosen, count, device="cuda" if processes is None else "cpu", shown=progress,
            flags=[flag for flag, is_set in (("--resume", resume), ("--force", force),
                                             ("--no-plan", not planned)) if is_set],
        )  # fmt: skip
    from lighten.training.run import train as run_training

    with launch.one_process_on(processes, gpus), meeting.opened(place):
        # A finished run is seen by the first rank, and perhaps by no other: they agree on it.
        if done is not None or not planned or os.environ.get("LIGHTEN_PLAN") == "off":
            return run_training(chosen, resume=resume, restarts=True, progress=progress)
        from lighten.planning.preflight import plan_first, remember

        prediction = plan_first(chosen, force=force, progress=progress)
        done = run_training(
            chosen, resume=resume, restarts=True, progress=progress, prediction=prediction
        )
        # Ranks share the cores of a machine: their times say nothing of one process's.
        remember(done, uninterrupted=not resume and place.world_size == 1)
        return done


def _as_configured(recipe: Recipe, place: Launch) -> Recipe:
    """The recipe with what the launcher of these ranks was configured for.

    Raises:
        UserError: The recipe says something else, or it cannot be had.
    """
    asked, _, problems = aliases.translate(place.configured, beside={"max_steps": recipe.max_steps})
    if problems:
        raise UserError(f"{place.launcher}'s configuration: {'; '.join(problems)}; or {MEND}")
    configured = {name: value for name, value in asked.items() if value != getattr(recipe, name)}
    for name, value in configured.items():
        if (said := getattr(recipe, name)) != type(recipe).model_fields[name].default:
            raise UserError(
                f"{place.launcher} was configured for {name} {value}, and the recipe says {name}: "
                f"{said}; change one of the two"
            )
    if not configured:
        return recipe
    try:
        changed = recipe.changed(configured)
    except UserError as error:
        raise UserError(f"{error} ({place.launcher} was configured so; {MEND})") from error
    changed.notices.extend(
        f"{place.launcher} was configured for {name} {value}" for name, value in configured.items()
    )
    return changed


def _train_as_ranks(
    recipe: Recipe, count: int, *, device: str, shown: bool, flags: Sequence[str]
) -> Run:
    """Train in processes of their own, each a rank, and take their end for this one's."""
    import tempfile

    from lighten.folders import resume_command
    from lighten.parallel import spawn
    from lighten.training.interrupt import Interrupted
    from lighten.training.progress import TrainingProgress

    with TrainingProgress(enabled=shown) as display:
        for notice in recipe.notices:
            display.note(notice)
    chosen = recipe.changed({"output_dir": str(recipe.run_folder)})
    with tempfile.TemporaryDirectory(prefix="lighten-") as folder:
        file = Path(folder) / f"{recipe.name}.yaml"
        file.write_text(chosen.to_yaml(), encoding="utf-8")
        ended = spawn.run(["train", str(file), *flags], count, device=device, shown=shown)
    if ended is None:
        return Run(chosen.run_folder)
    # A rank does not know what has started it.
    command = resume_command(chosen.run_folder)
    as_ranks = f"{command} --{'processes' if device == 'cpu' else 'gpus'} {count}"
    message = ended.message.replace(command, as_ranks)
    if ended.stopped is not None:
        raise Interrupted(message, ended.stopped)
    goes_on = ended.resumable and Run.goes_on(chosen.run_folder)
    raise UserError(f"{message}; go on with: {as_ranks}" if goes_on else message)


def sweep(
    recipe: RecipeLike | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
    measuring_progress: Progress | None = None,
    **overrides: Any,
) -> SweepResult:
    """Train and compare many settings: `sweep("recipe.yaml", lora_r=[8, 32, 128], budget="30m")`.

    Args:
        recipe: A recipe, its file, a mapping of settings, a run (whose place a new one takes), or
            None to take settings from the overrides alone.
        resume: Take up an ended sweep again; an unfinished one goes on by itself.
        progress: Show what happens on standard error.
        measuring_progress: Log what is being measured, how far it is, and of how much.
        overrides: Settings by name. A list is swept, as is a range (a mapping with `min` and
            `max`); names of the `sweep` section (`scaling`, `tune`, `budget`, `search`, …) go
            there. A single value is not swept, whatever the recipe's section says of it.

    Raises:
        UserError: Something the user can mend.
    """
    from lighten.recipe import swept

    launch.require_alone("a sweep", "lighten sweep RECIPE")
    routed = swept.gathered(overrides)
    chosen = swept.overridden(recipe_of(recipe, **routed), routed)
    path_checks.require_model(chosen.model_name_or_path)
    from lighten.sweeps.running import sweep as run_sweep

    result = run_sweep(chosen, resume=resume, progress=progress, measuring=measuring_progress)
    report(result.folder)
    return result


def run(
    recipe: RecipeLike | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
    evaluation_progress: Progress | None = None,
    planned: bool = True,
    force: bool = False,
    processes: int | None = None,
    gpus: int | None = None,
    log: Callable[[str], None] = lambda _: None,
    done: Callable[[str, Any], None] = lambda _verb, _result: None,
    **overrides: Any,
) -> Run:
    """Train, evaluate, quantise where the recipe says so, and report, one after another.

    Where nothing is held out (a handful of rows, `val_size: 0`) the report has no held-out figures.
    Of several ranks the first goes on after the training, alone.

    Args:
        recipe: A recipe, its file, a mapping of settings, a run (whose place a new one takes), or
            None to take settings from the overrides alone.
        resume: Go on from the newest whole checkpoint of the run folder.
        progress: Show what happens while it trains on standard error.
        evaluation_progress: Log what is being measured, how far it is, and of how much.
        planned: As for `train`.
        force: As for `train`.
        processes: As for `train`.
        gpus: As for `train`.
        log: Given a line about each part of the quantising.
        done: Told of each step after the training once it is done: the verb's name, and what that
            verb returned (of `evaluate`, the `NoHeldOut` where there is nothing to measure on).
        overrides: Settings by name.

    Raises:
        UserError: Something the user can mend.
        Interrupted: As for `train`.
    """
    chosen = recipe_of(recipe, **overrides)
    # What the steps after the training need is missed before it, not after.
    if chosen.evaluate != EvaluateOptions():
        from lighten.evaluation.evaluation import require

        require(chosen.evaluate)
    if chosen.quantize.to:
        _require_quantizable(chosen)
    trained = train(
        chosen, resume=resume, progress=progress, planned=planned, force=force,
        processes=processes, gpus=gpus,
    )  # fmt: skip
    if not launch.recognise().main:
        return trained
    done("evaluate", _evaluation(trained, chosen, evaluation_progress))
    if chosen.quantize.to:
        done("quantize", quantize(trained, log=log, **chosen.quantize.model_dump()))
    done("report", report(trained))
    return trained


def _require_quantizable(recipe: Recipe) -> None:
    """What the recipe trains can be written in the formats that it names.

    Raises:
        UserError: A package is missing, or it trains several adapters: none can be named.
    """
    from lighten.quantization.targets import parse, require_tools

    require_tools(parse(recipe.quantize.to))
    names = [adapter.name for adapter in recipe.cohort()]
    if len(names) > 1:
        raise UserError(
            f"quantize.to writes copies of one model, and this recipe trains {len(names)} adapters "
            f"({', '.join(names)}); remove it, and quantise one of them afterwards: lighten "
            f"quantize {typed(recipe.run_folder)} --adapter {typed(names[0])}"
        )


def _evaluation(run: Run, recipe: Recipe, progress: Progress | None) -> Evaluation | NoHeldOut:
    try:
        return evaluate(run, progress=progress, **recipe.evaluate.model_dump())
    except NoHeldOut as nothing:  # training has said so; `run.json` and the report do too
        return nothing
