"""What the verbs take as a recipe: a file, settings, or a `Recipe`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lighten import path_checks
from lighten.errors import UserError
from lighten.path_checks import require_model
from lighten.paths import expanded
from lighten.recipe import Recipe
from lighten.runs import Run

RecipeLike = Recipe | Run | Mapping[str, Any] | str | os.PathLike[str]


def recipe_of(recipe: RecipeLike | None = None, **overrides: Any) -> Recipe:
    """A recipe from a file, a folder of one, a run, or from settings alone; overrides win.

    Raises:
        RecipeError: Every problem found.
        UserError: Nothing is there by that name.
    """
    if isinstance(recipe, Recipe):
        return recipe.changed(overrides) if overrides else recipe
    if recipe is None:
        return Recipe.from_values({}, overrides)
    if isinstance(recipe, Mapping):
        return Recipe.from_values(recipe, overrides)
    name = str(recipe.folder) if isinstance(recipe, Run) else os.fspath(recipe)
    if name.endswith((".yaml", ".yml")) or expanded(name).is_file():
        return Recipe.from_file(name, overrides)
    in_folder = path_checks.recipe_in(path_checks.run_folder(name))
    if in_folder is None:
        raise UserError(
            f"{name} is neither a recipe (recipe.yaml) nor a run's folder; a model and its data "
            f"are named as settings: model={name!r}, dataset=…"
        )
    of_folder, place = in_folder
    return recipe_of(of_folder, **{**place, **overrides})


def plannable(recipe: RecipeLike | None = None, **overrides: Any) -> Recipe:
    """A recipe to plan: like `recipe_of`, but settings alone need no data.

    Raises:
        RecipeError: Every problem found.
    """
    if recipe is None:
        overrides = {"dataset": "", **overrides}
    chosen = recipe_of(recipe, **overrides)
    require_model(chosen.model_name_or_path)
    return chosen
