"""What the page shows of `lighten bench RUN attention`: memory and time over the row's length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lighten.reporting.charts import Series, line_chart

# Exponents nearer to one of these than to the other are called by its name.
_HALFWAY = 1.5


def section(bench: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Charts and growth; None where attention was not measured.

    Args:
        bench: `bench.json`.
    """
    records = [
        record for record in (bench or {}).get("records", []) if record["part"] == "attention"
    ]
    measured = [record for record in records if record.get("seconds")]
    if not measured:
        return None
    return {
        "memory": _chart(measured, "Peak memory of one layer's attention over row length", "MiB",
                         lambda record: record["peak_bytes"] / 2**20),
        "time": _chart(measured, "Time of one layer's attention over row length", "ms",
                       lambda record: 1000 * record["seconds"]["median"]),
        "growth": [_growth(record) for record in records if "memory_exponent" in record],
        "absent": list(dict.fromkeys(
            f"{record['kind']}, {record['what']}: {record['why']}"
            for record in records if record.get("why")
        )),
    }  # fmt: skip


def _chart(records: list[Mapping[str, Any]], title: str, unit: str, value: Any) -> str:
    """A line for each implementation, of the training step where there is one."""
    what = "training step" if any(r["what"] == "training step" for r in records) else "forward"
    implementations = list(
        dict.fromkeys(record["kind"] for record in records if record["what"] == what)
    )
    series = []
    for place, implementation in enumerate(implementations):
        points = [
            record
            for record in records
            if (record["kind"], record["what"]) == (implementation, what)
        ]
        series.append(Series(implementation, [point["tokens"] for point in points],
                             [value(point) for point in points],
                             markers=True, colour=place))  # fmt: skip
    return line_chart(
        series, title=f"{title}, {what}", x_label="tokens", y_label=unit, from_zero=True
    )


def _growth(record: Mapping[str, Any]) -> dict[str, str]:
    ends = record["runs_out_at"]
    return {
        "name": f"{record['kind']}, {record['what']}", "memory": _named(record["memory_exponent"]),
        "time": _named(record["time_exponent"]), "ends": f"{ends:,} tokens" if ends else "–",
    }  # fmt: skip


def _named(exponent: float | None) -> str:
    """A fitted exponent, and which growth it is near to."""
    if exponent is None:
        return "too few lengths"
    return f"{'n²' if exponent > _HALFWAY else 'n'} (n^{exponent:.2f})"
