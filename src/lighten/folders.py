"""Folders belong to people: which ones a run may go into, and what it puts there.

A folder that holds anything but a run is never moved, written into or emptied. A run's folder is
known by its `run.json`, which is the first file in it, and holds no names but those below.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lighten import locks
from lighten.errors import UserError
from lighten.whole_files import cannot_write, write_json, write_text
from lighten.wording import typed

QUANTIZE = "quantize.json"
BENCH, AUDIT = "bench.json", "audit.json"
RECIPE, INFO, METRICS, EVALUATION = "recipe.yaml", "run.json", "metrics.jsonl", "evaluation.json"
EVALUATION_PARTS = "evaluation.partial.jsonl"
PLAN, MODEL, SWEEP, LOGS = "plan.json", "model", "sweep.json", "logs"
REPORT, COMPARISON = "report.html", "comparison.html"
# What runs, sweeps, their reports and their trackers put into a folder; `lighten` was TensorBoard's
# before `logs`.
FILES = (RECIPE, INFO, METRICS, EVALUATION, EVALUATION_PARTS, PLAN, REPORT, COMPARISON, SWEEP,
         QUANTIZE, BENCH, "left.jsonl", "search.journal", "search.journal.lock")  # fmt: skip
FOLDERS = ("adapters", "checkpoints", MODEL, "exports", LOGS, "wandb", "lighten", "arms", "tune",
           "look", "ray")  # fmt: skip
# What file managers leave wherever somebody looks.
LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")
_TEMPORARY = re.compile(r"\.(?P<name>.+?)(\.older)?\.(\d+\.tmp|partial)")


@dataclass
class Claim:
    """A folder taken for a run, and what has to go if nothing comes of it.

    Attributes:
        folder: The run's.
        new: There was no run in it: all that is there now was made since.
        created: Folders that were made for it, the deepest first.
        aside: Where the ended run is that was in its place.
    """

    folder: Path
    new: bool
    created: list[Path]
    aside: Path | None = None

    def undo(self) -> bool:
        """Take back what was made, if it is all there is; an ended run gets its name back.

        Returns:
            Whether nothing is left of the run.
        """
        if not self.new:
            return False
        before_training = (RECIPE, PLAN, SWEEP, locks.LOCK, INFO)  # the last says whose it is
        if {path.name for path in self.folder.iterdir()} - {*before_training, *LITTER}:
            return False
        for name in before_training:
            (self.folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # somebody has put something there since
            for path in self.created:
                path.rmdir()
            if self.aside is not None:
                os.rename(self.aside, self.folder)
        return True


def claim(folder: Path, recipe: str, *, aside: bool) -> Claim:
    """Make a run's folder and lock it; `run.json` first, which says that the folder is a run's.

    Args:
        folder: Where the run goes.
        recipe: Text of its recipe.
        aside: An ended run is in the folder and gets another name.

    Raises:
        UserError: The folder is somebody's, or cannot be written.
    """
    require_ours(folder)
    moved = _move_aside(folder) if aside else None
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(error, folder) from error
    locks.acquire(folder)
    claimed = Claim(folder, new=not is_run(folder), created=missing, aside=moved)
    if claimed.new:
        write_json(folder / INFO, {"version": 1})
    write_text(folder / RECIPE, recipe)
    return claimed


def require_ours(folder: Path) -> None:
    """A run may go into this folder: it is not there, empty, or holds a run and nothing else.

    Raises:
        UserError: It is somebody's, or somebody writes it.
    """
    try:
        if folder.is_symlink() and not folder.exists():
            raise UserError(f"output_dir: {folder} is a link to nothing; choose another folder")
        if not folder.exists():
            return
        if not folder.is_dir():
            raise UserError(f"output_dir: {folder} is a file; choose another name for the folder")
        current, resolved = Path.cwd(), folder.resolve()
        if resolved in (current, *current.parents, Path(os.path.expanduser("~")).resolve()):
            raise UserError(
                f"output_dir: {folder} is not a folder of its own for a run; choose one such as "
                "runs/NAME"
            )
        locks.require_unlocked(folder)
        foreign = sorted(path.name for path in folder.iterdir() if not _is_ours(path))
    except OSError as error:
        raise cannot_write(error, folder) from error
    if foreign:
        remainder = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise UserError(
            f"output_dir: {folder} holds files that are not a run's "
            f"({', '.join(foreign[:3])}{remainder}); nothing was changed, choose another folder"
        )


def is_run(folder: Path) -> bool:
    """Whether a folder has a `run.json` that was written here."""
    try:
        value = json.loads((folder / INFO).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(value, dict) and "version" in value


def _is_ours(path: Path) -> bool:
    """Whether an entry of a folder was made by a run."""
    if path.name in (locks.LOCK, *LITTER):
        return True
    temporary = _TEMPORARY.fullmatch(path.name)
    name = path.name if temporary is None else temporary["name"]
    if temporary is not None and name in (*FILES, *FOLDERS, locks.LOCK):
        return True
    if not is_run(path.parent):
        return False
    if path.is_dir():
        return name in FOLDERS or ((path.parent / SWEEP).is_file() and is_run(path))
    return name in FILES


def _move_aside(folder: Path) -> Path:
    """Give an ended run's folder another name.

    Raises:
        UserError: It is a link, or cannot be renamed.
    """
    if folder.is_symlink():
        raise UserError(
            f"output_dir: {folder} is a link to a folder that holds an ended run; choose another "
            "folder"
        )
    aside = free_name(folder)
    try:
        os.rename(folder, aside)
    except OSError as error:
        raise cannot_write(error, folder) from error
    return aside


def resume_command(folder: Path) -> str:
    """What goes on with a run, or with the sweep that it belongs to, as it can be typed."""
    for place in (folder, *folder.parents[:2]):
        if (place / SWEEP).is_file():
            return f"lighten sweep --resume {typed(place)}"
    return f"lighten train --resume {typed(folder)}"


def free_name(folder: Path) -> Path:
    """The folder's name with the first number that is not taken."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return aside
