"""Runs as a kill leaves them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from lighten.runs import Run
from lighten.training import checkpoints


def cut_short(run: Run, folder: Path, keep: slice = slice(1)) -> Run:
    """A copy of a run that is not finished, with some of its checkpoints: only its first one."""
    shutil.copytree(run.folder, folder)
    written = checkpoints.listing(folder / "checkpoints")
    for checkpoint in set(written) - set(written[keep]):
        shutil.rmtree(checkpoint)
    for result in ("adapters", "model"):
        shutil.rmtree(folder / result, ignore_errors=True)
    (folder / "run.json").write_text(json.dumps({**run.info(), "status": "interrupted"}))
    return Run(folder)
