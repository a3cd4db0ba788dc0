"""The data of a run: read, split, encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lighten import data
from lighten.data import Encoded, TemplateChoice
from lighten.recipe import Recipe


@dataclass
class Rows:
    """The encoded data of a run.

    Attributes:
        train: What is trained on.
        held_out: What the loss is watched on, or None.
        template: The chat template and why it was taken.
        facts: What `run.json` keeps of the data.
    """

    train: Encoded
    held_out: Encoded | None
    template: TemplateChoice
    facts: dict[str, Any]


def load_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Read, split and encode the recipe's data.

    Raises:
        UserError: The data is broken, or holds nothing to learn from.
    """
    template = data.choose_template(tokenizer, recipe.chat_template)
    found = data.read(
        recipe.dataset, limit=recipe.max_train_samples, skip_bad_rows=recipe.skip_bad_rows
    )
    train, held_out = found.examples, _held_out(recipe)
    if held_out is None and recipe.val_size and len(train) > 1:
        train, held_out = data.split(train, recipe.val_size)
    if recipe.max_eval_samples is not None and held_out is not None:
        held_out = held_out[: recipe.max_eval_samples]
    encoded = encode_as(recipe, train, tokenizer)
    watched = encode_as(recipe, held_out, tokenizer) if held_out else None
    facts = {
        "path": str(found.path),
        "sha256": found.sha256,
        "format": found.format,
        "train_rows": len(encoded.rows),
        "eval_rows": len(watched.rows) if watched else 0,
        "tokens": encoded.counts.tokens,
        "supervised_tokens": encoded.counts.supervised_tokens,
        "eval_supervised_tokens": watched.counts.supervised_tokens if watched else 0,
        "truncated": encoded.counts.truncated,
        "dropped": encoded.counts.dropped,
        "lost_supervised_tokens": encoded.counts.lost_supervised_tokens,
        "bad_rows": len(found.bad_rows) + encoded.counts.refused,
        "answers": data.learnt_answers(encoded.findings).to_dict(),
        "template": {"name": template.name, "reason": template.reason},
    }
    return Rows(encoded, watched, template, facts)


def encode_as(
    recipe: Recipe, examples: Sequence[data.Example], tokenizer: PreTrainedTokenizerBase
) -> Encoded:
    """Encode examples as the recipe says: training, evaluation and truncation see the same rows."""
    return data.encode(
        examples,
        tokenizer,
        max_length=recipe.max_length,
        truncation_strategy=recipe.truncation_strategy,
        assistant_only_loss=recipe.assistant_only_loss,
        completion_only_loss=recipe.completion_only_loss,
        system_role=recipe.system_role,
        thinking=recipe.thinking,
        skip_bad_rows=recipe.skip_bad_rows,
    )


def _held_out(recipe: Recipe) -> list[data.Example] | None:
    if recipe.eval_dataset is not None:
        source = recipe.eval_dataset
    elif data.has_split(recipe.dataset, "valid"):
        source = recipe.dataset
    else:
        return None
    return data.read(source, split="valid", skip_bad_rows=recipe.skip_bad_rows).examples
