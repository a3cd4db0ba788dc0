"""Encoding examples as a recipe says."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from importlib.metadata import version

from transformers import PreTrainedTokenizerBase

from lighten import data
from lighten.data import Encoded
from lighten.models import Limits
from lighten.recipe import Recipe
from lighten.wording import counted

Progress = Callable[[int, int], None]


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What a run notes of a tokenizer: a checksum of what it makes of text, but for the template.

    Another version of the library may write the same tokenizer otherwise, so it stands beside it.
    """
    core = tokenizer.backend_tokenizer
    # Where it cuts and pads is set anew by whoever encodes.
    parts = (core.normalizer, core.pre_tokenizer, core.post_processor, core.model)
    digest = hashlib.sha256(repr((type(tokenizer).__name__, tokenizer.special_tokens_map)).encode())
    for part in parts:
        digest.update(b"" if part is None else part.__getstate__())
    for number, token in sorted(core.get_added_tokens_decoder().items()):
        digest.update(f"{number} {token!r}".encode())
    return {"sha256": digest.hexdigest(), "tokenizers": version("tokenizers")}


def encode_as(
    recipe: Recipe,
    examples: Sequence[data.Example],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    progress: Progress | None = None,
) -> Encoded:
    """Encode examples as the recipe says: training, evaluation and truncation see the same rows.

    Args:
        recipe: How.
        examples: What.
        tokenizer: With its chat template chosen.
        limits: Of the model that will see the rows.
        progress: Log how many examples are encoded, and of how many.

    Raises:
        UserError: As for `data.encode`; or a row has an id that the model does not have.
    """
    max_length, limit = limits.longest(recipe.max_length)
    encoded = data.encode(
        examples,
        tokenizer,
        max_length=max_length,
        limit=limit,
        truncation_strategy=recipe.truncation_strategy,
        assistant_only_loss=recipe.assistant_only_loss,
        completion_only_loss=recipe.completion_only_loss,
        system_role=recipe.system_role,
        thinking=recipe.thinking,
        skip_bad_rows=recipe.skip_bad_rows,
        progress=progress,
    )
    limits.check_ids(encoded.rows, tokenizer)
    return encoded


def lost_sentences(encoded: Encoded, limits: Limits, longest: str) -> list[str]:
    """What the longest length and the model's positions do to rows, in sentences.

    Args:
        encoded: The rows.
        limits: Of the model that will see them.
        longest: What cuts rows, in words: `max_length`, or the model's positions.
    """
    notes = []
    counts = encoded.counts
    if counts.truncated or counts.lost_supervised_tokens:
        notes.append(
            f"lost to {longest}: {counted(counts.lost_supervised_tokens, 'supervised token')} "
            f"({counted(counts.truncated, 'row')} cut, {counts.dropped} left out)"
        )
    beyond = limits.beyond(data.lengths_of(encoded.rows))
    return notes if beyond is None else [*notes, beyond]
