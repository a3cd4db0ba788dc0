"""What the page shows of smaller copies: size against quality, and a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lighten.reporting import text
from lighten.reporting.charts import Point, number, scatter_chart


def section(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The chart, the rows and the notes; None where nothing was quantised."""
    if found is None:
        return None
    rows = found["formats"]
    points = [
        Point(
            row["name"],
            row["file_bytes"] / 1e6,
            row["perplexity"],
            row.get("perplexity_standard_error"),
        )
        for row in rows
        if row.get("perplexity") is not None
    ]
    chart = ""
    if points:
        chart = scatter_chart(
            points,
            title="Perplexity over file size",
            x_label="MB on disk",
            y_label="held-out perplexity",
        )
    return {
        "chart": chart,
        "columns": COLUMNS,
        "rows": [_row(row) for row in rows],
        "notes": [f"measured {found['settings']['mode']}", *found["notes"]],
        "calibration": found["settings"].get("calibration"),
    }


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    error = row.get("perplexity_standard_error")
    agreement = row.get("top1_agreement")
    return {
        "name": row["name"],
        "frontier": row["frontier"],
        "cells": [
            text.size(row["file_bytes"]),
            f"{row['ratio']:.2f}",
            text.size(row["resident_bytes"]),
            number(row.get("perplexity")) + ("" if error is None else f" ± {number(error)}"),
            number(row.get("kl")),
            "–" if agreement is None else f"{agreement:.1%}",
            number(row.get("exact_match")),
            number(row.get("chrf")),
            number(row["prefill_tokens_per_second"]),
            number(row["decode_tokens_per_second"]),
        ],
    }


COLUMNS = (
    "file", "of bfloat16", "resident", "perplexity", "KL, nats", "top-1 agreement",
    "exact match %", "chrF", "prefill tokens/s", "decode tokens/s",
)  # fmt: skip
