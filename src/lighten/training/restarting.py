"""What a launcher starts again after its processes or its machine had ended: whether it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lighten.errors import UserError
from lighten.parallel import launch
from lighten.paths import exists
from lighten.runs import RECIPE, Run

if TYPE_CHECKING:
    from accelerate import Accelerator

    from lighten.recipe import Recipe


def goes_on(recipe: Recipe, restarted_by: str | None) -> str | None:
    """What has started a recipe's run again; None: there is none, or it is not to go on.

    Where a run has ended, a start is a new run, but for one by the same job of that launcher.

    Args:
        recipe: What is to be trained.
        restarted_by: The launcher that has started the ranks, or some of them, again.
    """
    folder = recipe.run_folder
    if not exists(folder / RECIPE):
        return None
    run = Run(folder)
    info, jobs = run.info(), launch.jobs()
    noted = info.get("jobs") or {}
    if run.is_unfinished():
        # Each agent of torchrun counts its restarts for itself, and not those for other machines.
        same = jobs.get("torchrun", "") == noted.get("torchrun")
        return restarted_by or ("torchrun" if same else None)
    if restarted_by is None or noted.get(restarted_by, "") != jobs.get(restarted_by):
        return None
    try:
        Run.before(recipe, resume=True)
    except UserError:  # a job may train several recipes, one after the other
        return None
    if run.is_finished() or (info.get("status") == "failed" and _has_checkpoint(folder)):
        return restarted_by
    return None


def note(launcher: str) -> str:
    """What to say of it."""
    return f"{launcher} has started this again: going on with the run"


def agreed(recipe: Recipe, accelerator: Accelerator) -> bool:
    """Whether ranks go on with the run, as the main one sees it in its folder; all do what it does.

    Raises:
        PeerLost: A rank has ended.
    """
    from lighten.parallel import ranks  # loads PyTorch

    by = next(filter(None, ranks.gather(accelerator, launch.restarted_by())), None)
    again = goes_on(recipe, by) if accelerator.is_main_process else None
    again = ranks.of_main(accelerator, again)
    if again is not None:
        recipe.notices.append(note(again))
    return again is not None


def _has_checkpoint(folder: Path) -> bool:
    from lighten.training import checkpoints  # loads PyTorch

    return checkpoints.newest_complete(folder / "checkpoints")[0] is not None
