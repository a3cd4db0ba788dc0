"""What the verbs take as a recipe: a file, settings, or a `Recipe`."""

from __future__ import annotations

import os
from typing import Any

from lighten.path_checks import require_model
from lighten.recipe import Recipe

RecipeLike = Recipe | str | os.PathLike[str]


def recipe_of(recipe: RecipeLike | None = None, **overrides: Any) -> Recipe:
    """A recipe from a file or from settings alone; overrides win.

    Raises:
        RecipeError: Every problem found.
    """
    if isinstance(recipe, Recipe):
        return recipe.changed(overrides) if overrides else recipe
    if recipe is None:
        return Recipe.from_values({}, overrides)
    return Recipe.from_file(os.fspath(recipe), overrides)


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
