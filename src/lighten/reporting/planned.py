"""The plan of a run: the stacked bar by part, and what was predicted beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from lighten.reporting.bars import Bar, Segment, stacked_bars
from lighten.reporting.text import duration, gib

GIB = 2**30
# Parts that belong together share a colour and are told apart by its strength.
_INKS: dict[str, tuple[int, float]] = {
    "base weights": (0, 1.0), "quantisation constants": (0, 0.65), "adapters": (1, 1.0),
    "gradients": (1, 0.78), "optimiser": (1, 0.58), "activations: attention": (2, 1.0),
    "activations: linear": (2, 0.82), "activations: norms": (2, 0.66),
    "activations: other": (2, 0.5), "logits and loss": (3, 1.0), "temporary buffers": (4, 1.0),
    "allocator overhead": (5, 1.0), "device context": (5, 0.6),
    "encoded rows": (5, 0.35),
}  # fmt: skip


def figure(
    plan: Mapping[str, Any], measured_bytes: int | None = None, *, styled: bool = False
) -> str:
    """The stacked bar of a plan, with the measured peak below it once there is one.

    Args:
        plan: `plan.json`, or a plan's `to_dict()`.
        measured_bytes: The run's peak, in the plan's sense.
        styled: Add the sentence above it and a frame, for where there is no page (a notebook).
    """
    memory = plan["memory"]
    segments = [
        Segment(part["name"], part["bytes"] / GIB, *_INKS.get(part["name"], (5, 0.4)))
        for part in memory["parts"]
        if part["bytes"]
    ]
    bars = [Bar("predicted", segments, memory["low"] / GIB, memory["high"] / GIB)]
    if measured_bytes is not None:
        bars.append(Bar("measured", [Segment("measured peak", measured_bytes / GIB, 0, 0.45)]))
    capacity = plan.get("capacity")
    # A limit far beyond the bars would squeeze them to nothing.
    near = capacity is not None and capacity < 4 * memory["high"]
    drawn = stacked_bars(
        bars,
        title=f"Peak memory by part, {plan['model']} on {plan['device']}",
        unit="GiB",
        limit=(f"{plan['device']}: {gib(capacity)}", capacity / GIB) if near and capacity else None,
    )
    if not styled:
        return drawn
    return (
        f'<div style="max-width:680px;font:14px system-ui,sans-serif"><p>{escape(verdict(plan))}'
        f"</p>{drawn}</div>"
    )


def verdict(plan: Mapping[str, Any]) -> str:
    """Whether it fits, in a sentence."""
    memory, capacity = plan["memory"], plan.get("capacity")
    subject = f"{plan['model']}, {plan['method']}, on {plan['device']}"
    peak = f"{gib(memory['expected'])} ({memory['low'] / GIB:.2f} to {memory['high'] / GIB:.2f})"
    if capacity is None:
        return f"{subject}: {peak} at its peak; how much there is, is not known"
    end = {True: "fits", False: "does not fit", None: "might not fit"}[plan["fits"]]
    return f"{subject}: {peak} of {gib(capacity)}, which {enough(plan) or end}"


def enough(plan: Mapping[str, Any]) -> str | None:
    """Which change makes a plan fit that does not as it is; None where none was found."""
    first = next((change for change in plan.get("changes", ()) if change["fits"]), None)
    if plan["fits"] is not False or first is None:
        return None
    peak = plan["memory"]["expected"] - first["saves_bytes"]
    what = first["what"].replace("; ", " and ")
    return f"does not fit as it is; with {what} it does ({gib(peak)})"


def section(plan: Mapping[str, Any] | None, info: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the page shows of a run's plan; None for a run without one.

    Args:
        plan: `plan.json`.
        info: `run.json`, whose `prediction` holds what became of the plan.
    """
    if not plan or "memory" not in plan:
        return None
    beside = info.get("prediction") or {}
    rows = []
    for label, key, as_text in (
        ("peak memory", "memory", gib), ("seconds per step", "step_seconds", _seconds),
    ):  # fmt: skip
        pair = beside.get(key)
        # A process that trained before has memory to spare: it may need no more.
        if pair and pair["measured"]:
            rows.append(
                {
                    "label": label,
                    "predicted": as_text(pair["predicted"]),
                    "measured": as_text(pair["measured"]),
                    "error": f"{100 * (pair['predicted'] / pair['measured'] - 1):+.1f} %",
                }
            )
    memory = beside.get("memory") or {}
    return {
        "figure": figure(plan, memory.get("measured")),
        "verdict": verdict(plan),
        "rows": rows,
        "notes": [*plan.get("notes", ()), *plan.get("outside", ())],
    }


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 60 else duration(value)
