"""Experiment trackers (W&B, TensorBoard, Trackio), through accelerate."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from lighten.errors import require_package
from lighten.folders import LOGS

PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard", "trackio": "trackio"}


def check_installed(names: Sequence[str]) -> None:
    """Say which tracker is missing before anything is loaded.

    Raises:
        MissingExtra: A package is not installed.
    """
    for name in names:
        require_package(PACKAGES[name], "track")


def places(run_folder: Path) -> ProjectConfiguration:
    """Where trackers write: below a folder of the run, whatever WANDB_PROJECT says."""
    return ProjectConfiguration(str(run_folder), logging_dir=str(run_folder / LOGS))


def start(accelerator: Accelerator, run_folder: Path, settings: Mapping[str, Any]) -> str | None:
    """Open the trackers that the accelerator was made with; settings are shown beside the run.

    Returns:
        That W&B keeps the run on this machine for want of a key; None where there is no such news.
    """
    if not accelerator.log_with:
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    note: str | None = None
    wandb_options = {"name": run_folder.name, "dir": str(run_folder)}
    if (
        "wandb" in settings["report_to"]
        and accelerator.is_main_process
        and "WANDB_MODE" not in os.environ
        and not _wandb_has_key()
    ):
        wandb_options["mode"] = "offline"
        note = (
            f"W&B has no key (wandb login, or WANDB_API_KEY): the run is kept in "
            f"{run_folder / 'wandb'}, and wandb sync uploads it"
        )
    config = {
        key: value if isinstance(value, int | float | str | bool) else str(value)
        for key, value in settings.items()
        if value is not None
    }
    accelerator.init_trackers(
        os.environ.get("WANDB_PROJECT", "lighten"),
        config=config,
        init_kwargs={"wandb": wandb_options},
    )
    return note


def _wandb_has_key() -> bool:
    """Whether W&B can log in without asking for a key, which would stop a run."""
    import wandb

    return wandb.run is not None or bool(wandb.login(prompt=False, verify=False))
