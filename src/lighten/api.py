"""The verbs, as Python functions with the command line's names and meaning."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten import path_checks
from lighten.api_bench import audit as audit
from lighten.api_bench import bench as bench
from lighten.api_bench import bench_compare as bench_compare
from lighten.api_plan import plan_formats as plan_formats
from lighten.api_plan import plan_quantize as plan_quantize
from lighten.api_plan import plan_serve as plan_serve
from lighten.api_plan import plan_spread as plan_spread
from lighten.api_recipe import RecipeLike, recipe_of
from lighten.api_recipe import plannable as plannable
from lighten.api_serve import bench_serve as bench_serve
from lighten.api_serve import plan_server as plan_server
from lighten.api_serve import serve as serve
from lighten.errors import NoHeldOut, UserError
from lighten.folders import AUDIT
from lighten.parallel import launch
from lighten.path_checks import RunLike, adapter_folder, run_of
from lighten.quantization.verbs import export as export
from lighten.quantization.verbs import push as push
from lighten.quantization.verbs import quantize as quantize
from lighten.quantization.verbs import verify as verify
from lighten.recipe import Recipe
from lighten.runs import Run

if TYPE_CHECKING:
    from lighten.adapters.resize import Resized
    from lighten.evaluation.result import Evaluation
    from lighten.planning.probe import Probed
    from lighten.planning.result import Plan
    from lighten.planning.search import Limits, SearchResult, Sized
    from lighten.sweeps.result import SweepResult

Progress = Callable[[str, int, int], None]


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
        recipe: A recipe, its file, or None to take settings from the overrides alone.
        resume: Go on from the newest whole checkpoint of the run folder.
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
        Interrupted: SIGINT or SIGTERM; the state is saved and the run is marked interrupted.
    """
    place = launch.recognise()  # what it says is needed before anything else looks at the rank
    count = launch.rank_count(place, processes=processes, gpus=gpus)
    chosen = recipe_of(recipe, **overrides)
    if place.strategy is not None and place.strategy != chosen.strategy:
        if chosen.strategy != "auto":
            raise UserError(
                f"{place.launcher} was configured for strategy {place.strategy}, and the recipe "
                f"says strategy: {chosen.strategy}; change one of the two"
            )
        chosen = chosen.changed({"strategy": place.strategy})
    done = path_checks.finished(chosen, resume=resume, announce=progress)
    if done is not None:
        return done
    if count > 1:
        return _train_as_ranks(
            chosen, count, device="cuda" if processes is None else "cpu", shown=progress,
            flags=[flag for flag, is_set in (("--resume", resume), ("--force", force),
                                             ("--no-plan", not planned)) if is_set],
        )  # fmt: skip
    from lighten.training.run import train as run_training

    if not planned or os.environ.get("LIGHTEN_PLAN") == "off":
        return run_training(chosen, resume=resume, progress=progress)
    from lighten.planning.preflight import plan_first, remember

    prediction = plan_first(chosen, force=force, progress=progress)
    done = run_training(chosen, resume=resume, progress=progress, prediction=prediction)
    # Ranks share the cores of a machine: their times say nothing of one process's.
    remember(done, uninterrupted=not resume and place.world_size == 1)
    return done


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
    if ended.stopped is not None:
        raise Interrupted(ended.message, ended.stopped)
    goes_on = ended.resumable and Run.goes_on(chosen.run_folder)
    flag = f"--{'processes' if device == 'cpu' else 'gpus'} {count}"
    again = f"; go on with: {resume_command(chosen.run_folder)} {flag}" if goes_on else ""
    raise UserError(f"{ended.message}{again}")


def plan(
    recipe: RecipeLike | None = None,
    *,
    device: str | None = None,
    changes: bool = True,
    on_plan: Callable[[Plan], None] | None = None,
    **overrides: Any,
) -> Plan:
    """Predict memory and time: `plan("recipe.yaml")` or `plan(model=…, device="t4")`.

    Args:
        recipe: A recipe, its file, or None to take settings from the overrides alone; they need
            no `dataset` then.
        device: By name (`t4`, `a100-80`, `cpu`, …); default this machine.
        changes: Where it does not surely fit, look for what would.
        on_plan: Given the plan before changes are looked for.
        overrides: Settings by name.

    Raises:
        UserError: Something the user can mend.
    """
    from lighten.planning.gc_pause import unsearched

    chosen = plannable(recipe, **overrides)
    with unsearched():
        from lighten.machine import devices
        from lighten.planning.predict import plan as predict

    return predict(chosen, devices.named(device), changes=changes, on_plan=on_plan)


def plan_probe(
    recipe: RecipeLike | None = None, *, device: str | None = None, **overrides: Any
) -> tuple[Plan, Probed]:
    """Plan, then make one true step of the planned shape with random weights, and compare.

    Raises:
        UserError: Something the user can mend; the device is not of this machine.
    """
    chosen = plannable(recipe, **overrides)
    from lighten.machine import devices
    from lighten.planning import predict
    from lighten.planning.probe import probe

    where = devices.named(device)
    rows = predict.read_rows(chosen, [])
    prediction = predict.plan(chosen, where, rows=rows, read_data=False)
    return prediction, probe(chosen, prediction, where, rows)


def plan_search(
    recipe: RecipeLike | None = None,
    *,
    device: str | None = None,
    log: Callable[[str], None] | None = None,
    **overrides: Any,
) -> tuple[SearchResult, Recipe | None]:
    """The fastest configuration that fits a device, and its recipe.

    Settings that are given as overrides stay as they are given.

    Args:
        recipe: As for `plan`.
        device: As for `plan`.
        log: Given a line about what is being looked at.
        overrides: Settings by name.

    Raises:
        UserError: Something the user can mend.
    """
    chosen = plannable(recipe, **overrides)
    from lighten.machine import devices
    from lighten.planning import predict, search

    rows = predict.read_rows(chosen, [])
    planner = predict.planner_for(devices.named(device), rows)
    result = search.fastest(chosen, planner, fixed=fixed_by(overrides), log=log)
    best = result.best
    return result, None if best is None else chosen.changed(best.settings)


def plan_largest(
    models: Sequence[str],
    *,
    device: str | None = None,
    log: Callable[[str], None] | None = None,
    **overrides: Any,
) -> list[Sized]:
    """Which of several models is the largest that a device can train.

    Args:
        models: By name; of hub models only the configuration is read.
        device: As for `plan`.
        log: Given a line about what is being looked at.
        overrides: Settings by name, for all of them.

    Raises:
        UserError: Something the user can mend.
    """
    from lighten.machine import devices
    from lighten.planning import predict, search

    return search.largest(
        [(name, predict.parameters_of(name)) for name in models],
        lambda name: plannable(model_name_or_path=name, **overrides),
        predict.planner_for(devices.named(device)),
        fixed=fixed_by(overrides),
        log=log,
    )


def plan_limits(
    recipe: RecipeLike | None = None, *, device: str | None = None, **overrides: Any
) -> Limits:
    """The longest context and the most rows that fit a device.

    Raises:
        UserError: Something the user can mend.
    """
    chosen = plannable(recipe, **overrides)
    from lighten.machine import devices
    from lighten.planning import predict, search

    planner = predict.planner_for(devices.named(device))
    return search.limits(chosen, planner, longest=predict.positions_of(chosen))


def fixed_by(overrides: Mapping[str, Any]) -> tuple[str, ...]:
    """The settings that overrides name, by their own names: a search leaves them alone."""
    from lighten.recipe import aliases

    return tuple(aliases.translate(overrides)[0])


def evaluate(
    run: RunLike, *, against: RunLike | None = None, progress: Progress | None = None,
    **options: Any,
) -> Evaluation:  # fmt: skip
    """Measure base and adapters on the same held-out examples; writes `evaluation.json`.

    Args:
        run: The run.
        against: Another run, evaluated already: its models are compared with those of this one,
            paired over the examples (`comparisons`).
        progress: Log what is being done, how far it is, and of how much.
        options: Settings of the recipe's `evaluate` section.

    Raises:
        UserError: No held-out examples, no adapter in the run, or `against` was measured
            differently.
    """
    chosen = run_of(run)
    other = None if against is None else run_of(against)
    from lighten.evaluation.evaluation import evaluate_run

    return evaluate_run(chosen, against=other, progress=progress, **options)


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
        recipe: A recipe, its file, or None to take settings from the overrides alone.
        resume: Take up an ended sweep again; an unfinished one goes on by itself.
        progress: Show what happens on standard error.
        measuring_progress: Log what is being measured, how far it is, and of how much.
        overrides: Settings by name. A list is swept, as is a range (a mapping with `min` and
            `max`); names of the `sweep` section (`scaling`, `tune`, `reference`, `metric`,
            `budget`) go there.

    Raises:
        UserError: Something the user can mend.
    """
    from lighten.recipe import swept

    if (place := launch.recognise()).world_size > 1:
        raise UserError(
            f"a sweep runs in one process, and {place.launcher} started {place.world_size}; start "
            "it with: lighten sweep RECIPE"
        )
    chosen = recipe_of(recipe, **swept.gathered(overrides))
    path_checks.require_model(chosen.model_name_or_path)
    from lighten.sweeps.running import sweep as run_sweep

    result = run_sweep(chosen, resume=resume, progress=progress, measuring=measuring_progress)
    report(result.folder)
    return result


def report(*runs: RunLike, output: str | os.PathLike[str] | None = None) -> Path:
    """Write the HTML page of a run, of several side by side, of a sweep or an audit; its path.

    Args:
        runs: One or more.
        output: Where; default `report.html` in the run's folder, of several `comparison.html` in
            the first one's.

    Raises:
        UserError: No run, or one that does not exist.
    """
    if not runs:
        raise UserError("report needs at least one run (see: lighten runs list)")
    target = None if output is None else Path(output).expanduser()
    if len(runs) == 1 and not isinstance(runs[0], Run):
        folder = Path(runs[0]).expanduser()
        if (folder / AUDIT).is_file():
            from lighten.reporting.audit_page import write_audit_page

            return write_audit_page(folder, target)
    chosen = [run_of(run) for run in runs]
    from lighten.reporting.page import write_page
    from lighten.reporting.sweep_page import is_sweep, write_sweep_page

    if len(chosen) == 1 and is_sweep(chosen[0].folder):
        return write_sweep_page(chosen[0].folder, target)
    return write_page(chosen, target)


def run(
    recipe: RecipeLike | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
    evaluation_progress: Progress | None = None,
    planned: bool = True,
    force: bool = False,
    **overrides: Any,
) -> Run:
    """Train, evaluate, quantise where the recipe says so, and report, one after another.

    Where nothing is held out (a handful of rows, `val_size: 0`) the report has no held-out figures.

    Raises:
        UserError: Something the user can mend.
    """
    chosen = recipe_of(recipe, **overrides)
    if chosen.quantize.to:  # what it needs is missed before the training, not after
        from lighten.quantization.targets import parse, require_tools

        require_tools(parse(chosen.quantize.to))
    done = train(chosen, resume=resume, progress=progress, planned=planned, force=force)
    with suppress(NoHeldOut):  # training has said so; `run.json` and the report do too
        evaluate(done, progress=evaluation_progress)
    if chosen.quantize.to:
        options = chosen.quantize
        quantize(done, options.to, tokens=options.tokens, questions=options.questions)
    report(done)
    return done


def adapter_info(target: RunLike, *, adapter: str | None = None) -> dict[str, Any]:
    """Rank, alpha, targets, size, and how much of its rank each layer of an adapter uses.

    Args:
        target: A run, or the folder of an adapter in PEFT's format.
        adapter: Which adapter of the run, where it has several.

    Raises:
        UserError: There is no such adapter, or it is not plain LoRA.
    """
    folder = adapter_folder(target, adapter)
    from lighten.adapters import spectrum

    return spectrum.read(folder).info()


def resize_adapter(
    target: RunLike,
    rank: int,
    *,
    adapter: str | None = None,
    output_dir: str | os.PathLike[str] | None = None,
) -> tuple[Path, Resized]:
    """Write an adapter at a lower rank, each layer's best approximation, in PEFT's format.

    Args:
        target: A run, or the folder of an adapter in PEFT's format.
        rank: The highest that a layer keeps.
        adapter: Which adapter of the run, where it has several.
        output_dir: Where; default a run's `exports/NAME-rRANK`, or `FOLDER-rRANK` beside a folder.

    Returns:
        The new folder, and what was kept.

    Raises:
        UserError: No such adapter, not plain LoRA, or `output_dir` holds something else.
    """
    source = adapter_folder(target, adapter)
    from lighten import runs
    from lighten.adapters import resize, spectrum

    alone = not isinstance(target, Run) and source == Path(target).expanduser()
    parent = source.parent if alone else source.parents[1] / "exports"
    read = spectrum.read(source)
    # A rank above the adapter's own cuts nothing; the name says what there is.
    named = f"{source.name}-r{min(rank, read.largest_rank)}"
    folder = Path(output_dir).expanduser() if output_dir is not None else parent / named
    if folder.resolve() == source.resolve():
        raise UserError(f"--output_dir {folder} is the adapter itself; choose another folder")
    resize.require_free(folder)
    done = resize.at_rank(read, rank)
    with runs.whole_folder(folder) as partial:
        for name, data in resize.contents(read, done).items():
            (partial / name).write_bytes(data)
    return folder, done
