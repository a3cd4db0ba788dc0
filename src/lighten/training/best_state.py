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
    folder = run_folder / "checkpoints"
    forget_damaged(folder, setup, progress, then="its last one is taken")
    for adapter in setup.adapters:
        step = adapter.progress.best_step  # none where one left before it was ever evaluated
        # The main rank writes what it holds itself.
        if step is not None and (setup.accelerator.is_main_process or is_spread(adapter)):
            checkpoints.restore_weights(folder / f"checkpoint-{step}", setup.trained, adapter.name)


def forget_damaged(folder: Path, setup: Setup, progress: TrainingProgress, *, then: str) -> None:
    """Forget best states that are gone or torn, each adapter's for itself.

    Args:
        folder: Of the run's checkpoints; the main rank looks.
        setup: Whose adapters.
        progress: Told of each that is forgotten.
        then: What is done without it.
    """
    best = {
        a.name: f"checkpoint-{a.progress.best_step}"
        for a in setup.adapters
        if a.progress.best_step is not None
    }
    faults: dict[str, str | None] = {}
    if setup.accelerator.is_main_process:
        for name, checkpoint in best.items():
            faults[name] = (
                checkpoints.fault(folder / checkpoint, f"{setup.trained.folder}/{name}/")
                if (folder / checkpoint).is_dir()
                else "it is gone"
            )
    faults = ranks.of_main(setup.accelerator, faults)
    for adapter in setup.adapters:
        if (fault := faults.get(adapter.name)) is not None:
            progress.note(
                f"warning: the best state of {adapter.name}, {best[adapter.name]}, cannot be put "
                f"back ({fault}); {then}"
            )
            adapter.progress.best_step = adapter.progress.best_loss = None


def is_spread(adapter: AdapterOptimizer) -> bool:
    """Whether ranks hold different rows of what it trains."""
    return dtensors.any_spread(adapter.parameters.values())
