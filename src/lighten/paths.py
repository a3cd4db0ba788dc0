"""Paths as people write them: `~`, `name#500` for the first 500 rows, a config of a data set."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from lighten.data_card import CARD, configs_of
from lighten.errors import UserError

DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
# owner/name, and perhaps a folder or file in it.
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(?P<inside>/.+)?", flags=re.ASCII)


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


def data_sets(setting: str | Sequence[str]) -> list[str]:
    """The data sets that a setting names: one, or several."""
    return [setting] if isinstance(setting, str) else list(setting)


def several(text: str, folder: Path | None = None) -> str | list[str]:
    """`a.jsonl,b.jsonl` as a list, unless that is the name of one data set.

    Args:
        text: A data set, or several with commas between.
        folder: Where it may be too.
    """
    wholes = [text] if folder is None else [text, str(folder / text)]
    if "," not in text or any(exists(split_limit(whole)[0]) for whole in wholes):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]


def limited(text: str, most: int) -> str:
    """A data set with so many rows at most."""
    _, rows = split_limit(text)
    if rows is None:
        return f"{text}#{most}"
    return f"{text.rpartition('#')[0]}#{min(rows, most)}"


def config_of(path: Path) -> str | None:
    """The config that a path names in place of a file: `data/en`, where `data` has a card."""
    has_card = exists(path.parent / CARD)
    return path.name if has_card and path.name in configs_of(path.parent) else None


def with_config(text: str, config: str) -> str:
    """A data set with one of its configs."""
    if split_limit(text)[1] is None:
        return f"{text.rstrip('/')}/{config}"
    name, _, rows = text.rpartition("#")
    return f"{name.rstrip('/')}/{config}#{rows}"


def data_names(setting: str | Sequence[str]) -> str:
    """What its data sets are called, for people."""
    names = data_sets(setting)
    return ", ".join(name if of_hub(split_limit(name)[0]) else Path(name).name for name in names)


def data_label(setting: str | Sequence[str]) -> str:
    """What a folder is called after its data sets."""
    first, *others = data_sets(setting)
    path, _ = split_limit(first)
    name = path.stem if path.suffix.lower() in DATA_SUFFIXES else named(path).name
    return f"{name}-and-{len(others)}-more" if others else name


def of_hub(path: Path) -> bool:
    """Whether a data set's path, where nothing is, may be an id on the hub instead of a mistake."""
    match = _HUB_ID.fullmatch(path.as_posix())
    if match is None or (match["inside"] is None and path.suffix.lower() in DATA_SUFFIXES):
        return False
    return not is_here(path)


def is_here(path: Path) -> bool:
    """Whether a data set's file, folder or config is there."""
    return exists(path) or config_of(path) is not None


def may_be_data(name: str) -> bool:
    """Whether a data set is there, or may be on the hub."""
    path, _ = split_limit(name)
    return is_here(path) or of_hub(path)


def may_have_splits(setting: str | Sequence[str]) -> bool:
    """Whether a data set is no single file; the hub's are looked at once they are fetched."""
    paths = [split_limit(name)[0] for name in data_sets(setting)]
    return any(of_hub(path) or (is_here(path) and not path.is_file()) for path in paths)


def named(path: Path) -> Path:
    """The path; of `.` and `..`, whose last part names nothing, the whole one of that folder."""
    return path if path.name not in ("", "..") else Path(os.path.abspath(path))


def name_of(folder: Path) -> str:
    """A folder's name; of one in the hub's cache, which are called by commits, that on the hub."""
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name


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
