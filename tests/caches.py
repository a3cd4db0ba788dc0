"""A cache of a test's own, on a machine that is known already."""

from __future__ import annotations

import shutil
from pathlib import Path

from lighten.machine.hardware import cache_folder
from lighten.planning import process_overhead

MEASURED = ("rates-*.json", process_overhead.FILE, process_overhead.ANSWERS_FILE)


def new_cache(folder: Path) -> Path:
    """A cache that has no model and no data, but whose kernels need not be compiled again.

    Nor is measured again what the tests' own cache knows of this machine.

    Args:
        folder: Where; it is made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels").symlink_to((cache_folder() / "kernels").resolve())
    for pattern in MEASURED:
        for file in cache_folder().glob(pattern):
            shutil.copyfile(file, folder / file.name)
    return folder
