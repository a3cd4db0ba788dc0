"""The model that is quantised, in 16 bits, and the data that goes with it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lighten import data, models
from lighten.artifacts import Artefact, open_source
from lighten.data.storage import chosen, spread_evenly
from lighten.errors import NoHeldOut, UserError
from lighten.evaluation.evaluation import askable, held_out_examples
from lighten.models.load import load_tokenizer
from lighten.quantization.calibration import TooFewTokens, calibration_rows
from lighten.quantization.gguf_source import declared_ends, read_json
from lighten.quantization.gguf_types import gguf_merge_dtype
from lighten.quantization.merged_model import model_folder
from lighten.quantization.questions import TaskMetrics, task_metrics
from lighten.quantization.scores import EvaluationRow
from lighten.quantization.targets import Target, dynamic_group_size
from lighten.recipe import Recipe
from lighten.runs import Run
from lighten.training import held_out_data

MOST_ROWS = 200  # that are looked at for the tokens that are measured on


@dataclass
class ModelSource:
    """What is quantised.

    Attributes:
        name: Short.
        folder: The model in 16 bits with all that belongs to it.
        recipe: Of the run, or of the data that were given; None: there are no data.
        run: The run.
        base: Name of the model that was trained, or that it is.
        tokenizer: With its chat template chosen.
        exports: Where its copies go unless a folder is named.
        trained_on: SHA-256 of the data that the run was trained on, where it is of those.
        artefact: What it is merged from; None: it is a model as it is.
    """

    name: str
    folder: Path
    recipe: Recipe | None
    run: Run | None
    base: str
    tokenizer: Any
    exports: Path
    trained_on: str | None = None
    artefact: Artefact | None = None

    @property
    def group_size(self) -> int:
        """Of 8-bit activations and 4-bit weights: what the run was trained for, else the usual."""
        return dynamic_group_size(self.run)

    @property
    def diverged(self) -> str | None:
        """A sentence where its training did not come to its end."""
        return None if self.artefact is None else self.artefact.facts.get("diverged")

    @contextmanager
    def folder_for(self, target: Target, sibling: Path) -> Iterator[Path]:
        """The model that a format is made from: as `export` makes it where both write one file.

        Args:
            target: The format.
            sibling: Where another is needed, it is made beside this.
        """
        in_16_bits = target.kind != "gguf" or gguf_merge_dtype(target.type) == "auto"
        if in_16_bits or self.artefact is None:
            yield self.folder
            return
        with model_folder(self.artefact, sibling, dtype=gguf_merge_dtype(target.type)) as folder:
            yield folder


@contextmanager
def opened(
    source: str | Run, scratch: Path, *, adapter: str | None = None, dataset: str | None = None
) -> Iterator[ModelSource]:
    """A run or an adapter, merged in 16 bits, or a model as it is.

    Args:
        source: Run, its folder, an adapter's folder, or a model's name.
        scratch: A merged model is written in this folder.
        adapter: Whose, where a run has several.
        dataset: Other data than the run's; of a model without a run the only ones.

    Raises:
        UserError: There is nothing, the model is quantised already, or the adapter is not of it.
    """
    artefact = open_source(source, adapter=adapter)
    refuse_quantized(artefact.base, artefact.base_folder)
    with model_folder(artefact, scratch / "model") as folder:
        tokenizer = load_tokenizer(str(folder))
        recipe = None if artefact.run is None else artefact.run.recipe()
        trained_on = None
        if recipe is not None and dataset is not None:
            recipe = recipe.model_copy(update={"eval_dataset": None}).changed({"dataset": dataset})
        elif recipe is not None:
            trained_on = artefact.facts["data_sha256"]
        elif dataset is not None:
            recipe = Recipe.from_values({"model_name_or_path": artefact.base, "dataset": dataset},
                                        {})  # fmt: skip
        if recipe is not None:
            data.choose_template(tokenizer, recipe.chat_template)
        yield ModelSource(
            artefact.name,
            folder,
            recipe,
            artefact.run,
            artefact.origin,
            tokenizer,
            artefact.exports,
            trained_on,
            artefact,
        )


def refuse_quantized(name: str, folder: Path) -> None:
    """Weights that were rounded once are not rounded again.

    Raises:
        UserError: They were.
    """
    config = read_json(folder / "config.json")
    if (stored := config.get("quantization_config")) is not None:
        how = stored.get("quant_method", "some format") if isinstance(stored, dict) else "a format"
        raise UserError(
            f"{name} is quantised already ({how}): rounding it again adds a second error to the "
            "first; quantise the model that it was made from"
        )


def calibration_of(source: ModelSource) -> tuple[list[list[int]], dict[str, Any]]:
    """Rows of training data behind each other, cut into one length, and what is recorded of them.

    Raises:
        UserError: There are no data, or too few.
    """
    if source.recipe is None:
        raise UserError(
            "int4 chooses its rounding on data like those that the model will see: give a run, or "
            "--dataset FILE; int4:rounded needs none"
        )
    try:
        return calibration_rows(source.recipe, source.tokenizer)
    except TooFewTokens as error:
        raise UserError(f"{error}; use int4:rounded") from error


@dataclass(frozen=True)
class HeldOutSet:
    """What every row of the table is measured on.

    Attributes:
        rows: For likelihoods.
        prompts: Token ids of what is asked.
        rooms: Tokens that the answer to each may have.
        references: The answers to those.
        task: How answers are scored.
        name: Of the data.
        sha256: Over the rows' token ids.
        notes: What has to be said of them.
    """

    rows: list[EvaluationRow]
    prompts: list[list[int]]
    rooms: list[int]
    references: list[str]
    task: TaskMetrics
    name: str
    sha256: str
    notes: list[str]


def _within(rows: list[EvaluationRow], tokens: int) -> list[EvaluationRow]:
    """As many rows as have so many tokens together, one at least, spread evenly over all."""
    for most in range(len(rows), 1, -1):
        some = [rows[place] for place in spread_evenly(most, len(rows))]
        if sum(len(row.ids) for row in some) <= tokens:
            return some
    return rows[:1]


def evaluation_of(source: ModelSource, tokens: int, questions: int) -> HeldOutSet | None:
    """Held-out rows up to so many tokens; None where nothing is held out.

    Raises:
        UserError: The data have changed since the run was trained, or a metric is not at hand.
    """
    recipe = source.recipe
    if recipe is None:
        return None
    limits = models.limits(str(source.folder))
    try:
        examples = held_out_examples(recipe, source.trained_on)
        held_out = held_out_data.encoded(recipe, examples, source.tokenizer, limits, MOST_ROWS)
    except NoHeldOut:
        return None
    assert held_out.rows is not None
    rows = _within([
        EvaluationRow([int(token) for token in row.input_ids], marks)
        for row in held_out.rows.rows
        if any((marks := [bool(on) for on in row.supervised])[1:])
    ], tokens)  # fmt: skip
    handling = data.Handling(recipe.system_role, recipe.thinking)
    asked = chosen(held_out.examples, spread_evenly(questions, len(held_out.examples)))
    answerable, skip_notes = askable(asked, recipe, source.tokenizer)
    pairs = [data.prompt_of(example, source.tokenizer, handling) for example in answerable]
    digest = hashlib.sha256(np.asarray([t for row in rows for t in row.ids], "<i4").tobytes())
    notes = [*held_out.sentences(), *skip_notes]
    count = len(examples.examples) - held_out.left_out
    if len(rows) < count:
        total = sum(len(row.ids) for row in rows)
        notes.append(
            f"{len(rows)} of {count} held-out rows, {total} tokens, are measured on, spread evenly "
            "over them (--tokens)"
        )
    references = [text for _, text in pairs]
    ends = declared_ends(source.folder)
    task = task_metrics(recipe, source.tokenizer, ends, source.run, references)
    return HeldOutSet(
        rows, [ids for ids, _ in pairs],
        [limits.room(len(ids), task.answer_tokens) for ids, _ in pairs],
        references, task, held_out.name, digest.hexdigest(), notes,
    )  # fmt: skip
