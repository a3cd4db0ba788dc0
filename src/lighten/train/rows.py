"""The data of a run: read, split, encoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lighten import data, models
from lighten.data import Encoded, TemplateChoice
from lighten.data.files import Content, files_of
from lighten.models import Limits
from lighten.paths import split_limit
from lighten.recipe import Recipe
from lighten.train.row_cache import RowCache
from lighten.wording import counted

Progress = Callable[[int, int], None]


@dataclass
class Rows:
    """The encoded data of a run.

    Attributes:
        train: What is trained on.
        held_out: What the loss is watched on, or None.
        template: The chat template and why it was taken.
        facts: What `run.json` keeps of the data.
        longest: What cuts rows, in words: `max_length`, or the model's positions.
        notes: What reading, the longest length and the model's positions do to the rows, a
            sentence each.
    """

    train: Encoded
    held_out: Encoded | None
    template: TemplateChoice
    facts: dict[str, Any]
    longest: str = "max_length"
    notes: list[str] = field(default_factory=list)


def load_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, progress: Progress | None = None
) -> Rows:
    """Read, split and encode the recipe's data.

    Args:
        recipe: Which data, and how.
        tokenizer: With its chat template chosen.
        progress: Told how many examples are encoded, and of how many.

    Raises:
        UserError: The data is broken, holds nothing to learn from, or has ids that the model does
            not have.
    """
    limits = models.limits(
        recipe.model_name_or_path,
        tokens=len(tokenizer) if recipe.added_tokens else 0,
        revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
    )
    template = data.choose_template(tokenizer, recipe.chat_template)
    cache = RowCache(recipe, _files(recipe), tokenizer, limits)
    kept = cache.load()
    if kept is None:
        train, held_out, facts, notes = _read_rows(
            recipe, tokenizer, limits, cache.contents, progress
        )
        parts = cache.save({"train": train, "held_out": held_out}, {"facts": facts, "notes": notes})
    else:
        parts, beside = kept
        facts, notes = beside["facts"], beside["notes"]
    encoded = parts["train"]
    assert encoded is not None
    facts["template"] = {"name": template.name, "reason": template.reason}
    longest = limits.longest(recipe.max_length)[1]
    notes = [*notes, *_notes(encoded, limits, longest)]
    return Rows(encoded, parts["held_out"], template, facts, longest, notes)


def _read_rows(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    contents: Mapping[str, Content],
    progress: Progress | None,
) -> tuple[Encoded, Encoded | None, dict[str, Any], list[str]]:
    """Training and held-out rows, what `run.json` keeps of them, and what reading left out."""
    found = data.read(
        recipe.dataset,
        limit=recipe.max_train_samples,
        skip_bad_rows=recipe.skip_bad_rows,
        columns=recipe.dataset_columns,
        content=contents.get("train"),
    )
    train, held_out = found.examples, None
    apart = _held_out(recipe, contents.get("valid"))
    if apart is not None:
        held_out = apart.examples
    if held_out is None and recipe.val_size and len(train) > 1:
        train, held_out = data.split(train, recipe.val_size)
    if recipe.max_eval_samples is not None and held_out is not None:
        held_out = held_out[: recipe.max_eval_samples]
    encoded = encode_as(recipe, train, tokenizer, limits, progress)
    watched = encode_as(recipe, held_out, tokenizer, limits, progress) if held_out else None
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
        "eval_bad_rows": (len(apart.bad_rows) if apart is not None else 0)
        + (watched.counts.refused if watched else 0),
        "answers": data.learnt_answers(encoded.findings).to_dict(),
    }
    notes = [
        *data.left_out("training", found),
        *(data.left_out("held-out", apart) if apart is not None else ()),
        *(f"held out: {said}" for said in (watched.findings.refusals() if watched else ())),
    ]
    return encoded, watched, facts, notes


def _notes(encoded: Encoded, limits: Limits, longest: str) -> list[str]:
    """What the longest length and the model's positions do to the rows."""
    notes = []
    counts = encoded.counts
    if counts.truncated or counts.lost_supervised_tokens:
        notes.append(
            f"lost to {longest}: {counted(counts.lost_supervised_tokens, 'supervised token')} "
            f"({counted(counts.truncated, 'row')} cut, {counts.dropped} left out)"
        )
    beyond = limits.beyond(data.lengths_of(encoded.rows))
    return notes if beyond is None else [*notes, beyond]


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
        progress: Told how many examples are encoded, and of how many.

    Raises:
        UserError: As for `data.encode`.
        IdsError: A row has an id that the model does not have.
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


def held_out_source(recipe: Recipe) -> str | None:
    """Where the data are that the loss is watched on; None: a part of the training data is."""
    if recipe.eval_dataset is not None:
        return recipe.eval_dataset
    return recipe.dataset if data.has_split(recipe.dataset, "valid") else None


def _files(recipe: Recipe) -> dict[str, list[Path]]:
    """Every file that the rows come from, by split."""
    files = {"train": files_of(split_limit(recipe.dataset)[0], "train")}
    if (source := held_out_source(recipe)) is not None:
        files["valid"] = files_of(split_limit(source)[0], "valid")
    return files


def _held_out(recipe: Recipe, content: Content | None) -> data.Dataset | None:
    if (source := held_out_source(recipe)) is None:
        return None
    return data.read(
        source,
        split="valid",
        skip_bad_rows=recipe.skip_bad_rows,
        columns=recipe.dataset_columns,
        content=content,
    )
