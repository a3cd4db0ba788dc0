"""What `lighten bench` prints: tables of its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Table = tuple[list[str], list[list[str]]]


def tables(result: Mapping[str, Any]) -> list[Table]:
    """A table for each part of a result."""
    parts = {
        "size": (["size", "parameters", "files", "in memory", "of checkpoint"], _size),
        "generate": (["generate", "prefill tokens/s", "decode tokens/s", "first token",
                      "between p50 / p99", "peak", "planned", "spread"], _generate),
        "attention": (["attention", "time", "peak", "spread"], _attention),
        "train": (["train", "step", "real tokens/s", "peak", "planned", "spread"], _train),
        "max-batch": (["max-batch", "largest", "planned", "too much from"], _largest),
    }  # fmt: skip
    rendered: list[Table] = []
    for part, (columns, cells) in parts.items():
        records = [record for record in result["records"] if record["part"] == part]
        if records:
            rows = []
            for record in records:
                row = ["–"] * (len(columns) - 1) if record.get("why") else cells(record)
                rows.append([record["name"], *row])
            rendered.append((columns, rows))
    return rendered


def reasons(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each reason that something could not be measured, with what it was."""
    names_by_reason: dict[str, list[str]] = {}
    for record in records:
        if record.get("why"):
            names_by_reason.setdefault(record["why"], []).append(
                f"{record['part']}: {record['name']}"
            )
    return [
        f"not measured: {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {why}"
        for why, names in names_by_reason.items()
    ]


def _size(record: Mapping[str, Any]) -> list[str]:
    share = record.get("share_of_checkpoint")
    count = record.get("parameters")
    return [
        "–" if count is None else f"{count:,}", size(record.get("file_bytes")),
        size(record.get("resident_bytes") or record.get("weights_bytes")),
        "–" if share is None else f"{100 * share:.2f} %",
    ]  # fmt: skip


def _generate(record: Mapping[str, Any]) -> list[str]:
    between = record["between_tokens_s"]
    return [
        f"{record['prefill_tokens_per_s']:,.0f}", f"{record['decode_tokens_per_s']:,.1f}",
        time(record["first_token_s"]["median"]),
        f"{time(between['p50'])} / {time(between['p99'])}", size(record["peak_bytes"]),
        size(record.get("predicted_bytes")), spread(record["seconds"]),
    ]  # fmt: skip


def _attention(record: Mapping[str, Any]) -> list[str]:
    if "time_exponent" in record:
        ends = record["runs_out_at"]
        return [
            _power(record["time_exponent"]), _power(record["memory_exponent"]),
            f"runs out at {ends:,} tokens" if ends else "–",
        ]  # fmt: skip
    return [
        time(record["seconds"]["median"]), size(record["peak_bytes"]), spread(record["seconds"]),
    ]  # fmt: skip


def _train(record: Mapping[str, Any]) -> list[str]:
    return [
        time(record["seconds"]["median"]), f"{record['tokens_per_s']:,.0f}",
        size(record["peak_bytes"]), size(record.get("predicted_bytes")), spread(record["seconds"]),
    ]  # fmt: skip


def _largest(record: Mapping[str, Any]) -> list[str]:
    return [
        _count(record["largest"]),
        _count(record["planned"]),
        _count(record["smallest_too_much"]),
    ]


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def comparison(result: Mapping[str, Any]) -> Table:
    """The table of `lighten bench --compare`."""
    rows = []
    for row in result["rows"]:
        show = size if row["figure"].endswith("_bytes") else time
        if row["figure"] == "largest":
            show = _count  # type: ignore[assignment]  # of whole numbers
        ratio = "–" if row["ratio"] is None else f"{row['ratio']:.3f}"
        if row["low"] is not None:
            ratio += f" [{row['low']:.3f}, {row['high']:.3f}]"
        rows.append([
            f"{row['part']}: {row['name']}", row["figure"], show(row["before"]),
            show(row["after"]), ratio, row["verdict"],
        ])  # fmt: skip
    return ["what", "figure", "before", "after", "ratio", ""], rows


def spread(timing: Mapping[str, Any]) -> str:
    """How well a time is known, and from how many repeats."""
    text = f"±{100 * timing['spread']:.1f} % of {timing['repeats']}"
    return text if timing["settled"] else f"{text}, not settled"


def time(seconds: float | None) -> str:
    """Seconds in a unit that fits."""
    if seconds is None:
        return "–"
    # Three digits of 999.5 are 1e+03: what is rounded to the next unit is told in it.
    if seconds >= 0.9995:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 0.9995e-3 else f"{seconds * 1e6:.3g} µs"


def size(count: float | None) -> str:
    """Bytes in a unit that fits."""
    if count is None:
        return "–"
    for unit, power in (("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if count >= 1024**power:
            return f"{count / 1024**power:,.2f} {unit}"
    return f"{count:.0f} B"


def _power(exponent: float | None) -> str:
    return "too few lengths" if exponent is None else f"grows as n^{exponent:.2f}"


def unsettled(records: Sequence[Mapping[str, Any]]) -> str | None:
    """A sentence on times that did not come within their bound."""
    loose = [
        record for record in records if "seconds" in record and not record["seconds"]["settled"]
    ]
    if not loose:
        return None
    noun = "time" if len(loose) == 1 else "times"
    return (
        f"{len(loose)} {noun} did not come within {100 * loose[0]['seconds']['bound']:.0f} %: the "
        "machine is busy, or the time too short; more --seconds help"
    )
