"""What an arm is worth: its losses on the examples that choose, its answers on those that tell.

Arms are chosen by their loss on the validation examples; the metric is reported on the test
examples where the data has some, so that what is reported did not choose.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from lighten import runs
from lighten.cpu import allocator
from lighten.data import Example
from lighten.evaluation import metrics
from lighten.evaluation.answer_length import sentences, settled
from lighten.evaluation.bootstrap import Array, Estimate, FromSums, Resamples
from lighten.evaluation.evaluation import (
    Progress,
    askable,
    digest_of_examples,
    held_out_examples,
    measure,
)
from lighten.evaluation.partial_results import PartialResults
from lighten.evaluation.registry import OF_ANSWERS, scorer
from lighten.evaluation.run_models import Models
from lighten.machine import hardware
from lighten.models import limits_of
from lighten.recipe import EvaluateOptions, Recipe
from lighten.runs import Run
from lighten.training.held_out_data import encoded

ARMS = "arms"
BASE = "base"
# What needs no answers.
LIKELIHOODS = ("loss", "perplexity")


@dataclass
class Measurement:
    """What was measured of one arm, example by example.

    Attributes:
        name: The arm's name, or `base`.
        nll: Summed negative log-likelihood of each choosing example's supervised tokens, nats.
        tokens: Supervised tokens of each.
        statistics: Per-example statistics [examples, K] of the metrics on the telling examples.
        chosen_on: Name of the choosing examples.
        told_on: Name of the telling examples.
        generated_tokens_per_second: How fast it answered, if it did.
        seconds: How long measuring it took.
        notes: What is to be said wherever the figures are shown.
        model: The base that it is or was trained on.
        examples_sha256: Of what the choosing and the telling examples say.
        max_new_tokens: Of an answer at most.
        chosen_sha256: Of what the choosing examples say, by which losses of sweeps are compared.
    """

    name: str
    nll: list[float]
    tokens: list[int]
    statistics: dict[str, list[list[float]]] = field(default_factory=dict)
    chosen_on: str = ""
    told_on: str = ""
    generated_tokens_per_second: float | None = None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    model: str = ""
    examples_sha256: str = ""
    max_new_tokens: int | None = None
    chosen_sha256: str | None = None

    def write(self, folder: Path) -> None:
        """Keep it in the sweep's folder."""
        runs.write_json(_path(folder, self.name), vars(self))

    @classmethod
    def read(cls, folder: Path, name: str) -> Measurement | None:
        """What was kept of an arm, or None: it is not measured, or was on nobody knows what."""
        path = _path(folder, name)
        if not path.is_file():
            return None
        stored = json.loads(path.read_text(encoding="utf-8"))
        if "examples_sha256" not in stored:  # of when the first rows of a file were taken
            return None
        measurement = cls(**stored)
        # JSON has null for what is not a number.
        measurement.nll = [math.nan if value is None else value for value in measurement.nll]
        return measurement

    @property
    def has_loss(self) -> bool:
        """Whether its loss is a number: weights that overflow have none."""
        return all(map(math.isfinite, self.nll))

    def loss(self, draws: Resamples) -> Estimate:
        """Nats per token on the choosing examples."""
        counts = np.stack([np.asarray(self.nll), np.asarray(self.tokens, float)], axis=1)
        return draws.estimate(counts, metrics.mean_loss)


def _path(folder: Path, name: str) -> Path:
    return folder / ARMS / f"{name}.json"


def formula_of(metric: str) -> FromSums:
    """From summed statistics to a metric."""
    return metrics.FROM_SUMS[metric] if metric in metrics.FROM_SUMS else scorer(metric).formula


def statistics_of(measurement: Measurement, metric: str) -> Array | None:
    """Per-example statistics of a metric, or None where it was not measured."""
    name = "loss" if metric == "perplexity" else metric
    statistics = measurement.statistics.get(name)
    return None if statistics is None else np.asarray(statistics, float)


def measure_run(
    run: Run,
    names: Sequence[tuple[str, str | None]],
    folder: Path,
    recipe: Recipe,
    *,
    progress: Progress | None = None,
    answers: bool = True,
    time_for_answers: Callable[[], bool] = lambda: True,
) -> list[Measurement]:
    """Measure models of a run that have not been measured yet, and keep what was found.

    Args:
        run: A finished run.
        names: Name of each arm, and of the adapter inside the run (None: the untouched base).
        folder: The sweep's folder.
        recipe: The sweep's recipe: its metric and `evaluate` section.
        progress: Log what is being done.
        answers: Let the models answer, if the metric needs it.
        time_for_answers: Asked before each model: without time, its losses alone are measured.

    Raises:
        UserError: There are no held-out examples.
    """
    measurements = {name: Measurement.read(folder, name) for name, _ in names}
    missing = [(name, adapter) for name, adapter in names if measurements[name] is None]
    if missing:
        device = hardware.choose_device().value
        run_recipe, settings = run.recipe(), _with_metric(recipe)
        trained_on = run.info().get("data", {}).get("sha256")
        choosing = held_out_examples(run_recipe, trained_on, test=False)
        telling = held_out_examples(run_recipe, trained_on)
        texts = answers and recipe.sweep.metric not in LIKELIHOODS
        models = Models(run, device, keep=False)
        base = models.open(None).base
        tokenizer, limits = base.tokenizer, limits_of(base.model)
        del base  # another may be opened in its place
        encode = functools.partial(
            encoded, run_recipe, tokenizer=tokenizer, limits=limits, most=settings.max_examples,
            setting="evaluate.max_examples",
        )  # fmt: skip
        choosing = encode(choosing)
        notes = choosing.sentences()
        answered: Sequence[Example] = []
        if texts:
            telling = encode(telling)
            answered, unasked = askable(telling.examples, run_recipe, tokenizer)
            notes = list(dict.fromkeys([*notes, *telling.sentences(), *unasked]))
        settings, reference_tokens = settled(settings, answered, run_recipe, tokenizer)
        assert settings.max_new_tokens is not None
        memory = allocator.measure_peak(device)
        for name, adapter in missing:
            began = time.perf_counter()
            # A sweep that is killed here goes on with the batch that it was at.
            parts = PartialResults(folder / ARMS / f"{name}.partial.jsonl")
            evaluation = measure(
                models,
                adapter,
                choosing,
                answered if time_for_answers() else (),
                run_recipe,
                settings,
                memory,
                _named(progress, name),
                parts,
            )
            evaluation = replace(evaluation, name=name)  # an arm's adapter may be called otherwise
            cut_off = sentences(settings.max_new_tokens, reference_tokens, [evaluation])
            likelihood = evaluation.statistics.pop("loss")
            del evaluation.statistics["perplexity"]
            measurement = Measurement(
                name, likelihood[:, 0].tolist(), [int(count) for count in likelihood[:, 1]],
                {key: value.tolist() for key, value in evaluation.statistics.items()},
                choosing.name, telling.name,
                evaluation.answers.tokens_per_s,
                time.perf_counter() - began, [*notes, *cut_off], _model_of(run),
                digest_of_examples([*choosing.examples, *answered]), settings.max_new_tokens,
                digest_of_examples(choosing.examples),
            )  # fmt: skip
            if recipe.sweep.metric == "perplexity":
                measurement.statistics["loss"] = likelihood.tolist()
            measurement.write(folder)
            parts.forget()
            measurements[name] = measurement
    return [measurement for measurement in measurements.values() if measurement is not None]


def _with_metric(recipe: Recipe) -> EvaluateOptions:
    """How answers are scored: by the sweep's metric, too."""
    settings, metric = recipe.evaluate, recipe.sweep.metric
    if metric in (*LIKELIHOODS, *OF_ANSWERS, *settings.extra_metrics):
        return settings
    return settings.model_copy(update={"extra_metrics": [*settings.extra_metrics, metric]})


def _model_of(run: Run) -> str:
    """The base as it was loaded: in few bits it is another one."""
    recipe, stored = run.recipe(), (run.info().get("base") or {}).get("quantization")
    name = recipe.model_name_or_path
    name = name if recipe.revision is None else f"{name} ({recipe.revision})"
    return f"{name} in {stored}" if stored else name


def _named(progress: Progress | None, name: str) -> Progress | None:
    """Progress under the arm's name, whatever its adapter is called."""
    if progress is None:
        return None
    return lambda what, done, total: progress(f"{name}: {what.rpartition(': ')[2]}", done, total)
