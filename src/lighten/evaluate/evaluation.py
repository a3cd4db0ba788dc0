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
from lighten.data import FEWEST, Example
from lighten.errors import NoHeldOut, UserError
from lighten.evaluate import metrics, registry
from lighten.evaluate.bootstrap import Array, Estimate, FromSums, Resamples
from lighten.evaluate.generate import Answers, as_shown, generate
from lighten.evaluate.kept import Kept, key_of
from lighten.evaluate.opened import Models
from lighten.models import limits_of
from lighten.recipe import EvaluateOptions, Recipe
from lighten.runs import Run
from lighten.train import held_out_data
from lighten.train.batching import choose_tokens
from lighten.train.held_out_data import HeldOutData
from lighten.train.heldout import HeldOut, held_out
from lighten.train.loss import Objective
from lighten.wording import counted

Progress = Callable[[str, int, int], None]


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
        comparisons: Each model minus each of another run, where one was named; not in the file.
    """

    settings: dict[str, Any]
    dataset: dict[str, Any]
    models: list[dict[str, Any]]
    differences: list[dict[str, Any]]
    examples: list[dict[str, Any]]
    version: int = 1
    created: str = ""
    comparisons: list[dict[str, Any]] = field(default_factory=list)

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

    def metric(self, model: str, name: str) -> dict[str, float | None]:
        """Value, standard error and interval of one metric of one model."""
        for own in self.models:
            if own["name"] == model:
                found: dict[str, float | None] = own["metrics"][name]
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
    for name in settings.extra_metrics:
        registry.extra(name)  # before anything heavy is loaded
    transformers_logging.disable_progress_bar()
    device = hardware.choose_device().value
    memory = hardware.PeakMemory(device)
    models = Models(run, device, keep=False)
    if not models.names:
        what = "model" if recipe.method == "full" else "adapter"
        raise UserError(f"{run.folder} has no trained {what} yet; train it first")
    given = held_out_examples(recipe, run.info().get("data", {}).get("sha256"))
    template, base = models.open(None).template, models.open(None).base
    tokenizer, limits = base.tokenizer, limits_of(base.model)
    del base  # another may be opened in its place
    encoding = None if progress is None else functools.partial(progress, "encoding")
    found = held_out_data.encoded(recipe, given, tokenizer, limits, settings.max_examples, encoding)
    answered, unasked = askable(found.examples, recipe, tokenizer)
    results = [
        measure(models, own, found, answered, recipe, settings, memory, progress)
        for own in (None, *models.names)
    ]
    evaluation = summarise(results, answered, settings)
    evaluation.settings["chat_template"] = template
    if recipe.qat is not None:
        evaluation.settings["qat"] = f"{recipe.qat}, groups of {recipe.qat_group_size}"
    shortened = max(result.answers.shortened for result in results)
    evaluation.dataset = {
        "path": found.name,
        "rows": len(found.examples),
        "answered": len(answered),
        "left_out": found.left_out + found.bad_rows,
        "shared_prompts": found.shared,
        "shortened": shortened,
        # What is to be said wherever the figures are shown.
        "notes": [
            *found.sentences(),
            *unasked,
            *shortened_sentence(shortened, results),
            *_qat_sentence(recipe),
        ],
    }
    runs.write_json(run.folder / runs.EVALUATION, evaluation.to_dict())
    return evaluation


def _qat_sentence(recipe: Recipe) -> list[str]:
    """What of a quantisation-aware run is measured."""
    if recipe.qat is None:
        return []
    return [
        f"what was trained is measured as it will be once quantised ({recipe.qat}, groups of "
        f"{recipe.qat_group_size}): weights and activations are rounded; the base is not"
    ]


def askable(
    examples: Sequence[Example], recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Example], list[str]]:
    """The examples that end with an answer which the chat template shows, and why others are not.

    Returns:
        Examples that can be asked, and a sentence per reason for the others: they count for the
        loss alone.
    """
    handling = data.Handling(recipe.system_role, recipe.thinking)
    kept: list[Example] = []
    reasons: dict[str, list[str]] = {}
    for example in examples:
        try:
            data.prompt_of(example, tokenizer, handling)
        except UserError as error:
            reason = str(error).splitlines()[0].replace(example.where, "").lstrip(": ")
            reasons.setdefault(reason, []).append(example.where)
            continue
        kept.append(example)
    return kept, [
        f"{counted(len(rows), 'held-out example')} {'is' if len(rows) == 1 else 'are'} not asked "
        f"and count for the loss alone: {rows[0]} {reason}"
        for reason, rows in reasons.items()
    ]


def shortened_sentence(shortened: int, results: Sequence[Measured]) -> list[str]:
    """What it means that answers ended where the model's positions end."""
    if not shortened:
        return []
    whose = max(results, key=lambda result: result.answers.shortened)
    return [
        f"{counted(shortened, 'answer')} of {whose.name} {'ends' if shortened == 1 else 'end'} "
        f"where the model's positions end, before max_new_tokens: long prompts leave no room"
    ]


def held_out_examples(recipe: Recipe, trained_on: str | None, *, test: bool = True) -> HeldOutData:
    """Examples that the recipe's training never saw: the best set there is.

    Args:
        recipe: The run's recipe.
        trained_on: SHA-256 of the data that the run was trained on.
        test: A test set, if there is one; else the set that the loss is watched on, by which
            settings may be chosen.

    Raises:
        NoHeldOut: There is none.
        UserError: The data has changed so that the split would be another.
    """
    for split in ("test", "valid") if test else ("valid",):
        found = held_out_data.apart(recipe, None, split)
        if found is not None:
            return held_out_data.beside_training(recipe, found, trained_on)
    if not recipe.val_size:
        raise NoHeldOut(
            "the run has no held-out examples to evaluate on; set eval_dataset, or val_size above 0"
        )
    whole = held_out_data.read_as(recipe, recipe.dataset, "train")
    if trained_on not in (None, whole.sha256):
        raise UserError(
            f"{whole.path} has changed since the run was trained, so rows it learnt might be "
            "taken for held-out ones; put the file back, or train again"
        )
    _, found = held_out_data.split_off(recipe, whole)
    if not found.examples:
        raise NoHeldOut(f"the run has no held-out examples to evaluate on: {found.notes[0]}")
    return found


def measure(
    models: Models,
    own: str | None,
    scored: HeldOutData,
    answered: Sequence[Example],
    recipe: Recipe,
    settings: EvaluateOptions,
    memory: hardware.PeakMemory,
    progress: Progress | None = None,
    kept: Kept | None = None,
) -> Measured:
    """Likelihood and answers of one model (own None: the untouched base).

    Args:
        models: The run's.
        own: Which of them.
        scored: The examples whose likelihood is measured.
        answered: Those that it answers.
        recipe: Of the run.
        settings: Of answers.
        memory: Restarted for this model.
        progress: Told what is being done, how far it is, and of how much.
        kept: What an earlier session measured before it was ended; new parts are added.
    """
    name, opened = own or "base", models.open(own)
    base, trained, adapter = opened.base, opened.trained, opened.adapter
    memory.restart()
    assert scored.rows is not None
    rows = scored.rows.rows
    key = key_of("loss", [row.input_ids for row in rows])
    before = None if kept is None else kept.get(key)
    if before is not None:
        losses = HeldOut(tuple(before["nll"]), tuple(before["tokens"]))
    else:
        losses = held_out(
            Objective(base.model, trained, fast=trained.supports_fast_loss),
            rows,
            adapter,
            max_rows=recipe.per_device_eval_batch_size,
            max_tokens=choose_tokens(
                recipe.tokens_per_microbatch, base.model.device.type, base.dtype.value
            )[0],
            device=base.model.device,
            progress=None if progress is None else functools.partial(progress, f"{name}: loss"),
        )
        if kept is not None:
            kept.put(key, {"nll": losses.nll, "tokens": losses.tokens})
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
            learnt=models.learnt, limits=limits_of(base.model), progress=tell, kept=kept,
        )  # fmt: skip
    if answered:
        registry.require_pairs(answers.texts, references)
        said, right = registry.nfc(answers.texts), registry.nfc(references)
        statistics["bleu"] = metrics.bleu().statistics(said, right)
        statistics["chrf"] = metrics.chrf().statistics(said, right)
        statistics["exact_match"] = metrics.exact_match_statistics(said, right)
        for more in settings.extra_metrics:
            statistics[more] = registry.extra(more).statistics(said, right)
    return Measured(name, own, statistics, answers, memory.read())


def summarise(
    results: Sequence[Measured], answered: Sequence[Example], settings: EvaluateOptions
) -> Evaluation:
    """Metrics with intervals, and each adapter's paired difference from the base."""
    text = {"bleu": metrics.bleu(), "chrf": metrics.chrf()}
    signatures = {name: own.signature for name, own in text.items()}
    extras = {own: registry.extra(own) for own in settings.extra_metrics}
    formulas: dict[str, FromSums] = {
        **metrics.FROM_SUMS, **text, **{name: own.formula for name, own in extras.items()},
    }  # fmt: skip
    signatures |= {name: own.signature for name, own in extras.items()}
    base = results[0]
    draws = {
        len(own): Resamples(len(own), settings.bootstrap_samples, settings.seed)
        for own in base.statistics.values()
    }
    summaries, differences = [], []
    for result in results:
        own: dict[str, Any] = {}
        for metric in (*metrics.METRICS, *(more.metric for more in extras.values())):
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
        "normalisation": "NFC",
        "signatures": signatures if answered else {},
    }
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Evaluation(how, {}, summaries, differences, examples, created=now)


def verdict(difference: Estimate, examples: int, *, lower_is_better: bool) -> str:
    """In words: `better` or `worse` only where the whole interval says so.

    A percentile interval of few examples is too narrow: without any true difference it excludes
    zero for half of all pairs of examples and for 15 % of fives; from twenty on it is near its 5 %.
    """
    if examples < FEWEST or difference.low is None or difference.high is None:
        return "too few examples"
    if difference.low > 0:
        return "worse" if lower_is_better else "better"
    if difference.high < 0:
        return "better" if lower_is_better else "worse"
    return "no difference found"
