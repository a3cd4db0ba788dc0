"""What is done with an adapter that is there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten.errors import UserError
from lighten.path_checks import RunLike, adapter_folder
from lighten.paths import expanded, named
from lighten.runs import Run

if TYPE_CHECKING:
    from lighten.adapters.resize import Resized


def adapter_info(target: RunLike, *, adapter: str | None = None) -> dict[str, Any]:
    """Rank, alpha, targets, size, and how much of its rank each layer of an adapter uses.

    Args:
        target: A run, or the folder of an adapter in PEFT's format.
        adapter: Which adapter of the run, where it has several.

    Raises:
        UserError: There is no such adapter, or it is not plain LoRA.
    """
    folder = adapter_folder(target, adapter)
    from lighten.adapters import spectrum

    return spectrum.read(folder).info()


def resize_adapter(
    target: RunLike,
    rank: int,
    *,
    adapter: str | None = None,
    output_dir: str | os.PathLike[str] | None = None,
) -> tuple[Path, Resized]:
    """Write an adapter at a lower rank, each layer's best approximation, in PEFT's format.

    Args:
        target: A run, or the folder of an adapter in PEFT's format.
        rank: The highest that a layer keeps.
        adapter: Which adapter of the run, where it has several.
        output_dir: Where; default a run's `exports/NAME-rRANK`, or `FOLDER-rRANK` beside a folder.

    Returns:
        The new folder, and what was kept.

    Raises:
        UserError: No such adapter, not plain LoRA, or `output_dir` holds something else.
    """
    source = adapter_folder(target, adapter)
    from lighten import runs
    from lighten.adapters import resize, spectrum

    alone = not isinstance(target, Run) and source == expanded(os.fspath(target))
    whole = named(source)
    parent = whole.parent if alone else source.parents[1] / "exports"
    read = spectrum.read(source)
    # A rank above the adapter's own cuts nothing; the name says what there is.
    name = f"{whole.name}-r{min(rank, read.largest_rank)}"
    folder = Path(output_dir).expanduser() if output_dir is not None else parent / name
    if folder.resolve() == source.resolve():
        raise UserError(f"--output_dir {folder} is the adapter itself; choose another folder")
    resize.require_free(folder)
    done = resize.at_rank(read, rank)
    with runs.whole_folder(folder) as partial:
        for file, data in resize.contents(read, done).items():
            (partial / file).write_bytes(data)
    return folder, done
