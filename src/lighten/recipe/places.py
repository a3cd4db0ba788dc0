"""Where relative paths of a recipe lie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lighten.paths import exists, expanded, split_limit

_LIMITED = ("dataset", "eval_dataset")  # may end in `#ROWS`
_PATHS = (*_LIMITED, "model_name_or_path", "adapter_name_or_path", "chat_template")


def beside(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Settings whose relative paths are those in a folder, where something is there.

    Args:
        settings: Of a recipe.
        folder: That holds the recipe's file.
    """
    return {**settings, **{name: within(name, settings[name], folder) for name in _said(settings)}}


def above(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Settings whose relative paths are found from wherever a run is opened.

    They were said in the folder where it was started, which is above the run's in most projects.
    What is in the working directory comes first.

    Args:
        settings: Of the run's recipe.
        folder: The run's.
    """
    paths = {}
    for name in _said(settings):
        value = settings[name]
        if not exists(_path(name, value)[0]):
            places = (within(name, value, parent) for parent in folder.resolve().parents)
            paths[name] = next((place for place in places if place != value), value)
    return {**settings, **paths}


def _said(settings: Mapping[str, Any]) -> list[str]:
    return [name for name in _PATHS if isinstance(settings.get(name), str)]


def _path(name: str, value: str) -> tuple[Path, int | None]:
    return split_limit(value) if name in _LIMITED else (expanded(value), None)


def within(name: str, value: str, folder: Path) -> str:
    """The path as seen from a folder if something is there.

    Args:
        name: Of the setting.
        value: Its path, as it was written.
        folder: Which.
    """
    if Path(value).expanduser().is_absolute():
        return value
    path, limit = _path(name, str(folder / value))
    candidate = f"{path}#{limit}" if limit is not None else str(path)
    return candidate if exists(path) else value
