"""From each model's statistics by example to metrics with intervals, and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lighten.data import Example
from lighten.evaluation import forgetting, metrics, registry
from lighten.evaluation.bootstrap import Array, Resamples
from lighten.evaluation.result import Evaluation, Measured
from lighten.evaluation.verdicts import verdict
from lighten.recipe import EvaluateOptions
from lighten.runs import now


def summarise(
    results: Sequence[Measured], answered: Sequence[Example], settings: EvaluateOptions
) -> Evaluation:
    """Metrics with intervals, and each adapter's paired difference from the base."""
    names = (*registry.OF_ANSWERS, *settings.extra_metrics)
    scorers = {name: registry.scorer(name) for name in names}
    formulas = metrics.FROM_SUMS | {name: scorer.formula for name, scorer in scorers.items()}
    base = results[0]
    draws = {
        len(statistics): Resamples(len(statistics), settings.bootstrap_samples, settings.seed)
        for statistics in base.statistics.values()
    }
    summaries, differences = [], []
    for result in results:
        estimates: dict[str, Any] = {}
        for metric in (*metrics.METRICS, *map(registry.described, settings.extra_metrics)):
            if metric.name not in result.statistics:
                continue
            counts, formula = result.statistics[metric.name], formulas[metric.name]
            estimates[metric.name] = draws[len(counts)].estimate(counts, formula).to_dict()
            if result is not base:
                difference = draws[len(counts)].difference(
                    counts, base.statistics[metric.name], formula
                )
                differences.append(
                    {
                        "adapter": result.name,
                        "metric": metric.name,
                        "difference": difference.value,
                        "low": difference.low,
                        "high": difference.high,
                        "verdict": verdict(
                            difference, len(counts), lower_is_better=metric.lower_is_better
                        ),
                    }
                )
        summaries.append(
            {
                "name": result.name,
                "adapter": result.adapter,
                "metrics": estimates,
                "losses": result.statistics["loss"].tolist(),
                **general_losses(result.statistics),
                "seconds": result.answers.seconds,
                "generated_tokens": result.answers.tokens,
                "generated_tokens_per_second": result.answers.tokens_per_s,
                **result.memory,
            }
        )
    examples = [
        {
            "file": Path(example.file).name,
            "line": example.line,
            "prompt": example.messages[-2].content if len(example.messages) > 1 else "",
            "reference": base.references[place],
            "answers": {result.name: result.answers.texts[place] for result in results},
        }
        for place, example in enumerate(answered)
    ]
    recorded_settings = {
        **settings.model_dump(),
        "interval": "95 % percentile bootstrap over examples, paired for differences",
        "normalisation": "NFC",
        "signatures": {
            name: scorer.signature
            for name, scorer in scorers.items()
            if answered and name != "exact_match"
        },
    }
    return Evaluation(recorded_settings, {}, summaries, differences, examples, created=now())


def general_losses(statistics: Mapping[str, Array]) -> dict[str, Any]:
    """Losses on general text by example, where they were measured."""
    losses = statistics.get(forgetting.METRIC)
    return {} if losses is None else {"general_losses": losses.tolist()}
