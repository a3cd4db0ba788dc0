"""From each model's statistics by example to metrics with intervals, and paired differences."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lighten.data import Example
from lighten.evaluation import forgetting, metrics, registry
from lighten.evaluation.bootstrap import Array, FromSums, Resamples
from lighten.evaluation.result import Evaluation, Measured
from lighten.evaluation.verdicts import verdict
from lighten.recipe import EvaluateOptions


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
                **general_losses(result.statistics),
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


def general_losses(statistics: Mapping[str, Array]) -> dict[str, Any]:
    """Losses on general text by example, where they were measured."""
    found = statistics.get(forgetting.METRIC)
    return {} if found is None else {"general_losses": found.tolist()}
