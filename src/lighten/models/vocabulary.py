"""Rows of a model's word embeddings for tokens that it did not have."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def grow(model: PreTrainedModel, rows: int) -> None:
    """Give a model rows up to a number, each the mean of those there were; it may have more.

    Args:
        model: Whose embeddings and head; nothing of it wants a gradient then.
        rows: So many at least.
    """
    size = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    if rows <= size:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
            weight: torch.Tensor = layer.weight
            weight[size:] = weight[:size].float().mean(0).to(weight.dtype)
    model.requires_grad_(False)
