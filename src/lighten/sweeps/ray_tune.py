"""Groups of a sweep trained through Ray Tune: on its GPUs, or on its machines.

A cohort on one GPU is the cheapest way to train many arms; with several GPUs or machines the arms
are spread over as many cohorts. Ray only starts the work: every group trains in its own run folder,
which all machines have to see, and goes on there when the sweep is started again.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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
    cohorts = list(groups)
    while len(cohorts) < count:
        place = max(range(len(cohorts)), key=lambda i: len(cohorts[i].arms))
        largest = cohorts[place]
        if len(largest.arms) == 1:
            break
        half = (len(largest.arms) + 1) // 2
        cohorts[place : place + 1] = [
            replace(largest, name=f"{largest.name}.{side}", arms=arms)
            for side, arms in (("a", largest.arms[:half]), ("b", largest.arms[half:]))
        ]
    return cohorts


@contextmanager
def _signals_given_back() -> Iterator[None]:
    """Ray Tune goes on listening to these once it has ended: the next Ctrl-C did nothing."""
    names = {"SIGINT", "SIGUSR1"} & signal.Signals.__members__.keys()
    before = {signal.Signals[name]: signal.getsignal(signal.Signals[name]) for name in names}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def train_in_parallel(groups: Sequence[Group], place: Path) -> None:
    """Train every group that is not finished, as many at once as there is room for.

    Args:
        groups: What to train.
        place: The sweep's folder.

    Raises:
        UserError: Ray is not installed, or a group failed.
    """
    ray, tune = _ray()
    waiting = [group for group in groups if not is_done(group, place)]
    if not waiting:
        return
    working_dir, folder = str(Path.cwd()), place.resolve()

    def trial(config: dict[str, Any]) -> None:
        # Tune begins in a folder of its own; paths are as the user wrote them.
        os.chdir(working_dir)
        train_group(waiting[config["group"]], place)
        tune.report({"trained": 1})

    gpus, machines, cores = _resources(ray)
    share = {"gpu": 1.0, "cpu": max(1.0, cores * machines // gpus)} if gpus else {"cpu": cores}
    tuner = tune.Tuner(
        tune.with_resources(trial, share),
        param_space={"group": tune.grid_search(list(range(len(waiting))))},
        run_config=tune.RunConfig(name="ray", storage_path=str(folder), verbose=0),
    )
    with _signals_given_back():
        results = tuner.fit()
    if results.errors:
        reason = str(results.errors[0]).strip().splitlines()[-1]
        raise UserError(
            f"{len(results.errors)} of {len(waiting)} groups failed on Ray ({reason}); mend it and "
            "start the sweep again: it goes on where it was"
        )
    if not all(is_done(group, place) for group in waiting):
        raise UserError(
            f"{place}: Ray has ended before every group was trained; start the sweep again, and "
            "with several machines let all of them see this folder"
        )


def train_group(group: Group, place: Path) -> None:
    """Train a group in its run folder, or go on with it; an arm that diverges leaves alone."""
    from lighten.engine.schedule import in_steps
    from lighten.engine.step import TrainingDiverged
    from lighten.training.run import train

    recipe = group.recipe(place)
    exists = (recipe.run_folder / RECIPE).is_file()
    steps = recipe.max_steps or 0
    rung = in_steps(recipe.eval_steps or 1, steps)
    pruner = Halving(recipe.run_folder, steps, rung, None, None)
    with suppress(TrainingDiverged):  # run.json tells of it
        train(recipe, resume=exists, progress=False, pruner=pruner)


def is_done(group: Group, place: Path) -> bool:
    """Whether there is nothing left to do: trained, or every arm has diverged."""
    folder = place / group.name
    if not (folder / RECIPE).is_file():
        return False
    diverged = {name for name, event in left_early(Run(folder)).items() if event.get("diverged")}
    done = Run(folder).info().get("status") == "finished"
    return done or diverged >= {group.adapter(arm) for arm in group.arms}


def _resources(ray: Any) -> tuple[float, int, float]:
    """GPUs and machines of the cluster, and the cores of its smallest machine."""
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="error")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = [float(node["CPU"]) for node in nodes if node.get("CPU")]
    gpus = sum(float(node.get("GPU", 0.0)) for node in nodes)
    return gpus, max(1, len(cores)), min(cores, default=1.0)


def _ray() -> tuple[Any, Any]:
    try:
        import ray
        from ray import tune
    except ImportError as error:
        raise missing_extra("ray[tune]", "ray") from error
    return ray, tune
