"""What can be looked at before anything heavy is loaded: whether paths lead anywhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lighten.errors import UserError
from lighten.paths import exists
from lighten.paths import expanded as expanded
from lighten.peft_config import CONFIG, is_adapter, read_config
from lighten.recipe import Recipe
from lighten.runs import RECIPE, Run, folder_of
from lighten.runs import is_run as is_begun
from lighten.wording import typed

RunLike = Run | str | os.PathLike[str]


def text_of(source: RunLike) -> str:
    """A run's folder, or whatever else names a model, as text."""
    return str(source.folder) if isinstance(source, Run) else os.fspath(source)


def require_model(name: str) -> None:
    """A local model is there.

    Args:
        name: As in a recipe; a hub id is not looked up.

    Raises:
        UserError: Nothing has that name.
    """
    from lighten.models.names import resolve

    resolve(name)


def require_answerable(target: str) -> None:
    """There is a run or a model to talk to.

    Raises:
        UserError: Neither is there.
    """
    if not is_run(target):
        require_model(target)


def require_base(name: str) -> None:
    """There is a model that adapters are served over, or a run of one.

    Raises:
        UserError: There is not, or it is an adapter.
    """
    if is_adapter(expanded(name)):
        base = read_config(expanded(name)).get("base_model_name_or_path") or "BASE"
        raise UserError(
            f"{name} is an adapter; serve its base with it: lighten serve {typed(str(base))} "
            f"--adapters {typed(name)}"
        )
    require_answerable(name)


def is_run(target: str) -> bool:
    """Whether a run lies in that folder, or under `runs/` by that name."""
    return folder_of(target) is not None


def named_run(source: RunLike) -> RunLike:
    """A run from its name under `runs/`; anything else, and what has that name here, as it is."""
    if isinstance(source, Run) or exists(expanded(os.fspath(source))):
        return source
    return folder_of(os.fspath(source)) or source


def source_of(source: RunLike) -> Run | str:
    """A run from its folder or its name under `runs/`, a model or an adapter by its own name.

    Raises:
        UserError: Nothing is there.
    """
    target = source if isinstance(source, Run) else os.fspath(source)
    if isinstance(target, Run) or exists(expanded(target) / CONFIG):
        return target
    require_answerable(target)
    folder, path = folder_of(target), expanded(target)
    return target if folder is None or (folder != path and exists(path)) else str(folder)


def finished(recipe: Recipe, *, resume: bool, announce: bool) -> Run | None:
    """The run, where it is to be resumed and has nothing left to do.

    Args:
        recipe: What shall be trained.
        resume: A run in its folder goes on.
        announce: Say on standard error that it is finished.

    Raises:
        UserError: The model is not there, or the run's folder cannot be used.
    """
    require_model(recipe.model_name_or_path)
    folder = recipe.run_folder
    if os.environ.get("RANK", "0") == "0":  # another rank may see what this one has begun
        Run.before(recipe, resume=resume)
    if not (resume and exists(folder / RECIPE) and Run(folder).is_finished()):
        return None
    if announce:
        from lighten.training.progress import TrainingProgress

        TrainingProgress().note(
            f"{folder} is finished: nothing is left to train; choose another --output_dir for a "
            "new run"
        )
    return Run(folder)


def run_of(run: RunLike) -> Run:
    """A run from its folder, or from its name under `runs/`.

    Raises:
        UserError: There is no such run.
    """
    return run if isinstance(run, Run) else Run(run_folder(os.fspath(run)))


def run_folder(name: str) -> Path:
    """The folder that a run's path or its name under `runs/` means; it need not be there."""
    return folder_of(name) or expanded(name)


def is_recipe(name: str) -> bool:
    """Whether that is a recipe's file or a folder with one; a name under `runs/` may be a model."""
    return name.endswith((".yaml", ".yml")) or exists(expanded(name) / RECIPE)


def recipe_in(folder: Path) -> tuple[Recipe | Path, dict[str, Any]] | None:
    """What a folder's recipe says, or its file, and where its run goes; None without one.

    Relative paths of a run's own recipe are those of where it was started, and its folder is that
    of the run; the file of a project leaves it open.
    """
    if not exists(folder / RECIPE):
        return None
    if not is_begun(folder):
        return folder / RECIPE, {}
    return Run(folder).recipe(), {"output_dir": str(folder)}


def adapter_folder(target: RunLike, name: str | None = None) -> Path:
    """Folder of an adapter: of one that stands by itself, or of a run's (by name, or its only one).

    Raises:
        UserError: There is none, or there are several and none is named.
    """
    if not isinstance(target, Run):
        folder = expanded(os.fspath(target))
        if exists(folder / CONFIG):
            return folder
    run = run_of(target)
    folders = run.adapters()
    if not folders:
        if run.model() is not None:
            raise UserError(f"{run.folder} trained a whole model and has no adapter")
        raise run.untrained("no adapter")
    if name is None and len(folders) > 1:
        raise UserError(
            f"{run.folder} has several adapters; name one: --adapter {typed(min(folders))}"
        )
    if name is not None and name not in folders:
        raise UserError(
            f"{run.folder} has no adapter {name!r}; it has {', '.join(sorted(folders))}"
        )
    return folders[name] if name is not None else next(iter(folders.values()))
