"""An audit as one self-contained HTML page: before and after, a line per technique."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lighten import runs
from lighten.reporting import audit_table, text
from lighten.reporting.charts import Point, number, scatter_chart
from lighten.reporting.page import environment

PAGE = "report.html"
TITLES = {
    "training": "Training on your data",
    "long context": "One long row",
    "answers": "Answering, one token after another",
}
PLAIN, TOGETHER = "plain", "all together"


def write_audit_page(folder: Path, output: Path | None = None) -> Path:
    """Write the page of an audit and return where.

    Args:
        folder: The audit's.
        output: Where; default `report.html` in the folder.
    """
    target = output or folder / PAGE
    data = json.loads((folder / runs.AUDIT).read_text(encoding="utf-8"))
    runs.write_text(target, audit_page(data))
    return target


def audit_page(data: Mapping[str, Any]) -> str:
    """The page as HTML text."""
    rows: list[dict[str, Any]] = data["rows"]
    return (
        environment()
        .get_template("audit.html.j2")
        .render(
            title=f"audit of {data['model']}", data=data, headline=headline(rows),
            tiles=tiles(rows), groups=[_group(rows, group) for group in TITLES],
            columns=audit_table.COLUMNS, training=_scatter(rows, "training"),
            answers=_scatter(rows, "answers"), plan_error=_plan_error(rows),
            several=any(len(row["processes"]) > 1 for row in rows),
        )
    )  # fmt: skip


def headline(rows: Sequence[Mapping[str, Any]]) -> str:
    """What all techniques together brought, in a sentence."""
    together = _measured(rows, "training", TOGETHER)
    if together is None or together["against"] in (None, TOGETHER):
        count = sum(row["status"] == "measured" for row in rows)
        return f"{count} of {len(rows)} techniques were measured."
    brought, against = together["brought"], "the plain way"
    if together["against"] != PLAIN:
        against = f"“{together['against']}” (the plain way was not measured)"
    sentence = (
        f"All together train {_times(brought['speed'])} as fast as {against} in "
        f"{1 / brought['memory']['value']:.2f} of its memory"
    )
    quality = together.get("quality") or {}
    if "difference" in quality and audit_table.known(quality):
        sentence += f"; held-out loss {quality['difference']:+.3f} ({quality['verdict']})"
    return f"{sentence}."


def _times(ratio: Mapping[str, Any]) -> str:
    return f"{ratio['value']:.2f} times"


def _measured(rows: Sequence[Mapping[str, Any]], group: str, name: str) -> Mapping[str, Any] | None:
    for row in rows:
        if (row["group"], row["name"], row["status"]) == (group, name, "measured"):
            return row
    return None


def tiles(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Before and after of what people ask first."""
    tiles = []
    plain, together = (_measured(rows, "training", name) for name in (PLAIN, TOGETHER))
    if plain and together:
        tiles += [
            {"label": "Training, tokens/s", "before": number(1 / plain["seconds_per_token"]),
             "after": number(1 / together["seconds_per_token"]),
             "note": _interval(together["brought"]["speed"])},
            {"label": "Its peak memory", "before": text.gib(plain["peak_bytes"]),
             "after": text.gib(together["peak_bytes"]),
             "note": _interval(together["brought"]["memory"])},
            {"label": "What it ships", "before": audit_table.ships(plain),
             "after": audit_table.ships(together), "note": "a model, and an adapter"},
        ]  # fmt: skip
    first = _measured(rows, "answers", PLAIN)
    answer_rows = [row for row in rows if row["group"] == "answers" and row["status"] == "measured"]
    if first and answer_rows:
        best = min(answer_rows, key=lambda row: float(row["seconds_per_token"]))
        smallest = min(answer_rows, key=lambda row: float(row["peak_bytes"]))
        tiles += [
            {"label": f"Answers, tokens/s: {best['name']}",
             "before": number(1 / first["seconds_per_token"]),
             "after": number(1 / best["seconds_per_token"]),
             "note": _interval(best["brought"]["speed"])},
            {"label": f"Memory to answer: {smallest['name']}",
             "before": text.gib(first["peak_bytes"]), "after": text.gib(smallest["peak_bytes"]),
             "note": _interval(smallest["brought"]["memory"])},
        ]  # fmt: skip
    return tiles


def _interval(ratio: Mapping[str, Any] | None) -> str:
    if ratio is None:
        return ""
    return f"{audit_table.ratio(ratio)} ×"


def _group(rows: Sequence[Mapping[str, Any]], group: str) -> dict[str, Any]:
    group_rows = [row for row in rows if row["group"] == group]
    return {
        "name": group, "title": TITLES[group],
        "rows": [
            {"name": row["name"], "what": row["what"], "cells": audit_table.cells(row),
             "chosen": row["name"] == TOGETHER, "why": row.get("why"), "cost": cost(row),
             "verdict": (row.get("quality") or {}).get("verdict", "")}
            for row in group_rows
        ],
        "against": next((row["against"] for row in group_rows if row.get("against")), None),
    }  # fmt: skip


def cost(row: Mapping[str, Any]) -> str:
    """What using it takes beside memory: steps, or the making of a file."""
    for process in row["processes"]:
        if process.get("made_s") is not None:
            peak = text.gib(process["made_peak_bytes"])
            return f"made in {text.duration(process['made_s'])}, {peak}"
        if process.get("step_seconds"):
            steps = process["step_seconds"][1:] or process["step_seconds"]
            return f"{number(sum(steps) / len(steps))} s a step"
    return ""


def _scatter(rows: Sequence[Mapping[str, Any]], group: str) -> str:
    points = []
    for place, row in enumerate(row for row in rows if row["group"] == group):
        quality = row.get("quality") or {}
        if row["status"] == "measured" and audit_table.known(quality) and row.get("peak_bytes"):
            points.append(Point(row["name"], row["peak_bytes"] / 2**30, quality["loss"],
                                colour=place))  # fmt: skip
    if len(points) < 2:
        return ""
    return scatter_chart(
        points, title=f"{TITLES[group]}: held-out loss over memory", x_label="GiB at the peak",
        y_label="held-out loss",
    )  # fmt: skip


def _plan_error(rows: Sequence[Mapping[str, Any]]) -> float | None:
    errors = [abs(row["plan_error"]) for row in rows if row.get("plan_error") is not None]
    return max(errors, default=None)
