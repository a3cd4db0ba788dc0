"""What was planned for a run, as training needs it, and what became of it.

Training knows nothing of how a plan is made: it is handed the record, writes it into the run
folder, and at the end puts what it measured beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lighten.training.rows import Rows


@dataclass(frozen=True)
class Prediction:
    """A plan, or why there is none.

    Attributes:
        lines: What a user is told before the first step.
        record: What goes into `plan.json`; None: planning failed.
        rows: The encoded data, if the plan has read it already.
        advice: Makes sentences on what would need less memory, the cheapest first.
    """

    lines: Sequence[str]
    record: Mapping[str, Any] | None = None
    rows: Rows | None = None
    advice: Callable[[], Sequence[str]] = list


def compare(
    record: Mapping[str, Any], memory: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Predicted beside measured, in the plan's sense.

    Memory is the process's peak above what it held before the base was loaded, or on a GPU what the
    allocator reserved, with the context that the plan counts. The time of a step is the median
    step's seconds per token times the tokens of the planned step: real steps have rows of all
    lengths. Of several ranks one is compared: it takes its part of a step's tokens.

    Args:
        record: The plan, with what each of several ranks needs as its `spread`.
        memory: What `PeakMemory.read` gave at the end.
        metrics: The run's lines.
    """
    parts = {part["name"]: part["bytes"] for part in record["memory"]["parts"]}
    peak = memory["peak_bytes"]
    if "reserved_bytes" in memory:
        peak = memory["reserved_bytes"] + parts.get("device context", 0)
    planned, spread = record["memory"], record.get("spread")
    predicted = planned["expected"] + planned.get("mapped", 0)
    if spread is not None:
        predicted = round(spread["device_bytes"])
    comparison: dict[str, Any] = {
        "memory": {"predicted": predicted, "measured": peak},
        "step_seconds": None,
    }
    if "reserved_bytes" in memory and record["memory"].get("allocated") and spread is None:
        comparison["allocated"] = {
            "predicted": record["memory"]["allocated"], "measured": memory["peak_bytes"],
        }  # fmt: skip
    per_token = _seconds_per_token(metrics)
    if record.get("time") and record.get("step_tokens") and per_token is not None:
        comparison["step_seconds"] = {
            "predicted": record["time"]["seconds"],
            "measured": per_token * record["step_tokens"] * (spread["ranks"] if spread else 1),
        }
    return comparison


def _seconds_per_token(metrics: Sequence[Mapping[str, Any]]) -> float | None:
    """The median step's; the first step warms up and does not count where there are others."""
    tokens: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for line in metrics:
        if line["kind"] == "train":
            tokens[line["step"]] = tokens.get(line["step"], 0) + line["tokens"]
            seconds[line["step"]] = line["seconds"]
    steps = sorted(tokens)
    counted = steps[1:] or steps
    rates = [seconds[step] / tokens[step] for step in counted if tokens[step]]
    return statistics.median(rates) if rates else None
