"""Paths as people write them: `~`, and `name#500` for the first 500 rows."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from lighten.errors import UserError


def split_limit(text: str) -> tuple[Path, int | None]:
    """The path that a dataset setting names, and how many rows it asks for.

    What exists wins: `C#/train.jsonl` is that file, not the first rows of `C`.

    Raises:
        UserError: What follows `#` is no number of rows, and nothing has the whole as its name.
    """
    full = expanded(text)
    if "#" not in text or exists(full):
        return full, None
    name, _, count = text.rpartition("#")
    path = expanded(name)
    if count.isascii() and count.isdigit() and int(count[:18]) > 0:
        return path, int(count[:18])
    if "/" in count or "\\" in count or not exists(path):
        return full, None
    raise UserError(f"{text}: what follows # must be a number of rows, from 1")


def exists(path: Path) -> bool:
    """Whether something is there; no name that a file system cannot hold is."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def expanded(text: str) -> Path:
    """The path, with `~` as the user's home, in the form of its letters that is on disk.

    macOS takes letters and their accents apart (NFD), other systems do not (NFC): a name that was
    copied or typed may be in one form and the folder in the other.
    """
    path = Path(text)
    try:
        path = path.expanduser()
    except RuntimeError:  # ~somebody who is not there
        return path
    if text.isascii() or exists(path):
        return path
    forms = (Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD"))
    return next((form for form in forms if exists(form)), path)
