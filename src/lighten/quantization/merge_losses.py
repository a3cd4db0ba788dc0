"""What an adapter that learnt on a quantised base loses on the original weights, and on those.

Merged, it computes what it computes unmerged on the same weights, so neither model is written for
the measurement (trap 30).
"""

from __future__ import annotations

from typing import Any

from lighten import adapters, models
from lighten.artifacts import Artefact
from lighten.errors import UserError
from lighten.evaluation.evaluation import held_out_examples
from lighten.evaluation.likelihood import measure_loss
from lighten.training import held_out_data
from lighten.training.base import load_base

ROWS = 64  # at most: two models are loaded and measured


def held_out_losses(artefact: Artefact) -> dict[str, dict[str, Any]] | None:
    """Held-out loss of the adapter by the weights that it is on.

    Args:
        artefact: An adapter of a run whose base was quantised.

    Returns:
        Under `original` and `dequantized` the `loss` (nats per token), its `standard_error` and
        the number of `rows`; None where nothing is held out.
    """
    assert artefact.run is not None
    assert artefact.adapter is not None
    recipe = artefact.run.recipe()
    try:
        examples = held_out_examples(recipe, artefact.facts.get("data_sha256"))
    except UserError:
        return None  # gone or changed since: the artefact is written all the same
    losses = {}
    for onto, settings in {"original": {key: False for key in artefact.quantization
                                        if key.startswith("load_in")},
                           "dequantized": {}}.items():  # fmt: skip
        variant = recipe.model_copy(update=settings)
        base = load_base(variant, "cpu")
        trained = adapters.load(base.model, {"adapter": artefact.adapter})
        limits = models.limits_of(base.model)
        rows = held_out_data.encoded(variant, examples, base.tokenizer, limits, ROWS, None).rows
        assert rows is not None
        validation = measure_loss(base, trained, rows.rows, "adapter", variant)
        losses[onto] = {
            "loss": validation.loss, "standard_error": validation.standard_error,
            "rows": len(validation.nll),
        }  # fmt: skip
        del base, trained
    return losses
