"""Rows of training data that a rounding to few bits is chosen on."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from lighten.errors import UserError
from lighten.paths import data_names
from lighten.recipe import Recipe
from lighten.training.rows import load_rows

# Tokens of a row, and rows at most: what 2 cores work through in a minute or two.
ROW_TOKENS, ROWS = 256, 16
FEWEST_TOKENS = 16


class TooFewTokens(UserError):
    """There are not enough data to calibrate on."""


def calibration_rows(recipe: Recipe, tokenizer: Any) -> tuple[list[list[int]], dict[str, Any]]:
    """Rows of training data behind each other, cut into one length, and what is recorded of them.

    Args:
        recipe: Names the data.
        tokenizer: With its chat template chosen.

    Raises:
        UserError: The data cannot be read.
        TooFewTokens: There are next to none.
    """
    rows = load_rows(recipe, tokenizer).train.rows
    ids: list[int] = []
    for row in rows:
        ids.extend(int(token) for token in row.input_ids)
        if len(ids) >= ROW_TOKENS * ROWS:
            break
    length = min(ROW_TOKENS, len(ids))
    count = min(ROWS, len(ids) // max(1, length))
    if length < FEWEST_TOKENS:
        raise TooFewTokens(
            f"{data_names(recipe.dataset)} has {len(ids)} tokens, too few to calibrate 4 bits on"
        )
    cut = [ids[i * length : (i + 1) * length] for i in range(count)]
    digest = hashlib.sha256(np.asarray(cut, dtype="<i4").tobytes()).hexdigest()
    return cut, {
        "dataset": recipe.dataset, "rows": count, "row_tokens": length, "sha256": digest,
    }  # fmt: skip
