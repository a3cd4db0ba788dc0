"""The verb `evaluate`: what training changed, on held-out examples, with intervals."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from lighten import data, hardware, runs
from lighten.data import Example
from lighten.errors import UserError
from lighten.evaluate import metrics
from lighten.evaluate.bootstrap import Array, Estimate, FromSums, Resamples
from lighten.evaluate.generate import Answers, as_shown, generate
from lighten.evaluate.opened import Models
from lighten.models import limits_of
from lighten.recipe import EvaluateOptions, Recipe
from lighten.runs import Run
from lighten.train.heldout import held_out
from lighten.train.loss import Objective
from lighten.train.prepare import choose_tokens
from lighten.train.rows import encode_as, held_out_source
from lighten.wording import counted

Progress = Callable[[str, int, int], None]
# Fewer examples than this give no verdict.
FEWEST = 20


@dataclass
class Measured:
    """One model's raw results on the examples.

    Attributes:
        name: `base`, or what was trained.
        adapter: The same name, None for the base.
        statistics: Per-example statistics [examples, K] by metric.
        answers: What it said.
        memory: Peak memory while it was measured.
    """

    name: str
    adapter: str | None
    statistics: dict[str, Array]
    answers: Answers
    memory: dict[str, Any] = field(default_factory=dict)


@dataclass
class Evaluation:
    """What `evaluation.json` holds.

    Attributes:
        settings: How it was measured.
        dataset: On what.
        models: Metrics per model with standard error and 95 % interval.
        differences: Each adapter minus the base, paired, with a verdict.
        examples: Prompt, reference and every model's answer.
    """

    settings: dict[str, Any]
    dataset: dict[str, Any]
    models: list[dict[str, Any]]
    differences: list[dict[str, Any]]
    examples: list[dict[str, Any]]
    version: int = 1
    created: str = ""

    def __repr__(self) -> str:
        told = []
        for model in self.models:
            loss = model["metrics"].get("loss", {}).get("value")
            told.append(model["name"] + ("" if loss is None else f" {loss:.3f}"))
        rows = counted(self.dataset.get("rows", 0), "example")
        return f"Evaluation({rows}; loss: {', '.join(told)})"

    def _repr_html_(self) -> str:
        """Every metric of every model, for notebooks."""
        from lighten.notebook import evaluation_html

        return evaluation_html(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def metric(self, model: str, name: str) -> dict[str, float]:
        """Value, standard error and interval of one metric of one model."""
        for own in self.models:
            if own["name"] == model:
                found: dict[str, float] = own["metrics"][name]
                return found
        raise KeyError(model)


def evaluate_run(run: Run, *, progress: Progress | None = None, **options: Any) -> Evaluation:
    """Measure the base and what a run trained, and write `evaluation.json`.

    Args:
        run: The run.
        progress: Told what is being done, how far it is, and of how much.
        options: Settings of the recipe's `evaluate` section.

    Raises:
        UserError: Nothing trained in the run, or no held-out example.
    """
    recipe = run.recipe()
    settings = recipe.with_evaluate(options)
    transformers_logging.disable_progress_bar()
    device = hardware.choose_device().value
    memory = hardware.PeakMemory(device)
    models = Models(run, device, keep=False)
    if not models.names:
        what = "model" if recipe.method == "full" else "adapter"
        raise UserError(f"{run.folder} has no trained {what} yet; train it first")
    template = models.open(None).template
    found, name = held_out_examples(recipe, run.info().get("data", {}).get("sha256"))
    answered = askable(found, recipe, models.open(None).base.tokenizer)
    if settings.max_examples is not None:
        found, answered = found[: settings.max_examples], answered[: settings.max_examples]
    results = [
        measure(models, own, found, answered, recipe, settings, memory, progress)
        for own in (None, *models.names)
    ]
    evaluation = summarise(results, answered, settings)
    evaluation.settings["chat_template"] = template
    evaluation.dataset = {"path": name, "rows": len(found), "answered": len(answered)}
    shortened = max(result.answers.shortened for result in results)
    if shortened:
        evaluation.dataset["shortened"] = shortened
    runs.write_json(run.folder / runs.EVALUATION, evaluation.to_dict())
    return evaluation


def askable(
    examples: Sequence[Example], recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    """The examples that end with an answer which the chat template shows."""
    handling = data.Handling(recipe.system_role, recipe.thinking)
    kept = []
    for example in examples:
        if not example.reference:
            continue
        try:
            data.prompt_of(example, tokenizer, handling)
        except UserError:  # blank, refused or rewritten: training leaves it out too, and counts it
            continue
        kept.append(example)
    return kept


def held_out_examples(
    recipe: Recipe, trained_on: str | None, *, test: bool = True
) -> tuple[Sequence[Example], str]:
    """Examples that the recipe's training never saw: the best set there is, and its name.

    Args:
        recipe: The run's recipe.
        trained_on: SHA-256 of the data that the run was trained on.
        test: A test set, if there is one; else the set that the loss is watched on, by which
            settings may be chosen.

    Raises:
        UserError: There is none, or the data has changed so that the split would be another.
    """
    skip: dict[str, Any] = {
        "skip_bad_rows": recipe.skip_bad_rows,
        "columns": recipe.dataset_columns,
    }
    if test and data.has_split(recipe.dataset, "test"):
        found = data.read(recipe.dataset, split="test", **skip)
    elif (source := held_out_source(recipe)) is not None:
        found = data.read(source, split="valid", **skip)
    elif recipe.val_size:
        whole = data.read(recipe.dataset, limit=recipe.max_train_samples, **skip)
        if trained_on not in (None, whole.sha256):
            raise UserError(
                f"{whole.path} has changed since the run was trained, so rows it learnt might be "
                "taken for held-out ones; put the file back, or train again"
            )
        return data.split(whole.examples, recipe.val_size)[1], f"held out of {whole.path}"
    else:
        raise UserError(
            "the run has no held-out examples to evaluate on; set eval_dataset, or val_size above 0"
        )
    return found.examples, str(found.path)


def measure(
    models: Models,
    own: str | None,
    scored: Sequence[Example],
    answered: Sequence[Example],
    recipe: Recipe,
    settings: EvaluateOptions,
    memory: hardware.PeakMemory,
    progress: Progress | None = None,
) -> Measured:
    """Likelihood and answers of one model (own None: the untouched base)."""
    name, opened = own or "base", models.open(own)
    base, trained, adapter = opened.base, opened.trained, opened.adapter
    memory.restart()
    limits = limits_of(base.model)
    encoding = None
    if progress is not None:
        encoding = functools.partial(progress, f"{name}: encoding")
    rows = encode_as(recipe, scored, base.tokenizer, limits, encoding).rows
    if progress is not None:
        progress(f"{name}: loss", 0, len(rows))
    losses = held_out(
        Objective(base.model, trained, fast=trained.supports_fast_loss),
        rows,
        adapter,
        max_rows=recipe.per_device_eval_batch_size,
        max_tokens=choose_tokens(
            recipe.tokens_per_microbatch, base.model.device.type, base.dtype.value
        )[0],
        device=base.model.device,
    )
    if progress is not None:
        progress(f"{name}: loss", len(rows), len(rows))
    statistics = {"loss": metrics.likelihood_statistics(losses.nll, losses.tokens)}
    statistics["perplexity"] = statistics["loss"]
    prompts, references = [], []
    handling = data.Handling(recipe.system_role, recipe.thinking)
    for example in answered:
        prompt, reference = data.prompt_of(example, base.tokenizer, handling)
        prompts.append(prompt)
        references.append(as_shown(reference, base.tokenizer))

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress(f"{name}: answers", done, total)

    with trained.using(adapter):
        answers = generate(
            base.model, base.tokenizer, prompts,
            max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size,
            learnt=models.learnt, limits=limits, progress=tell,
        )  # fmt: skip
    if answered:
        statistics["bleu"] = metrics.bleu().statistics(answers.texts, references)
        statistics["chrf"] = metrics.chrf().statistics(answers.texts, references)
        statistics["exact_match"] = metrics.exact_match_statistics(answers.texts, references)
    return Measured(name, own, statistics, answers, memory.read())


def summarise(
    results: Sequence[Measured], answered: Sequence[Example], settings: EvaluateOptions
) -> Evaluation:
    """Metrics with intervals, and each adapter's paired difference from the base."""
    text = {"bleu": metrics.bleu(), "chrf": metrics.chrf()}
    formulas: dict[str, FromSums] = {**metrics.FROM_SUMS, **text}
    base = results[0]
    draws = {
        len(own): Resamples(len(own), settings.bootstrap_samples, settings.seed)
        for own in base.statistics.values()
    }
    summaries, differences = [], []
    for result in results:
        own: dict[str, Any] = {}
        for metric in metrics.METRICS:
            if metric.name not in result.statistics:
                continue
            counts, formula = result.statistics[metric.name], formulas[metric.name]
            own[metric.name] = draws[len(counts)].estimate(counts, formula).to_dict()
            if result is not base:
                found = draws[len(counts)].difference(counts, base.statistics[metric.name], formula)
                differences.append(
                    {
                        "adapter": result.name,
                        "metric": metric.name,
                        "difference": found.value,
                        "low": found.low,
                        "high": found.high,
                        "verdict": verdict(
                            found, len(counts), lower_is_better=metric.lower_is_better
                        ),
                    }
                )
        speed = result.answers.tokens / result.answers.seconds if result.answers.tokens else None
        summaries.append(
            {
                "name": result.name,
                "adapter": result.adapter,
                "metrics": own,
                "losses": result.statistics["loss"].tolist(),
                "seconds": result.answers.seconds,
                "generated_tokens": result.answers.tokens,
                "generated_tokens_per_second": speed,
                **result.memory,
            }
        )
    examples = [
        {
            "file": Path(example.file).name,
            "line": example.line,
            "prompt": example.messages[-2].content if len(example.messages) > 1 else "",
            "reference": example.reference,
            "answers": {result.name: result.answers.texts[place] for result in results},
        }
        for place, example in enumerate(answered)
    ]
    how = {
        **settings.model_dump(),
        "interval": "95 % percentile bootstrap over examples, paired for differences",
        "signatures": {name: own.signature for name, own in text.items() if answered},
    }
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Evaluation(how, {}, summaries, differences, examples, created=now)


def verdict(difference: Estimate, examples: int, *, lower_is_better: bool) -> str:
    """In words: `better` or `worse` only where the whole interval says so.

    A percentile interval of few examples is too narrow: without any true difference it excludes
    zero for half of all pairs of examples and for 15 % of fives; from twenty on it is near its 5 %.
    """
    if examples < FEWEST:
        return "too few examples"
    if difference.low > 0:
        return "worse" if lower_is_better else "better"
    if difference.high < 0:
        return "better" if lower_is_better else "worse"
    return "no difference found"
