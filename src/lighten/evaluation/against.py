"""Two evaluations side by side: only where both were measured in the same way."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from lighten import runs
from lighten.errors import UserError
from lighten.evaluation import forgetting, harness, metrics, registry
from lighten.evaluation.bootstrap import Array, FromSums, Resamples
from lighten.evaluation.verdicts import verdict
from lighten.runs import Run

# Settings that a figure depends on; `batch_size` changes the time alone.
_SAME = ("max_examples", "max_new_tokens", "chat_template", "normalisation", "signatures",
         "extra_metrics", "general_text")  # fmt: skip


def read(run: Run) -> dict[str, Any]:
    """A run's evaluation.

    Raises:
        UserError: It was not evaluated yet.
    """
    path = run.folder / runs.EVALUATION
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{run.folder} was not evaluated yet; first: lighten evaluate {run.folder}"
        ) from error
    return found


def compare(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each model of ours has over each of theirs, paired over the examples.

    Args:
        ours: As `evaluation.json` has it.
        theirs: The same.

    Returns:
        `model`, `against`, `metric`, `difference` (ours minus theirs), its 95 % interval and a
        verdict.

    Raises:
        UserError: They were measured differently: with other settings, another chat template, or
            on other examples.
    """
    _require_same(ours, theirs)
    rows = []
    samples, seed = ours["settings"]["bootstrap_samples"], ours["settings"]["seed"]
    first, second = _statistics(ours), _statistics(theirs)
    for name, own in first.items():
        for other, counts in second.items():
            for metric, (statistics, formula) in own.items():
                reference = counts[metric][0]
                draws = Resamples(len(statistics), samples, seed)
                found = draws.difference(statistics, reference, formula)
                lower = _metric(metric).lower_is_better
                rows.append({
                    "model": name, "against": other, "metric": metric,
                    "difference": found.value, "low": found.low, "high": found.high,
                    "verdict": verdict(found, len(statistics), lower_is_better=lower),
                })  # fmt: skip
    return [*rows, *_tasks(ours, theirs)]


def _tasks(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Scores on the tasks that both were asked, paired over the documents."""
    rows = []
    samples, seed = ours["settings"]["bootstrap_samples"], ours["settings"]["seed"]
    other = {(own["task"], own["metric"], own["filter"]): own for own in theirs.get("tasks", [])}
    for own in ours.get("tasks", []):
        same = other.get((own["task"], own["metric"], own["filter"]))
        for (name, values), (against, references) in itertools.product(
            own["values"].items(), (same or {"values": {}})["values"].items()
        ):
            first, second = (
                np.stack([np.asarray(own), np.ones(len(own))], 1) for own in (values, references)
            )
            draws = Resamples(len(values), samples, seed)
            found = harness.difference(first, second, draws, higher=own["higher_is_better"])
            rows.append({
                "model": name, "against": against, "metric": f"{own['task']}, {own['metric']}",
                "difference": found.pop("value"), **found,
            })  # fmt: skip
    return rows


def _metric(name: str) -> metrics.Metric:
    return next((own for own in metrics.METRICS if own.name == name), registry.described(name))


def _require_same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Trap 46: figures of another template, length or data are no comparison."""
    different = [
        f"{name} is {ours['settings'].get(name)!r} and {theirs['settings'].get(name)!r}"
        for name in _SAME
        if ours["settings"].get(name) != theirs["settings"].get(name)
    ]
    if "lm_eval" in ours["settings"] and "lm_eval" in theirs["settings"]:
        first, second = (own["settings"]["lm_eval"] for own in (ours, theirs))
        different += [
            f"of the tasks, {name} is {first[name]!r} and {second[name]!r}"
            for name in first
            if name != "tasks" and first[name] != second[name]
        ]
    if ours["dataset"]["rows"] != theirs["dataset"]["rows"]:
        different.append(
            f"{ours['dataset']['rows']} and {theirs['dataset']['rows']} held-out examples"
        )
    elif _asked(ours) != _asked(theirs):
        different.append("the held-out examples are not the same")
    elif _supervised(ours) != _supervised(theirs):
        different.append("the same examples have other tokens: the losses are per token")
    if different:
        raise UserError(
            f"the two were measured differently, so they are not compared: {'; '.join(different)}; "
            "evaluate both in the same way"
        )


def _asked(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(own["prompt"], own["reference"]) for own in found["examples"]]


def _supervised(found: Mapping[str, Any]) -> list[float]:
    return [tokens for _, tokens in found["models"][0]["losses"]]


def _statistics(found: Mapping[str, Any]) -> dict[str, dict[str, tuple[Array, FromSums]]]:
    """Per-example statistics of each model by metric, from its losses and its answers."""
    result = {}
    references = registry.nfc([own["reference"] for own in found["examples"]])
    for model in found["models"]:
        losses = np.asarray(model["losses"], float)
        own: dict[str, tuple[Array, FromSums]] = {
            "loss": (losses, metrics.mean_loss), "perplexity": (losses, metrics.perplexity),
        }  # fmt: skip
        if "general_losses" in model:
            general = np.asarray(model["general_losses"], float)
            own[forgetting.METRIC] = (general, metrics.mean_loss)
        if references:
            answers = registry.nfc(
                [example["answers"][model["name"]] for example in found["examples"]]
            )
            for name, text in (("chrf", metrics.chrf()), ("bleu", metrics.bleu())):
                own[name] = (text.statistics(answers, references), text)
            own["exact_match"] = (
                metrics.exact_match_statistics(answers, references), metrics.percent,
            )  # fmt: skip
            for name in found["settings"].get("extra_metrics", []):
                more = registry.extra(name)
                own[name] = (more.statistics(answers, references), more.formula)
        result[model["name"]] = own
    return result
