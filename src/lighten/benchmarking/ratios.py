"""What each technique brought: ratios over the plain way, with intervals.

A row is measured in one process or in several. Two processes that do the same differ by more than
the steps within one, so an interval is made of what differs between processes: their spread is
pooled over all rows, in logarithms. It says where another audit's ratio would be found, which has
the same spread of its own.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lighten.evaluation import metrics
from lighten.evaluation.bootstrap import LEVEL, Resamples, student
from lighten.evaluation.verdicts import verdict

DRAWS = 2000
# Steps of a training that count: its first ones warm up.
WARMUP = 1


@dataclass(frozen=True)
class Spread:
    """How much two processes that measure the same thing differ.

    Attributes:
        deviation: Standard deviation of the logarithm.
        freedom: Processes beyond the first of each row.
    """

    deviation: float
    freedom: int


def seconds_per_token(process: Mapping[str, Any]) -> float | None:
    """Of a training: its steps after warm-up as a whole; of answers: the median answer."""
    if "step_seconds" in process:
        first = min(WARMUP, len(process["step_seconds"]) - 1)
        tokens = sum(process["step_tokens"][first:])
        return sum(process["step_seconds"][first:]) / tokens if tokens else None
    samples = process.get("decode_samples")
    return statistics.median(samples) if samples else None


def peak(process: Mapping[str, Any]) -> float | None:
    """Bytes: the peak, or what is resident where a runtime of its own answers."""
    return process.get("peak_bytes") or process.get("resident_bytes")


FIGURES = {"speed": seconds_per_token, "memory": peak}


def spread(rows: Sequence[Mapping[str, Any]], figure: str) -> Spread:
    """What differs between processes, pooled over rows that have several."""
    squares, freedom = 0.0, 0
    for row in rows:
        values = _logs(row, figure)
        if len(values) > 1:
            mean = statistics.fmean(values)
            squares += math.fsum((value - mean) ** 2 for value in values)
            freedom += len(values) - 1
    return Spread(math.sqrt(squares / freedom) if freedom else 0.0, freedom)


def ratio(
    row: Mapping[str, Any], plain: Mapping[str, Any], figure: str, between: Spread
) -> dict[str, float | None] | None:
    """The plain row's figure over this row's: how many times as quick, or as small.

    Args:
        row: Measured.
        plain: The row that it is set beside.
        figure: One of `FIGURES`.
        between: Of processes, over all rows of the audit.

    Returns:
        `value`, `low` and `high`; the ends are None where every row has one process alone, and the
        whole is None where one of the two was not measured.
    """
    ours, theirs = _logs(row, figure), _logs(plain, figure)
    if not ours or not theirs:
        return None
    difference = statistics.fmean(theirs) - statistics.fmean(ours)
    value = math.exp(difference)
    if row is plain:
        return {"value": 1.0, "low": None, "high": None}
    if not between.freedom:
        return {"value": value, "low": None, "high": None}
    error = between.deviation * math.sqrt(1 / len(ours) + 1 / len(theirs))
    half = student((1 + LEVEL) / 2, between.freedom) * math.sqrt(2) * error
    return {"value": value, "low": math.exp(difference - half), "high": math.exp(difference + half)}


def _logs(row: Mapping[str, Any], figure: str) -> list[float]:
    figures = (FIGURES[figure](process) for process in row.get("processes", ()))
    return [math.log(value) for value in figures if value]


def loss_difference(row: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, Any] | None:
    """Held-out loss of a row, minus the plain one's, paired over the examples.

    Returns:
        `loss`, `difference`, `low`, `high`, `verdict`; None where the row has no loss, and no
        difference where the plain row has none.
    """
    ours, theirs = losses(row), losses(plain)
    if ours is None:
        return None
    counts = np.asarray(ours, float)
    result: dict[str, Any] = {"loss": float(metrics.mean_loss(counts.sum(0)))}
    if theirs is None or row is plain or len(theirs) != len(ours):
        return result
    reference = np.asarray(theirs, float)
    difference = Resamples(len(counts), DRAWS).difference(counts, reference, metrics.mean_loss)
    return {
        **result, "difference": difference.value, "low": difference.low, "high": difference.high,
        "verdict": verdict(difference, len(counts), lower_is_better=True),
    }  # fmt: skip


def losses(row: Mapping[str, Any]) -> list[list[float]] | None:
    """[[summed loss, tokens], …] by held-out example."""
    for process in row.get("processes", ()):
        if process.get("losses"):
            by_example: list[list[float]] = process["losses"]
            return by_example
    return None


def summarised(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with what it `brought` as ratios, its `quality`, and the plan's error."""
    between = {figure: spread(rows, figure) for figure in FIGURES}
    summaries = []
    for row in rows:
        plain = reference(rows, row["group"])
        summary = {key: value for key, value in row.items() if key != "brought"}
        summary["against"] = None if plain is None else plain["name"]
        if plain is not None and row["status"] == "measured":
            summary["brought"] = {f: ratio(row, plain, f, between[f]) for f in FIGURES}
            sizes = [_first(entry, "shipped_bytes") for entry in (plain, row)]
            summary["brought"]["size"] = sizes[0] / sizes[1] if all(sizes) else None
            summary["quality"] = loss_difference(row, plain)
            measured = [value for p in row["processes"] if (value := peak(p))]
            summary["peak_bytes"] = max(measured, default=None)
            summary["seconds_per_token"] = _geometric(row)
            if summary["peak_bytes"] and row.get("predicted_bytes"):
                summary["plan_error"] = row["predicted_bytes"] / summary["peak_bytes"] - 1
        summaries.append(summary)
    return summaries


def reference(rows: Sequence[Mapping[str, Any]], group: str) -> Mapping[str, Any] | None:
    """The plain row of a group; where that could not be measured, the first that was."""
    measured = [row for row in rows if row["group"] == group and row["status"] == "measured"]
    plain = [row for row in measured if row["plain"]]
    return next(iter([*plain, *measured]), None)


def _geometric(row: Mapping[str, Any]) -> float | None:
    logs = _logs(row, "speed")
    return math.exp(statistics.fmean(logs)) if logs else None


def _first(row: Mapping[str, Any], key: str) -> float:
    return next((float(p[key]) for p in row.get("processes", ()) if p.get(key)), 0.0)
