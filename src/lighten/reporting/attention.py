"""What the page shows of `lighten bench RUN attention`: memory and time over the row's length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lighten.reporting.charts import Series, line_chart

# Exponents nearer to one of these than to the other are called by its name.
_HALFWAY = 1.5


def section(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Charts and growth; None where attention was not measured.

    Args:
        found: `bench.json`.
    """
    records = [own for own in (found or {}).get("records", []) if own["part"] == "attention"]
    measured = [own for own in records if own.get("seconds")]
    if not measured:
        return None
    return {
        "memory": _chart(measured, "Peak memory of one layer's attention over row length", "MiB",
                         lambda own: own["peak_bytes"] / 2**20),
        "time": _chart(measured, "Time of one layer's attention over row length", "ms",
                       lambda own: 1000 * own["seconds"]["median"]),
        "growth": [_growth(own) for own in records if "memory_exponent" in own],
        "absent": list(dict.fromkeys(
            f"{own['kind']}, {own['what']}: {own['why']}" for own in records if own.get("why")
        )),
    }  # fmt: skip


def _chart(records: list[Mapping[str, Any]], title: str, unit: str, value: Any) -> str:
    """A line for each implementation, of the training step where there is one."""
    what = "training step" if any(r["what"] == "training step" for r in records) else "forward"
    kinds = list(dict.fromkeys(own["kind"] for own in records if own["what"] == what))
    series = []
    for place, kind in enumerate(kinds):
        own = [one for one in records if (one["kind"], one["what"]) == (kind, what)]
        series.append(Series(kind, [one["tokens"] for one in own], [value(one) for one in own],
                             markers=True, colour=place))  # fmt: skip
    return line_chart(
        series, title=f"{title}, {what}", x_label="tokens", y_label=unit, from_zero=True
    )


def _growth(own: Mapping[str, Any]) -> dict[str, str]:
    ends = own["runs_out_at"]
    return {
        "name": f"{own['kind']}, {own['what']}", "memory": _named(own["memory_exponent"]),
        "time": _named(own["time_exponent"]), "ends": f"{ends:,} tokens" if ends else "–",
    }  # fmt: skip


def _named(exponent: float | None) -> str:
    """A fitted exponent, and which growth it is near to."""
    if exponent is None:
        return "too few lengths"
    return f"{'n²' if exponent > _HALFWAY else 'n'} (n^{exponent:.2f})"
