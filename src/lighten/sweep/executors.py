"""Where the groups of a sweep are trained: here, one after another, or wherever Ray finds room."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lighten.errors import UserError, missing_extra
from lighten.sweep.arms import Group

# Trains a group in its own run folder, going on where it was; what it found is in that folder.
Work = Callable[[Group], None]


def train_all(groups: Sequence[Group], work: Work, executor: str, folder: Path) -> None:
    """Let every group be trained.

    Args:
        groups: Cohorts, each with a run folder of its own.
        work: What trains one; with Ray it has to be picklable.
        executor: `local` or `ray`.
        folder: The sweep's folder; with several machines one that all of them see.

    Raises:
        UserError: Ray is not installed, or a group failed.
    """
    if executor == "ray":
        _on_ray(groups, work, folder)
        return
    for own in groups:
        work(own)


def _on_ray(groups: Sequence[Group], work: Work, folder: Path) -> None:
    """One Ray Tune trial per group, each with a GPU of its own or else with a whole machine."""
    ray, tune = _ray()
    # Paths in recipes are as the user wrote them; a trial would begin in a folder of its own.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    there = str(Path.cwd())

    def trial(config: dict[str, Any]) -> None:
        os.chdir(there)
        work(groups[config["group"]])
        tune.report({"trained": 1})

    began = not ray.is_initialized()
    if began:
        # RAY_ADDRESS names a cluster; without it Ray starts on this machine alone.
        ray.init(include_dashboard=None, log_to_driver=False, logging_level="error")
    try:
        results = tune.Tuner(
            tune.with_resources(trial, _share(ray)),
            param_space={"group": tune.grid_search(list(range(len(groups))))},
            run_config=tune.RunConfig(
                name="ray", storage_path=str(folder.resolve()), verbose=0
            ),
        ).fit()  # fmt: skip
    finally:
        if began:
            ray.shutdown()
    if results.errors:
        said = str(results.errors[0]).strip().splitlines()[-1]
        raise UserError(
            f"{len(results.errors)} of {len(groups)} groups failed on Ray ({said}); mend it and "
            "start the sweep again: it goes on where it was"
        )
    if results.num_terminated < len(groups):
        raise UserError("Ray was stopped before every group was trained; start the sweep again")


def _share(ray: Any) -> dict[str, float]:
    """What one trial asks for: a GPU, or all cores of the smallest machine where there is none."""
    nodes = [own["Resources"] for own in ray.nodes() if own["Alive"]]
    cores = [own["CPU"] for own in nodes if own.get("CPU")]
    gpus = sum(own.get("GPU", 0.0) for own in nodes)
    if gpus:
        return {"gpu": 1.0, "cpu": max(1.0, sum(cores) // gpus)}
    return {"cpu": max(1.0, min(cores, default=1.0))}


def _ray() -> tuple[Any, Any]:
    try:
        import ray
        from ray import tune
    except ImportError as error:
        raise missing_extra("ray[tune]", "ray") from error
    return ray, tune
