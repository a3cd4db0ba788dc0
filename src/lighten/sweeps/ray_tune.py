"""Groups of a sweep trained through Ray Tune: on its GPUs, or on its machines.

A cohort on one GPU is the cheapest way to train many arms; with several GPUs or machines the arms
are spread over as many cohorts. Ray only starts the work: every group trains in its own run folder,
which all machines have to see, and goes on there when the sweep is started again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lighten.errors import UserError, missing_extra
from lighten.runs import RECIPE, Run
from lighten.sweeps.arms import Group
from lighten.sweeps.budget import Halving, left_early


def slots() -> int:
    """How many groups the Ray cluster can train at once: its GPUs, or its machines.

    Starts Ray on this machine if RAY_ADDRESS names no cluster.

    Raises:
        UserError: Ray is not installed.
    """
    ray, _ = _ray()
    gpus, machines, _ = _resources(ray)
    return int(gpus) or machines


def spread(groups: Sequence[Group], count: int) -> list[Group]:
    """The groups with the largest ones cut, until there are `count` or every arm is alone."""
    found = list(groups)
    while len(found) < count:
        place = max(range(len(found)), key=lambda i: len(found[i].arms))
        own = found[place]
        if len(own.arms) == 1:
            break
        half = (len(own.arms) + 1) // 2
        found[place : place + 1] = [
            replace(own, name=f"{own.name}.{side}", arms=arms)
            for side, arms in (("a", own.arms[:half]), ("b", own.arms[half:]))
        ]
    return found


def train_apart(groups: Sequence[Group], place: Path) -> None:
    """Train every group that is not finished, as many at once as there is room for.

    Args:
        groups: What to train.
        place: The sweep's folder.

    Raises:
        UserError: Ray is not installed, or a group failed.
    """
    ray, tune = _ray()
    waiting = [own for own in groups if not _finished(own, place)]
    if not waiting:
        return
    there, folder = str(Path.cwd()), place.resolve()

    def trial(config: dict[str, Any]) -> None:
        os.chdir(there)  # Tune begins in a folder of its own; paths are as the user wrote them
        train_group(waiting[config["group"]], place)
        tune.report({"trained": 1})

    gpus, machines, cores = _resources(ray)
    share = {"gpu": 1.0, "cpu": max(1.0, cores * machines // gpus)} if gpus else {"cpu": cores}
    results = tune.Tuner(
        tune.with_resources(trial, share),
        param_space={"group": tune.grid_search(list(range(len(waiting))))},
        run_config=tune.RunConfig(name="ray", storage_path=str(folder), verbose=0),
    ).fit()
    if results.errors:
        said = str(results.errors[0]).strip().splitlines()[-1]
        raise UserError(
            f"{len(results.errors)} of {len(waiting)} groups failed on Ray ({said}); mend it and "
            "start the sweep again: it goes on where it was"
        )
    if not all(_finished(own, place) for own in waiting):
        raise UserError(
            f"{place}: Ray has ended before every group was trained; start the sweep again, and "
            "with several machines let all of them see this folder"
        )


def train_group(own: Group, place: Path) -> None:
    """Train a group in its run folder, or go on with it; an arm that diverges leaves alone."""
    from lighten.engine.step import TrainingDiverged
    from lighten.training.run import train

    recipe = own.recipe(place)
    there = (recipe.run_folder / RECIPE).is_file()
    pruner = Halving(recipe.run_folder, recipe.max_steps or 0, recipe.eval_steps or 1, None, None)
    with suppress(TrainingDiverged):  # run.json tells of it
        train(recipe, resume=there, progress=False, pruner=pruner)


def _finished(own: Group, place: Path) -> bool:
    """Whether there is nothing left to do: trained, or every arm has diverged."""
    folder = place / own.name
    if not (folder / RECIPE).is_file():
        return False
    gone = {name for name, event in left_early(Run(folder)).items() if event.get("diverged")}
    done = Run(folder).info().get("status") == "finished"
    return done or gone >= {own.adapter(arm) for arm in own.arms}


def _resources(ray: Any) -> tuple[float, int, float]:
    """GPUs and machines of the cluster, and the cores of its smallest machine."""
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="error")
    nodes = [own["Resources"] for own in ray.nodes() if own["Alive"]]
    cores = [float(own["CPU"]) for own in nodes if own.get("CPU")]
    gpus = sum(float(own.get("GPU", 0.0)) for own in nodes)
    return gpus, max(1, len(cores)), min(cores, default=1.0)


def _ray() -> tuple[Any, Any]:
    try:
        import ray
        from ray import tune
    except ImportError as error:
        raise missing_extra("ray[tune]", "ray") from error
    return ray, tune
