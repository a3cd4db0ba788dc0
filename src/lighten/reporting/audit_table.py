"""What `lighten audit` prints: a line per technique."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lighten.reporting.text import gib, size

Table = tuple[list[str], list[list[str]]]
GROUPS = ("training", "long context", "answers")
COLUMNS = ("tokens/s", "speed ×", "memory ×", "peak", "planned", "ships", "held-out loss")


def tables(audit: Mapping[str, Any]) -> list[Table]:
    """A table for each group of rows: what each cost, brought and lost."""
    tables: list[Table] = []
    for group in GROUPS:
        rows = [row for row in audit["rows"] if row["group"] == group]
        if rows:
            tables.append(([group, *COLUMNS], [[row["name"], *cells(row)] for row in rows]))
    return tables


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row's figures under `COLUMNS`."""
    if row["status"] != "measured":
        planned = gib(row["predicted_bytes"]) if row.get("predicted_bytes") else "–"
        return ["–", "–", "–", _ran_out(row), planned, "–", "–"]
    brought, quality = row["brought"], row.get("quality") or {}
    planned = "–"
    if row.get("predicted_bytes"):
        planned = f"{gib(row['predicted_bytes'])} ({100 * row['plan_error']:+.0f}%)"
    return [
        f"{1 / row['seconds_per_token']:,.1f}", ratio(brought["speed"]), ratio(brought["memory"]),
        gib(row["peak_bytes"]), planned, ships(row), loss(quality),
    ]  # fmt: skip


def _ran_out(row: Mapping[str, Any]) -> str:
    return "out of memory" if row.get("out_of_memory") else "–"


def ratio(estimate: Mapping[str, Any] | None) -> str:
    """A ratio with its interval."""
    if estimate is None:
        return "–"
    if estimate["low"] is None:
        return f"{estimate['value']:.2f}"
    return f"{estimate['value']:.2f} [{estimate['low']:.2f}, {estimate['high']:.2f}]"


def ships(row: Mapping[str, Any]) -> str:
    """Size of the files that a row ends with."""
    sizes = [process["shipped_bytes"] for process in row["processes"]
             if process.get("shipped_bytes")]  # fmt: skip
    return size(sizes[0]) if sizes else "–"


def loss(quality: Mapping[str, Any]) -> str:
    """The held-out loss, or its difference from the plain row's with its interval."""
    if not known(quality):
        return "not a number" if quality else "–"
    if "difference" not in quality:
        return f"{quality['loss']:.3f}"
    interval = ""
    if quality["low"] is not None:
        interval = f" [{quality['low']:+.3f}, {quality['high']:+.3f}]"
    return f"{quality['difference']:+.3f}{interval}"


def known(quality: Mapping[str, Any]) -> bool:
    """Whether loss and difference, if there is one, are numbers: in a file null is none."""
    if not quality:
        return False
    figures = [quality["loss"], quality.get("difference", 0.0)]
    return all(figure is not None and math.isfinite(figure) for figure in figures)


def reasons(audit: Mapping[str, Any]) -> list[str]:
    """A sentence for each row that was not measured."""
    return [
        f"{row['group']}: {row['name']} was not measured: {row['why']}"
        for row in audit["rows"] if row["status"] != "measured"
    ]  # fmt: skip
