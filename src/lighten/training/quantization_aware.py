"""Quantisation-aware training: what is tried before it, and what is compared after it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lighten.adapters import Cohort, Trained
from lighten.adapters.fake_quant import (
    FakeQuantLinear,
    fake_layers,
    really_quantised,
    rows_that_suit,
    standing_in,
)
from lighten.adapters.layers import CohortLinear
from lighten.errors import UserError, require_package
from lighten.models.describe import skeleton
from lighten.models.stored import stored_as
from lighten.recipe import Recipe
from lighten.wording import first_line

# Products summed in another order differ by a few roundings of the format.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
TRIED_ROWS = 4


def require(recipe: Recipe, folder: Path) -> None:
    """What the settings, the packages and the base's configuration say against it.

    Args:
        recipe: What is wanted.
        folder: Of the base; its configuration alone is read.

    Raises:
        UserError: The base is quantised already, or its shapes do not suit.
        MissingExtra: torchao is not installed.
    """
    if recipe.qat is None:
        return
    require_package("torchao", "quantize")
    quantization = stored_as(folder) if folder.is_dir() else None
    if quantization is not None:
        raise UserError(
            f"qat: {recipe.model_name_or_path} is quantised already "
            f"({quantization.get('quant_method', 'unknown method')}), and its rounded weights "
            "would be rounded anew; take the model it was made from, or leave qat out"
        )
    model = skeleton(
        recipe.model_name_or_path, revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
    )  # fmt: skip
    rows_that_suit(model, model.get_output_embeddings(), recipe.qat_group_size)


@torch.no_grad()
def try_conversion(model: PreTrainedModel) -> float:
    """Convert one layer for real and compare it with how it computes in training.

    Returns:
        The largest difference of outputs, as a share of the largest output.

    Raises:
        UserError: The conversion fails, or gives another layer than the one that would be trained.
    """
    path, layer = next(iter(fake_layers(model).items()))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TRIED_ROWS, layer.in_features, generator=generator)
    x = x.to(layer.weight.device, layer.computes)
    advice = "lighten quantize could not convert what would be trained; leave qat out"
    try:
        converted = really_quantised(layer)(x)
    except Exception as error:  # a library's; whatever it is, it would come after the training
        raise UserError(
            f"qat: torchao cannot convert {path} ({first_line(error)}), so {advice}"
        ) from error
    trained = FakeQuantLinear._product(layer, x)
    largest = float(trained.abs().max())
    difference = float((trained.float() - converted.float()).abs().max()) / max(largest, 1e-30)
    if not difference <= TOLERANCE[layer.computes]:
        raise UserError(
            f"qat: torchao converts {path} to another layer than the one that would be trained "
            f"(outputs differ by {difference:.1%}), so {advice}"
        )
    return difference


@torch.no_grad()
def agreement(trained: Trained, name: str, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The model as it was trained against the same one converted for real, on the same tokens.

    Args:
        trained: What was trained.
        name: Which of it.
        rows: Token ids; each row goes through alone.

    Returns:
        Largest and mean difference of log-probabilities in nats, how often the likeliest token is
        the same, on how many tokens, how many layers were converted, and the seconds it took.
    """
    began = time.perf_counter()
    with trained.using(name) as model:
        fake = [_log_probabilities(model, row) for row in rows]
        converted = _converted(trained, name)
        with standing_in(model, converted):
            real = [_log_probabilities(model, row) for row in rows]
    largest, total, matches, tokens = 0.0, 0.0, 0, 0
    for fake_row, real_row in zip(fake, real, strict=True):
        largest = max(largest, float((fake_row - real_row).abs().max()))
        total += float((fake_row - real_row).abs().mean(-1).sum())
        matches += int((fake_row.argmax(-1) == real_row.argmax(-1)).sum())
        tokens += len(fake_row)
    return {
        "largest_difference": largest,
        "mean_difference": total / tokens,
        "top1_agreement": matches / tokens,
        "tokens": tokens,
        "layers": len(converted),
        "seconds": time.perf_counter() - began,
    }


def _converted(trained: Trained, name: str) -> dict[str, nn.Module]:
    """Every layer as torchao makes it, by the path where it stands."""
    converted: dict[str, nn.Module] = {}
    for path, layer in fake_layers(trained.model).items():
        if path.endswith(".base") and isinstance(trained, Cohort):
            path = path.removesuffix(".base")
            around = trained.linears[path]
            converted[path] = really_quantised(layer, _merged(around, name))
        else:
            converted[path] = really_quantised(layer)
    return converted


def _merged(layer: CohortLinear, name: str) -> Tensor:
    weight: Tensor = layer.fused(name).weight  # type: ignore[assignment]
    return weight


def _log_probabilities(model: PreTrainedModel, row: Sequence[int]) -> Tensor:
    ids = torch.tensor([list(row)], device=model.device)
    return torch.log_softmax(model(input_ids=ids).logits[0].float(), -1)
