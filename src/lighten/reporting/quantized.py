"""What the page shows of smaller copies: size against quality, and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lighten.reporting import text
from lighten.reporting.charts import Point, number, scatter_chart


def section(quantization: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The chart, the rows and the notes; None where nothing was quantised."""
    if quantization is None:
        return None
    rows, metrics = quantization["formats"], quantization["settings"].get("metrics", {})
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
        "columns": (*COLUMNS, *metrics.values(), *SPEEDS),
        "rows": [_row(row, list(metrics)) for row in rows],
        "notes": [f"measured {quantization['settings']['mode']}", *quantization["notes"]],
        "calibration": quantization["settings"].get("calibration"),
    }


def _row(row: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    answers = [row.get("metrics", {}).get(name, {}) for name in metrics]
    agreement = row.get("top1_agreement")
    return {
        "name": row["name"],
        "frontier": row["frontier"],
        "cells": [
            text.size(row["file_bytes"]),
            f"{row['ratio']:.2f}",
            text.size(row["resident_bytes"]),
            _with_error(row.get("perplexity"), row.get("perplexity_standard_error")),
            number(row.get("kl")),
            "–" if agreement is None else f"{agreement:.1%}",
            *(_with_error(estimate.get("value"), estimate.get("se")) for estimate in answers),
            number(row["prefill_tokens_per_second"]),
            number(row["decode_tokens_per_second"]),
        ],
    }


def _with_error(value: float | None, error: float | None) -> str:
    return number(value) + ("" if error is None else f" ± {number(error)}")


COLUMNS = ("file", "of bfloat16", "resident", "perplexity", "KL, nats", "top-1 agreement")
SPEEDS = ("prefill tokens/s", "decode tokens/s")
