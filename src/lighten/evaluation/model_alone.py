"""A model that is measured as it is: a run's folder in which nothing is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lighten import runs
from lighten.errors import UserError
from lighten.machine import hardware
from lighten.recipe import EvaluateOptions, Recipe, aliases
from lighten.runs import Run


def recipe_of(model: str, options: Mapping[str, Any]) -> tuple[Recipe, dict[str, Any]]:
    """What a model is measured on.

    Args:
        model: As in a recipe.
        options: Settings of a recipe, `dataset` or `eval_dataset` among them, and of its `evaluate`
            section, by name.

    Returns:
        The recipe, and the settings of its `evaluate` section.

    Raises:
        UserError: No data are named, or a setting is none.
    """
    evaluate, others = dict[str, Any](), dict[str, Any]()
    for key, value in options.items():
        name = key.removeprefix("evaluate.")
        (evaluate if name in EvaluateOptions.model_fields else others)[key] = value
    named, _, _ = aliases.translate(others)
    if not {"dataset", "eval_dataset"} & set(named):
        raise UserError(
            f"{model} is not a run (see: lighten runs list); to measure it as a model, name the "
            "data: --dataset FILE_OR_FOLDER (what a training would hold out of it) or "
            "--eval_dataset FILE_OR_FOLDER (all of it)"
        )
    others.setdefault("dataset", named.get("dataset", named.get("eval_dataset")))
    recipe = Recipe.from_values({"model_name_or_path": model}, others)
    if recipe.output_dir is None:
        folder = Path("runs") / f"{recipe.name}-as-it-is"
        recipe = Recipe.from_values(
            {"model_name_or_path": model}, {**others, "output_dir": str(folder)}
        )
    return recipe, evaluate


@contextmanager
def run_of(recipe: Recipe) -> Iterator[Run]:
    """The run's folder, while its model is measured; nothing is left of one where that fails.

    Raises:
        UserError: The folder is somebody's, or a run that trains is in it.
    """
    commit, clean = hardware.commit()
    with runs.model_alone(recipe) as run:
        run.update(
            version=1, name=run.name, started=runs.now(), commit=commit, tree_clean=clean,
            machine=hardware.machine().to_dict(), versions=hardware.versions(),
        )  # fmt: skip
        yield run
        run.update(ended=runs.now())
