"""Configs of a data set: which files its card, `README.md`, says that it has, by name and split.

Source: huggingface.co/docs/hub/datasets-manual-configuration; which one is the default is as in
the library `datasets`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

CARD = "README.md"
_FENCE = "---"


@dataclass(frozen=True)
class Config:
    """One of a data set's configs.

    Attributes:
        name: Unique in the card.
        splits: Patterns of files by split, as seen from the card's folder; empty where files are
            told by their names.
        folder: All of its files are in; empty: the card's own.
        default: The card marks it so.
    """

    name: str
    splits: dict[str, tuple[str, ...]] = field(default_factory=dict)
    folder: str = ""
    default: bool = False


def configs_of(folder: Path) -> dict[str, Config]:
    """The configs that the card in a folder names; none where there is no card that can be read."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return {}
    lines = text.splitlines()
    if not lines or lines[0].strip() != _FENCE or _FENCE not in lines[1:]:
        return {}
    try:
        card = yaml.safe_load("\n".join(lines[1 : lines.index(_FENCE, 1)]))
    except yaml.YAMLError:  # files are told by their names then
        return {}
    entries = card.get("configs") if isinstance(card, Mapping) else None
    configs = [
        _config(entry)
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, Mapping) and entry.get("config_name") is not None
    ]
    return {config.name: config for config in configs}


def default_of(configs: Mapping[str, Config]) -> Config | None:
    """The config that is meant where none is named: the only one, or the one marked so."""
    marked = [c for c in configs.values() if c.default or c.name == "default" or len(configs) == 1]
    return marked[0] if len(marked) == 1 else None


def _config(entry: Mapping[str, Any]) -> Config:
    folder = str(entry.get("data_dir") or "").strip("/")
    files, splits = entry.get("data_files"), dict[str, tuple[str, ...]]()
    if isinstance(files, Mapping):
        files = [{"split": split, "path": paths} for split, paths in files.items()]
    for item in files if isinstance(files, list) else [files]:
        split, paths = ("train", item)
        if isinstance(item, Mapping):
            split, paths = str(item.get("split", "train")), item.get("path")
        patterns = paths if isinstance(paths, list) else [paths]
        inside = [f"{folder}/{p}" if folder else p for p in patterns if isinstance(p, str)]
        if inside:
            splits[split] = (*splits.get(split, ()), *inside)
    return Config(str(entry["config_name"]), splits, folder, entry.get("default") is True)
