"""Runs as a kill leaves them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from lighten.runs import Run
from lighten.training import checkpoints


def cut_short(run: Run, folder: Path) -> Run:
    """A copy of a run, as it was when it had written its first checkpoint."""
    shutil.copytree(run.folder, folder)
    for checkpoint in checkpoints.listing(folder / "checkpoints")[1:]:
        shutil.rmtree(checkpoint)
    (folder / "run.json").write_text(json.dumps({**run.info(), "status": "interrupted"}))
    return Run(folder)
