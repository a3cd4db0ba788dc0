"""The weights of the lowest held-out loss, taken back from their checkpoint when a run ends."""

from __future__ import annotations

from pathlib import Path

from lighten.adapters import dtensors
from lighten.engine.adapter_optimizer import AdapterOptimizer
from lighten.parallel import ranks
from lighten.training import checkpoints
from lighten.training.progress import TrainingProgress
from lighten.training.setup import Setup


def put_best_back(run_folder: Path, setup: Setup, progress: TrainingProgress) -> None:
    """Each adapter as it was at its lowest held-out loss; as it is, where that was damaged since.

    Refused instead, the run could never be finished, however often it was resumed.

    Args:
        run_folder: The run's.
        setup: Whose adapters.
        progress: Told of what is damaged.
    """
    # Where one left before it was ever evaluated there is none.
    best = {
        a.name: a.progress.best_step for a in setup.adapters if a.progress.best_step is not None
    }
    places = {n: run_folder / "checkpoints" / f"checkpoint-{step}" for n, step in best.items()}
    faults: dict[str, str | None] = {}
    if setup.accelerator.is_main_process:
        folder = setup.trained.folder
        faults = {n: checkpoints.fault(place, f"{folder}/{n}/") for n, place in places.items()}
    faults = ranks.of_main(setup.accelerator, faults)
    for adapter in setup.adapters:
        if (fault := faults.get(adapter.name)) is not None:
            progress.note(
                f"warning: the best state of {adapter.name}, {places[adapter.name].name}, is not "
                f"whole ({fault}); its last one is taken"
            )
            adapter.progress.best_step = None
        # The main rank writes what it holds itself.
        elif adapter.name in places and (setup.accelerator.is_main_process or is_spread(adapter)):
            checkpoints.restore_weights(places[adapter.name], setup.trained, adapter.name)


def is_spread(adapter: AdapterOptimizer) -> bool:
    """Whether ranks hold different rows of what it trains."""
    return dtensors.any_spread(adapter.parameters.values())
