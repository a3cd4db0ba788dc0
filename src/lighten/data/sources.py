"""The data sets that a setting names: files and folders here, or the hub's by their ids."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lighten import hub_errors
from lighten.data.files import files_of, has_split, matching
from lighten.data_card import CARD, Config, configs_of, default_of
from lighten.errors import UserError
from lighten.paths import DATA_SUFFIXES, config_of, data_sets, exists, of_hub, split_limit
from lighten.streams import download_bar

SHOWN = 10  # names of configs in an error


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
    return [name for name in data_sets(setting) if _has_split(name, split)]


def size_here(setting: str | Sequence[str]) -> int | None:
    """Bytes of all files of a setting's data sets; None where one would have to be fetched.

    Raises:
        UserError: The hub's data set has no such file.
    """
    total = 0
    for name in data_sets(setting):
        path, _ = split_limit(name)
        place = _snapshot(path.as_posix(), cached=True) if of_hub(path) else _here(path)
        if place is None:
            return None
        folder, config = place
        if config is not None and config.splits:
            files = matching(folder, [p for patterns in config.splits.values() for p in patterns])
        else:
            folder = folder if config is None else folder / config.folder
            files = [folder] if folder.is_file() else list(folder.rglob("*"))
        total += sum(file.stat().st_size for file in files if file.is_file())
    return total


def _source(name: str, split: str) -> Source:
    (path, config), (named, rows) = _located(name), split_limit(name)
    if not of_hub(named):
        files = files_of(path, split, config)
        return Source(str(files[0] if len(files) == 1 else files[0].parent), files, rows)
    hub_id = named.as_posix()
    try:
        return Source(hub_id, files_of(path, split, config), rows)
    except UserError as error:  # it speaks of the cache
        raise UserError(str(error).replace(str(path), hub_id)) from error


def _has_split(name: str, split: str) -> bool:
    path, config = _located(name)
    return has_split(path, split, config)


def _located(name: str) -> tuple[Path, Config | None]:
    """Where a data set is, and which of its configs is meant."""
    path, _ = split_limit(name)
    return _fetched(path.as_posix()) if of_hub(path) else _here(path)


def _here(path: Path) -> tuple[Path, Config | None]:
    if (config := config_of(path)) is not None:
        return path.parent, configs_of(path.parent)[config]
    return path, _default(configs_of(path), str(path)) if path.is_dir() else None


def _default(configs: Mapping[str, Config], name: str) -> Config | None:
    """The config that is meant where none is named; None: the card has none.

    Raises:
        UserError: Several could be.
    """
    config = default_of(configs)
    if configs and config is None:
        names = list(configs)
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise UserError(
            f"{name} has the configs {', '.join(names[:SHOWN])}{more}; name one: {name}/{names[0]} "
            f"(or subset: {names[0]})"
        )
    return config


@functools.lru_cache(maxsize=64)
def _fetched(name: str) -> tuple[Path, Config | None]:
    """Where a data set of the hub is; of one process's answers all are of one commit."""
    place = _snapshot(name, cached=False)
    assert place is not None
    return place


def _snapshot(name: str, *, cached: bool) -> tuple[Path, Config | None] | None:
    """Where a data set of the hub is in its cache, and which of its configs is meant.

    Args:
        name: Its id, perhaps with a config, folder or file of it: `owner/name/folder`.
        cached: Fetch nothing; None where it is not there.

    Raises:
        UserError: There is no such data set, the hub cannot be reached, nothing in it can be read,
            or several configs could be meant.
    """
    from huggingface_hub import snapshot_download

    owner, repository, *parts = name.split("/")
    repo, inside = f"{owner}/{repository}", "/".join(parts)
    missing = f"the dataset {name} does not exist: no file or folder is there"

    def fetched(patterns: list[str], revision: str | None = None) -> Path:
        return Path(snapshot_download(
            repo, repo_type="dataset", local_files_only=cached, allow_patterns=patterns,
            revision=revision, tqdm_class=download_bar(f"downloading {name}"),
        ))  # fmt: skip

    with hub_errors.explained(missing, f"no data set {repo}"):
        try:
            card = fetched([CARD])
            configs = configs_of(card)
            config = configs.get(inside) if inside else _default(configs, repo)
            inside = "" if config is not None else inside
            snapshot = fetched(_patterns(inside, config), card.name)
        except OSError:
            if cached:
                return None
            raise
    path = snapshot / inside
    if not exists(path) or not (path.is_file() or any(_readable(path))):
        raise UserError(
            f"the hub's data set {repo} has no file of {', '.join(DATA_SUFFIXES)}"
            + (f" at {inside}" if inside else "")
        )
    return path, config


def _patterns(inside: str, config: Config | None) -> list[str]:
    """What of a data set is fetched, in patterns whose `*` may be in several folders."""
    if config is not None and config.splits:
        return [pattern.replace("**/", "*").removeprefix("./")
                for patterns in config.splits.values() for pattern in patterns]  # fmt: skip
    inside = config.folder if config is not None else inside
    everything = [f"{inside}/*{suffix}" if inside else f"*{suffix}" for suffix in DATA_SUFFIXES]
    return [inside, *everything] if inside else everything


def _readable(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.suffix.lower() in DATA_SUFFIXES]
