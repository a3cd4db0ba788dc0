"""What `lighten bench` prints: tables of its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Table = tuple[list[str], list[list[str]]]


def tables(result: Mapping[str, Any]) -> list[Table]:
    """A table for each part of a result."""
    shown = {
        "size": (["size", "parameters", "files", "in memory", "of checkpoint"], _size),
        "generate": (["generate", "prefill tokens/s", "decode tokens/s", "first token",
                      "between p50 / p99", "peak", "spread"], _generate),
        "attention": (["attention", "time", "peak", "spread"], _attention),
        "train": (["train", "step", "real tokens/s", "peak", "planned", "spread"], _train),
        "max-batch": (["max-batch", "largest", "planned", "too much from"], _largest),
    }  # fmt: skip
    found: list[Table] = []
    for part, (columns, cells) in shown.items():
        own = [record for record in result["records"] if record["part"] == part]
        if own:
            rows = []
            for record in own:
                row = ["–"] * (len(columns) - 1) if record.get("why") else cells(record)
                rows.append([record["name"], *row])
            found.append((columns, rows))
    return found


def reasons(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each reason that something could not be measured, with what it was."""
    found: dict[str, list[str]] = {}
    for own in records:
        if own.get("why"):
            found.setdefault(own["why"], []).append(f"{own['part']}: {own['name']}")
    return [
        f"not measured: {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {why}"
        for why, names in found.items()
    ]


def _size(own: Mapping[str, Any]) -> list[str]:
    share = own.get("share_of_checkpoint")
    count = own.get("parameters")
    return [
        "–" if count is None else f"{count:,}", size(own.get("file_bytes")),
        size(own.get("resident_bytes") or own.get("weights_bytes")),
        "–" if share is None else f"{100 * share:.2f} %",
    ]  # fmt: skip


def _generate(own: Mapping[str, Any]) -> list[str]:
    between = own["between_tokens_s"]
    return [
        f"{own['prefill_tokens_per_s']:,.0f}", f"{own['decode_tokens_per_s']:,.1f}",
        time(own["first_token_s"]["median"]),
        f"{time(between['p50'])} / {time(between['p99'])}", size(own["peak_bytes"]),
        spread(own["seconds"]),
    ]  # fmt: skip


def _attention(own: Mapping[str, Any]) -> list[str]:
    if "time_exponent" in own:
        ends = own["runs_out_at"]
        return [
            _power(own["time_exponent"]), _power(own["memory_exponent"]),
            f"runs out at {ends:,} tokens" if ends else "–",
        ]  # fmt: skip
    return [time(own["seconds"]["median"]), size(own["peak_bytes"]), spread(own["seconds"])]


def _train(own: Mapping[str, Any]) -> list[str]:
    return [
        time(own["seconds"]["median"]), f"{own['tokens_per_s']:,.0f}", size(own["peak_bytes"]),
        size(own.get("predicted_bytes")), spread(own["seconds"]),
    ]  # fmt: skip


def _largest(own: Mapping[str, Any]) -> list[str]:
    return [_count(own["largest"]), _count(own["planned"]), _count(own["smallest_too_much"])]


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def comparison(found: Mapping[str, Any]) -> Table:
    """The table of `lighten bench --compare`."""
    rows = []
    for own in found["rows"]:
        shown = size if own["figure"].endswith("_bytes") else time
        if own["figure"] == "largest":
            shown = _count  # type: ignore[assignment]  # of whole numbers
        ratio = "–" if own["ratio"] is None else f"{own['ratio']:.3f}"
        if own["low"] is not None:
            ratio += f" [{own['low']:.3f}, {own['high']:.3f}]"
        rows.append([
            f"{own['part']}: {own['name']}", own["figure"], shown(own["before"]),
            shown(own["after"]), ratio, own["verdict"],
        ])  # fmt: skip
    return ["what", "figure", "before", "after", "ratio", ""], rows


def spread(timing: Mapping[str, Any]) -> str:
    """How well a time is known, and from how many repeats."""
    said = f"±{100 * timing['spread']:.1f} % of {timing['repeats']}"
    return said if timing["settled"] else f"{said}, not settled"


def time(seconds: float | None) -> str:
    """Seconds in a unit that fits."""
    if seconds is None:
        return "–"
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


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
    loose = [own for own in records if "seconds" in own and not own["seconds"]["settled"]]
    if not loose:
        return None
    noun = "time" if len(loose) == 1 else "times"
    return (
        f"{len(loose)} {noun} did not come within {100 * loose[0]['seconds']['bound']:.0f} %: the "
        "machine is busy, or the time too short; more --seconds help"
    )
