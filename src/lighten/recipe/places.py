"""Where relative paths of a recipe lie."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lighten.paths import exists, expanded, is_here, split_limit

_LIMITED = ("dataset", "eval_dataset")  # may end in `#ROWS`
_PATHS = (*_LIMITED, "model_name_or_path", "adapter_name_or_path", "chat_template")
_OF_EVALUATE = ("forgetting", "include_path")


def beside(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Settings whose relative paths are those in a folder, where something is there.

    Args:
        settings: Of a recipe.
        folder: That holds the recipe's file.
    """
    return _placed(settings, lambda name, value: within(name, value, folder))


def above(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Settings whose relative paths are found from wherever a run is opened.

    They were said in the folder where it was started, which is above the run's in most projects.
    What is in the working directory comes first.

    Args:
        settings: Of the run's recipe.
        folder: The run's.
    """

    def place(name: str, value: str) -> str:
        if _is_there(name, _path(name, value)[0]):
            return value
        paths = (within(name, value, parent) for parent in folder.resolve().parents)
        return next((path for path in paths if path != value), value)

    return _placed(settings, place)


def _placed(settings: Mapping[str, Any], place: Callable[[str, str], str]) -> dict[str, Any]:
    """Settings with their paths as a function of name and value gives them."""

    def paths(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        placed = dict(values)
        for name in names:
            if isinstance(value := values.get(name), str):
                placed[name] = place(name, value)
            elif name in _LIMITED and isinstance(value, list):
                placed[name] = [
                    place(name, source) if isinstance(source, str) else source for source in value
                ]
        return placed

    placed = paths(settings, _PATHS)
    if isinstance(evaluate := settings.get("evaluate"), Mapping):
        placed["evaluate"] = paths(evaluate, _OF_EVALUATE)
    return placed


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
    return candidate if _is_there(name, path) else value


def _is_there(name: str, path: Path) -> bool:
    return is_here(path) if name in _LIMITED else exists(path)


def json_in(file: Path) -> Any:
    """What a JSON file holds that a setting names.

    Raises:
        ValueError: It cannot be read, or is not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error})") from error


def one_folder(setting: str, names: Sequence[str]) -> list[str]:
    """Names that file systems of macOS and Windows take for the same one, a sentence each.

    Args:
        setting: Whose.
        names: Of folders beside each other; those that are equal are not told.
    """
    problems = []
    folders: dict[str, str] = {}
    for name in dict.fromkeys(names):
        other = folders.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            problems.append(
                f"{setting}: {other!r} and {name!r} are one folder where a disk does not tell "
                "capitals, or ways to write a letter, apart; give one another name"
            )
    return problems
