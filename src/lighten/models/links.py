"""Files seen in another folder: by a link where the system lets this user make one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def show(path: Path, at: Path) -> None:
    """Make a file or folder appear in a second place.

    Windows keeps symbolic links for administrators and developers: there it is a second name of the
    same file, and a copy on another disk.

    Args:
        path: What is there.
        at: Where it shall be seen too.
    """
    path = path.resolve()
    try:
        at.symlink_to(path)
    except (OSError, NotImplementedError):
        if path.is_dir():
            shutil.copytree(path, at, copy_function=_second_name)
        else:
            _second_name(path, at)


def _second_name(path: str | Path, at: str | Path) -> None:
    try:
        os.link(path, at)
    except (OSError, NotImplementedError):
        shutil.copy2(path, at)
