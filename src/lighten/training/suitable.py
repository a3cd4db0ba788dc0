"""What is known against training on a base before anything of it is loaded."""

from __future__ import annotations

from lighten.models.load import locate
from lighten.models.trainable import refuse_rounded_activations
from lighten.recipe import Recipe
from lighten.training import quantization_aware


def require_trainable(recipe: Recipe) -> None:
    """What a base's configuration alone says against training on it.

    Raises:
        UserError: Its layers pass no gradient on, or qat does not suit them.
        MissingExtra: qat is wanted without torchao.
    """
    source, folder = locate(
        recipe.model_name_or_path, revision=recipe.revision, weights=False,
        code=recipe.trust_remote_code,
    )  # fmt: skip
    if source != "gguf":
        refuse_rounded_activations(recipe.model_name_or_path, folder)
    quantization_aware.require(recipe, folder)
