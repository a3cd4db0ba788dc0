"""The data of a run: read, split, encoded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lighten import data, models
from lighten.data import Encoded, TemplateChoice
from lighten.data.files import Content, checksum
from lighten.data.sources import sources
from lighten.errors import NoHeldOut
from lighten.models import Limits
from lighten.recipe import Recipe
from lighten.training import held_out_data
from lighten.training.encoding import Progress, encode_as, lost_sentences, tokenizer_facts
from lighten.training.held_out_data import held_out_source
from lighten.training.row_cache import RowCache
from lighten.wording import counted


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
        cached: They were encoded before.
        of_rows: Where only a sample of the training rows was encoded: how many there are.
    """

    train: Encoded
    held_out: Encoded | None
    template: TemplateChoice
    facts: dict[str, Any]
    longest: str = "max_length"
    notes: list[str] = field(default_factory=list)
    cached: bool = False
    of_rows: int | None = None


def load_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, progress: Progress | None = None
) -> Rows:
    """Read, split and encode the recipe's data.

    Args:
        recipe: Which data, and how.
        tokenizer: With its chat template chosen.
        progress: Log how many examples are encoded, and of how many.

    Raises:
        UserError: The data is broken, holds nothing to learn from, or has ids that the model does
            not have.
    """
    limits = _limits(recipe, tokenizer)
    template = data.choose_template(tokenizer, recipe.chat_template)
    cache = RowCache(recipe, _files(recipe), tokenizer, limits)
    entry = cache.load()
    if entry is not None:
        return _rows(recipe, limits, tokenizer, template, *entry, cached=True)
    train, held_out, facts, notes = _read_rows(recipe, tokenizer, limits, cache.contents, progress)
    extras = {"facts": facts, "notes": notes}
    parts = cache.save({"train": train, "held_out": held_out}, extras)
    return _rows(recipe, limits, tokenizer, template, parts, extras, cached=False)


def cached_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Rows | None:
    """The recipe's data if they are in the cache.

    Raises:
        UserError: There are no such files.
    """
    limits = _limits(recipe, tokenizer)
    template = data.choose_template(tokenizer, recipe.chat_template)
    entry = RowCache(recipe, _files(recipe), tokenizer, limits).load()
    return (
        None if entry is None else _rows(recipe, limits, tokenizer, template, *entry, cached=True)
    )


def sample_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, count: int) -> Rows:
    """Some of the recipe's training rows, evenly spread over its data; nothing is held out.

    Args:
        recipe: Which data, and how.
        tokenizer: With its chat template chosen.
        count: About how many rows.

    Raises:
        UserError: As for `load_rows`.
    """
    limits = _limits(recipe, tokenizer)
    template = data.choose_template(tokenizer, recipe.chat_template)
    unhashed = Content((), (), "")  # the checksum is for runs
    dataset = held_out_data.read_as(recipe, recipe.dataset, "train", unhashed)
    train = dataset.examples
    if held_out_source(recipe) is None:
        train, _ = held_out_data.split_off(recipe, dataset)
    sample = train[:: max(1, len(train) // count)]
    encoded = encode_as(recipe, sample, tokenizer, limits)
    extras = {"facts": {}, "notes": [*data.left_out("training", dataset), *dataset.findings]}
    parts = {"train": encoded, "held_out": None}
    of_rows = round(len(train) * len(encoded.rows) / len(sample))
    return _rows(recipe, limits, tokenizer, template, parts, extras, cached=False, of_rows=of_rows)


def _limits(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Limits:
    return models.limits(
        recipe.model_name_or_path,
        tokens=len(tokenizer) if recipe.added_tokens else 0,
        revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
    )


def _rows(
    recipe: Recipe,
    limits: Limits,
    tokenizer: PreTrainedTokenizerBase,
    template: TemplateChoice,
    parts: Mapping[str, Encoded | None],
    extras: Mapping[str, Any],
    *,
    cached: bool,
    of_rows: int | None = None,
) -> Rows:
    encoded, facts = parts["train"], extras["facts"]
    assert encoded is not None
    facts["template"] = {
        "name": template.name,
        "reason": template.reason,
        "sha256": hashlib.sha256(template.text.encode()).hexdigest(),
    }
    if of_rows is None:  # else no run comes of them
        facts["tokenizer"] = tokenizer_facts(tokenizer)
    longest = limits.longest(recipe.max_length)[1]
    notes = [*extras["notes"], *lost_sentences(encoded, limits, longest),
             *_packing_sentence(recipe, encoded, limits)]  # fmt: skip
    if parts["held_out"] is None and of_rows is None:
        notes += [
            f"{key} has no effect: nothing is held out"
            for key in ("early_stopping_patience", "load_best_model_at_end")
            if getattr(recipe, key)
        ]
    return Rows(encoded, parts["held_out"], template, facts, longest, notes, cached, of_rows)


def _packing_sentence(recipe: Recipe, encoded: Encoded, limits: Limits) -> list[str]:
    """What a step learns from, where other tools would fill blocks with rows for it."""
    if not recipe.packs_blocks_elsewhere:
        return []
    block, _ = limits.longest(recipe.max_length)
    mean = encoded.counts.tokens / len(encoded.rows)
    batch = recipe.per_device_train_batch_size
    alike = round(batch * block / mean)
    if alike <= batch:
        return []
    return [
        f"packing: per_device_train_batch_size {batch} is {counted(batch, 'row')} here, of "
        f"{mean:,.0f} tokens on average; TRL, LLaMA-Factory and Axolotl fill "
        f"{counted(batch, 'block')} of {block:,} tokens, {block / mean:,.1f} times the tokens "
        f"of a step, and of max_steps: per_device_train_batch_size: {alike} would be alike"
    ]


def _read_rows(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    contents: Mapping[str, Content],
    progress: Progress | None,
) -> tuple[Encoded, Encoded | None, dict[str, Any], list[str]]:
    """Training and held-out rows, what `run.json` keeps of them, and what is to be said of them."""
    dataset = held_out_data.read_as(recipe, recipe.dataset, "train", contents.get("train"))
    watched = held_out_data.separate(recipe, dataset.examples, content=contents.get("valid"))
    train = dataset.examples
    if watched is None:
        train, watched = held_out_data.split_off(recipe, dataset)
    test = held_out_data.separate(recipe, train, "test", content=contents.get("test"))
    encoded = encode_as(recipe, train, tokenizer, limits, progress)
    why_none = None
    try:
        watched = held_out_data.encoded(
            recipe,
            watched,
            tokenizer,
            limits,
            recipe.max_eval_samples,
            progress,
            "max_eval_samples",
        )
    except NoHeldOut as nothing:
        if not watched.split_off:  # a file that was named for it
            raise
        watched, why_none = replace(watched, examples=[]), str(nothing)
    held_out = watched.rows
    notes = watched.sentences() if why_none is None else [why_none] if recipe.val_size else []
    if test is not None:
        notes += held_out_data.shared_sentence(test.shared, len(test.examples), test.name)
    facts = {
        "path": dataset.name,
        "sha256": dataset.sha256,
        "eval_sha256": watched.sha256,
        "format": dataset.format,
        "train_rows": len(encoded.rows),
        "eval_rows": len(held_out.rows) if held_out else 0,
        "tokens": encoded.counts.tokens,
        "supervised_tokens": encoded.counts.supervised_tokens,
        "eval_supervised_tokens": held_out.counts.supervised_tokens if held_out else 0,
        "truncated": encoded.counts.truncated,
        "dropped": encoded.counts.dropped,
        "lost_supervised_tokens": encoded.counts.lost_supervised_tokens,
        "bad_rows": len(dataset.bad_rows) + encoded.counts.refused,
        "eval_bad_rows": watched.bad_rows + (held_out.counts.refused if held_out else 0),
        "eval_dropped": held_out.counts.dropped if held_out else 0,
        "eval_shared_prompts": watched.shared,
        "test_shared_prompts": None if test is None else test.shared,
        # What is said wherever figures on these examples are shown; why there are none.
        "held_out_notes": notes,
        "nothing_held_out": why_none if test is None else None,
        "answers": data.learnt_answers(encoded.findings).to_dict(),
    }
    notes = [*data.left_out("training", dataset), *dataset.findings, *notes]
    return encoded, held_out, facts, notes


def data_sha256(recipe: Recipe) -> str:
    """Over the files that the rows come from, or are compared with; none of them is read as rows.

    Raises:
        UserError: A file is not there.
    """
    sums = {split: checksum(files) for split, files in _files(recipe).items()}
    return hashlib.sha256(repr(sorted(sums.items())).encode()).hexdigest()


def _files(recipe: Recipe) -> dict[str, list[Path]]:
    """Every file that the rows come from, or are compared with, by split."""
    held_out, test = held_out_source(recipe), data.with_split(recipe.dataset, "test")
    settings = {"train": recipe.dataset, "valid": held_out, "test": test}
    return {
        split: [file for source in sources(setting, split) for file in source.files]
        for split, setting in settings.items()
        if setting
    }
