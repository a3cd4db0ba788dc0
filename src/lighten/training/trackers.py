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


def start(accelerator: Accelerator, run_folder: Path, settings: Mapping[str, Any]) -> None:
    """Open the trackers that the accelerator was made with; settings are shown beside the run."""
    if not accelerator.log_with:
        return
    # Never stop for a login prompt: without a key W&B writes into the run folder only.
    if "WANDB_API_KEY" not in os.environ:
        os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    config = {
        key: value if isinstance(value, int | float | str | bool) else str(value)
        for key, value in settings.items()
        if value is not None
    }
    accelerator.init_trackers(
        os.environ.get("WANDB_PROJECT", "lighten"),
        config=config,
        init_kwargs={"wandb": {"name": run_folder.name, "dir": str(run_folder)}},
    )
