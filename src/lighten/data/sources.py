"""The data sets that a setting names: files and folders here, or the hub's by their ids."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lighten import hub_errors
from lighten.data.files import files_of, has_split
from lighten.errors import UserError
from lighten.paths import DATA_SUFFIXES, data_sets, exists, of_hub, split_limit
from lighten.streams import download_bar


@dataclass(frozen=True)
class Source:
    """One data set.

    Attributes:
        name: Its file, the folder of its shards, or its id on the hub.
        files: The file, or all shards of the folder's split.
        rows: Rows at most; None: all.
    """

    name: str
    files: list[Path]
    rows: int | None


def sources(setting: str | Sequence[str], split: str) -> list[Source]:
    """The data sets of a setting in their order; the hub's are fetched where they are not here.

    Raises:
        UserError: As for `files_of`, or the hub has no such data set.
    """
    return [_source(name, split) for name in data_sets(setting)]


def with_split(setting: str | Sequence[str], split: str) -> list[str]:
    """Those of a setting's data sets that are folders with data for that split.

    Raises:
        UserError: The hub has no such data set.
    """
    return [name for name in data_sets(setting) if has_split(_located(name)[0], split)]


def size_here(setting: str | Sequence[str]) -> int | None:
    """Bytes of all files of a setting's data sets; None where one would have to be fetched.

    Raises:
        UserError: The hub's data set has no such file.
    """
    total = 0
    for name in data_sets(setting):
        path, _ = split_limit(name)
        folder = _snapshot(path.as_posix(), cached=True) if of_hub(path) else path
        if folder is None:
            return None
        files = [folder] if folder.is_file() else folder.rglob("*")
        total += sum(file.stat().st_size for file in files if file.is_file())
    return total


def _source(name: str, split: str) -> Source:
    (path, rows), (named, _) = _located(name), split_limit(name)
    if not of_hub(named):
        files = files_of(path, split)
        return Source(str(files[0] if len(files) == 1 else files[0].parent), files, rows)
    hub_id = named.as_posix()
    try:
        return Source(hub_id, files_of(path, split), rows)
    except UserError as error:  # it speaks of the cache
        raise UserError(str(error).replace(str(path), hub_id)) from error


def _located(name: str) -> tuple[Path, int | None]:
    path, rows = split_limit(name)
    if not of_hub(path):
        return path, rows
    return _fetched(path.as_posix()), rows


@functools.lru_cache(maxsize=64)
def _fetched(name: str) -> Path:
    """Where a data set of the hub is; of one process's answers all are of one commit."""
    folder = _snapshot(name, cached=False)
    assert folder is not None
    return folder


def _snapshot(name: str, *, cached: bool) -> Path | None:
    """Where a data set of the hub is in its cache.

    Args:
        name: Its id, perhaps with a folder or file in it: `owner/name/folder`.
        cached: Fetch nothing; None where it is not there.

    Raises:
        UserError: There is no such data set, the hub cannot be reached, or nothing in it can be
            read.
    """
    from huggingface_hub import snapshot_download

    owner, repository, *parts = name.split("/")
    repo, inside = f"{owner}/{repository}", "/".join(parts)
    patterns = [inside, *(f"{inside}/*{suffix}" for suffix in DATA_SUFFIXES)]
    missing = f"the dataset {name} does not exist: no file or folder is there"
    with hub_errors.told(missing, f"no data set {repo}"):
        try:
            snapshot = snapshot_download(
                repo, repo_type="dataset", local_files_only=cached,
                allow_patterns=patterns if inside else [f"*{suffix}" for suffix in DATA_SUFFIXES],
                tqdm_class=download_bar(f"downloading {name}"),
            )  # fmt: skip
        except OSError:
            if cached:
                return None
            raise
    path = Path(snapshot, inside)
    if not exists(path) or not (path.is_file() or any(_readable(path))):
        raise UserError(
            f"the hub's data set {repo} has no file of {', '.join(DATA_SUFFIXES)}"
            + (f" at {inside}" if inside else "")
        )
    return path


def _readable(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.suffix.lower() in DATA_SUFFIXES]
