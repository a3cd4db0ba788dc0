"""Which files hold a split: one file, or all shards of it in a folder as the hub has them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lighten.data_card import Config
from lighten.errors import UserError
from lighten.paths import DATA_SUFFIXES, exists

SPLITS = {"train": ("train", "training"),
          "valid": ("valid", "validation", "val", "dev", "eval"),
          "test": ("test", "testing")}  # fmt: skip
_SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}
# Files that the hub and `datasets` put beside the data.
_BESIDE = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json",
           "config.json", "metadata.json"}  # fmt: skip
# What to do with files of kinds that are not read.
_MENDS = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save the sheet as CSV in UTF-8"),
    **dict.fromkeys((".gz", ".zip", ".zst", ".bz2", ".xz", ".7z"), "unpack it"),
    ".txt": 'write each text as a line of JSON: {"text": "..."}',
}
# folder/config/data/train/part.parquet is as deep as the hub's layouts go.
_DEPTH = 3
_NUMBERED = re.compile(r"(?P<stem>.*?)[-_.]?(?P<number>\d+)(?:-of-(?P<total>\d+))?$")


@dataclass(frozen=True)
class _Candidate:
    """A data file of a folder.

    Attributes:
        path: The file.
        split: The split that its name or its folder's says, or None.
        exact: The name says the split and a shard's number, nothing else.
        group: What the shards of one data set have in common.
        number: Its shard number.
        total: How many shards its name speaks of.
    """

    path: Path
    split: str | None
    exact: bool
    group: tuple[str, ...]
    number: int | None
    total: int | None


def files_of(path: Path, split: str, config: Config | None = None) -> list[Path]:
    """The files of a dataset path: itself, or every shard of a folder's split in order.

    Args:
        path: A file or a folder.
        split: Which data of a folder.
        config: Which of the configs that a folder's card names; None: files say by their names what
            they are.

    Raises:
        UserError: Nothing there, a kind of file that is not read, a shard that is missing, or
            several files that could each be meant.
    """
    if config is not None and config.splits:
        return _files_of_config(path, split, config)
    path = path if config is None else path / config.folder
    if exists(path) and path.is_dir():
        groups = _groups(path, split)
        if not groups:
            expected = " or ".join(f"{split}{suffix}" for suffix in DATA_SUFFIXES)
            others = sorted(file for file in path.iterdir() if file.suffix.lower() in _MENDS)
            raise UserError(
                f"the folder {path} has no {split} file ({expected})"
                + (f"; of {others[0].name}: {_MENDS[others[0].suffix.lower()]}" if others else "")
            )
        if len(groups) > 1:
            first, second = groups[0][0].path, groups[1][0].path
            and_more = f" and {len(groups) - 2} more" if len(groups) > 2 else ""
            raise UserError(
                f"{first} and {second}{and_more} could each be the {split} data of {path}; "
                "name the file, or move the others away"
            )
        return _complete_paths(groups[0])
    if not exists(path) or not path.is_file():
        raise UserError(f"the dataset {path} does not exist")
    if path.suffix.lower() not in DATA_SUFFIXES:
        raise UserError(_unread(path))
    return [path]


def has_split(folder: Path, split: str, config: Config | None = None) -> bool:
    """Whether a path is a folder with data for that split."""
    if config is not None and config.splits:
        return bool(_splits_of(config, split))
    folder = folder if config is None else folder / config.folder
    return exists(folder) and folder.is_dir() and bool(_groups(folder, split))


def _files_of_config(folder: Path, split: str, config: Config) -> list[Path]:
    """The files that a card names as a config's split."""
    names, where = _splits_of(config, split), f"the config {config.name} of {folder}"
    if not names:
        raise UserError(
            f"{where} has no {split} data; its splits are {', '.join(config.splits)}: name the "
            "file itself"
        )
    if len(names) > 1:
        raise UserError(
            f"{' and '.join(names[:2])} could each be the {split} data of {where}; name the file "
            "itself"
        )
    patterns = config.splits[names[0]]
    files = matching(folder, patterns)
    if not files:
        raise UserError(f"{where}: its card names {', '.join(patterns)}, and no such file is there")
    if unread := [file for file in files if file.suffix.lower() not in DATA_SUFFIXES]:
        raise UserError(_unread(unread[0]))
    return files


def _unread(file: Path) -> str:
    """Why a file is not read, and what to do with it."""
    mend = _MENDS.get(file.suffix.lower())
    return f"{file} is not one of {', '.join(DATA_SUFFIXES)}{f'; {mend}' if mend else ''}"


def _splits_of(config: Config, split: str) -> list[str]:
    """The names that a config has for a split: `validation`, or `test_sft`."""
    said = {name: _SPLIT_OF.get(name.lower()) for name in config.splits}
    if exact := [name for name, meant in said.items() if meant == split]:
        return exact
    words = {name: re.split(r"[-_. ]", name.lower()) for name in config.splits}
    loose = [name for name in words if any(_SPLIT_OF.get(word) == split for word in words[name])]
    if loose or split != "train" or len(said) > 1:
        return loose
    return [name for name in said if not any(word in _SPLIT_OF for word in words[name])]


def matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files of a folder that patterns of a card name, pattern by pattern, shards in order."""
    names = [
        (Path(place) / name).relative_to(folder).as_posix()
        for place, _, names_there in os.walk(folder)
        for name in names_there
        if not name.startswith(".")
    ]
    names.sort(key=_natural)
    matched = {
        name: None for pattern in patterns for name in names if _pattern(pattern).fullmatch(name)
    }
    return [folder / name for name in matched]


def _pattern(text: str) -> re.Pattern[str]:
    """A card's pattern: `*` stays in its folder, `**` does not."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", text.removeprefix("./"))
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile(
        "".join(
            known.get(part) or (part if part.startswith("[") else re.escape(part)) for part in parts
        )
    )


def checksum(files: Sequence[Path]) -> str:
    """SHA-256 over the bytes of all files, in order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class Content:
    """What files held when they were looked at.

    Attributes:
        files: Which.
        stamps: Size, time of the last change and place on the disk of each, as it was before.
        sha256: Of the bytes of all files, in order.
    """

    files: tuple[Path, ...]
    stamps: tuple[tuple[int, int, int], ...]
    sha256: str

    @classmethod
    def of(cls, files: Sequence[Path]) -> Content:
        """What they hold now.

        Raises:
            UserError: One cannot be read.
        """
        try:
            stamps = tuple(map(_stamp, files))
            return cls(tuple(files), stamps, checksum(files))
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror or error}") from error

    def require_unchanged(self) -> None:
        """The files hold the same still, so that what was read meanwhile is what they held.

        Raises:
            UserError: One has changed.
        """
        for file, before in zip(self.files, self.stamps, strict=True):
            try:
                if _stamp(file) == before:
                    continue
            except OSError:
                break
            if checksum(self.files) == self.sha256:  # touched, and written as it was
                return
            break
        else:
            return
        raise UserError(f"{file} has changed while it was read; start again once it is whole")


def _stamp(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _groups(folder: Path, split: str) -> list[list[_Candidate]]:
    """Sets of shards that could each be the split, each in the order of its numbers."""
    candidates = list(_candidates(folder))
    matching = [candidate for candidate in candidates if candidate.split == split]
    if not matching and split == "train" and not any(candidate.split for candidate in candidates):
        matching = candidates  # a folder that speaks of no split holds training data
    if any(candidate.exact for candidate in matching):
        matching = [candidate for candidate in matching if candidate.exact]
    groups: dict[tuple[str, ...], list[_Candidate]] = {}
    for candidate in matching:
        groups.setdefault(candidate.group, []).append(candidate)
    return [
        sorted(groups[key], key=lambda candidate: _natural(candidate.path.name))
        for key in sorted(groups)
    ]


def _candidates(folder: Path) -> Iterator[_Candidate]:
    for place, folders, names in os.walk(folder):
        inside = Path(place).relative_to(folder).parts
        visible = [name for name in folders if not name.startswith((".", "_"))]
        folders[:] = sorted(visible) if len(inside) < _DEPTH else []
        for name in sorted(names):
            path = Path(place) / name
            if (
                path.suffix.lower() in DATA_SUFFIXES
                and name.lower() not in _BESIDE
                and not name.startswith((".", "_"))
            ):
                yield _candidate(path, inside)


def _candidate(path: Path, inside: tuple[str, ...]) -> _Candidate:
    stem, suffix = path.stem.lower(), path.suffix.lower()
    numbered = _NUMBERED.match(stem)
    number = total = None
    base_name = stem
    if numbered is not None:
        base_name, number = numbered["stem"], int(numbered["number"])
        total = None if numbered["total"] is None else int(numbered["total"])
    parent = str(path.parent)
    split_name = _SPLIT_OF.get(base_name)
    if split_name is not None:
        group = (parent, base_name, suffix, "" if number is None else "#", str(total))
        return _Candidate(path, split_name, True, group, number, total)
    folder_split = next((_SPLIT_OF[part.lower()] for part in reversed(inside)
                         if part.lower() in _SPLIT_OF), None)  # fmt: skip
    if folder_split is not None:  # all files of a folder `train` are its shards, by any name
        return _Candidate(path, folder_split, True, (parent, suffix, str(total)), number, total)
    words = re.split(r"[-_. ]", base_name)
    split_name = next((_SPLIT_OF[word] for word in words if word in _SPLIT_OF), None)
    return _Candidate(
        path, split_name, False, (parent, base_name, suffix, str(total)), number, total
    )


def _complete_paths(group: list[_Candidate]) -> list[Path]:
    """The group's paths, if none of the shards that their names count is missing."""
    total = group[0].total
    numbers = {candidate.number for candidate in group}
    if total is not None:
        first = 0 if 0 in numbers or total not in numbers else 1
        missing = [n for n in range(first, first + total) if n not in numbers]
        if missing:
            raise UserError(
                f"{len(missing)} of {total} shards beside {group[0].path} "
                f"{'is' if len(missing) == 1 else 'are'} missing (number "
                f"{', '.join(map(str, missing[:5]))}{', …' if len(missing) > 5 else ''}); "
                "download the folder again"
            )
    return [candidate.path for candidate in group]


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts part-2 before part-10."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", name)]
