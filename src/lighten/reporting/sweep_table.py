"""A sweep's table, for the terminal and for the page: one row per arm."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lighten import runs
from lighten.evaluation import registry
from lighten.reporting.charts import number
from lighten.reporting.text import duration, gib, setting, size
from lighten.wording import significant

FILE = "sweep.json"
# Of what `_cells` and `_narrow_cells` write, and of what is special about an arm.
COLUMNS = ("time", "real tokens/s", "peak memory", "trainable", "to ship", "served adds", "")
NARROW_COLUMNS = ("time", "tok/s", "GiB", "params", "MB", "served", "")
# What a search calls its arms.
_DRAWN = re.compile(r"trial-\d+")


def table(
    data: Mapping[str, Any], metric: str, *, narrow: bool = False
) -> tuple[list[str], list[list[str]]]:
    """Columns, and a row per arm: recommended ones marked, references last.

    Args:
        data: What `sweep.json` holds.
        metric: Which metric stands beside the loss.
        narrow: In as few characters as it takes, units in the heads.
    """
    columns = ["arm", "held-out loss", *(NARROW_COLUMNS if narrow else COLUMNS)]
    if metric != "loss":
        columns.insert(2, metric if narrow else label_of(metric))
    rows = []
    for arm in ordered(data):
        row = [described(arm), with_error(arm.get("loss"), 3 if narrow else 4)]
        if metric != "loss":
            row.append(with_error(arm.get("metrics", {}).get(metric), 1 if narrow else 2))
        cells, mark = (_narrow_cells, "← take") if narrow else (_cells, "← take this")
        rows.append([*row, *cells(arm), remark(arm, data, mark)])
    return columns, rows


def _cells(arm: Mapping[str, Any]) -> list[str]:
    served = arm["served"]["share_of_base"]
    return [
        "–" if arm["seconds"] is None else duration(arm["seconds"]),
        number(arm["tokens_per_second"]),
        "–" if arm["peak_bytes"] is None else gib(arm["peak_bytes"]),
        f"{arm['trainable_parameters']:,}" if arm["trainable_parameters"] else "–",
        size(arm["file_bytes"]) if arm["file_bytes"] else "–",
        f"{significant(100 * served, 2)} % FLOPs" if served else "–",
    ]


def _narrow_cells(arm: Mapping[str, Any]) -> list[str]:
    served = arm["served"]["share_of_base"]
    count, size_bytes = arm["trainable_parameters"], arm["file_bytes"]
    return [
        "–" if arm["seconds"] is None else _clock(arm["seconds"]),
        number(arm["tokens_per_second"]),
        "–" if arm["peak_bytes"] is None else f"{arm['peak_bytes'] / 2**30:.2f}",
        f"{significant(count / 1e6, 3)}M" if count else "–",
        significant(size_bytes / 1e6, 3) if size_bytes else "–",
        f"+{significant(100 * served, 2)}%" if served else "–",
    ]


def described(arm: Mapping[str, Any]) -> str:
    """An arm's name, which says what it sets; of one that a search numbered, what was drawn too."""
    name = str(arm["name"])
    if not _DRAWN.fullmatch(name):
        return name
    drawn = (f"{key} {setting(value)}" for key, value in arm["sets"].items())
    return f"{name}: {', '.join(drawn)}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def shown(folder: Path) -> tuple[list[str], list[list[str]], list[str]]:
    """Table and sentences of a sweep's folder, for the terminal."""
    data = json.loads((folder / FILE).read_text(encoding="utf-8"))
    metric = metric_of(folder)
    sentences = [*data["recommendation"]["reasons"], *data.get("notes", []),
                 against_full(data, metric), shared_peak(data), *truncated(data)]  # fmt: skip
    if (taken := adapter_of(folder, data)) is not None:
        sentences.append(f"{data['recommendation']['arm']} is in {taken}")
    return *table(data, metric, narrow=True), [sentence for sentence in sentences if sentence]


def adapter_of(folder: Path, data: Mapping[str, Any]) -> Path | None:
    """Where the adapter of the recommended arm is; None where no arm is, or it is gone."""
    name = (data.get("recommendation") or {}).get("arm")
    for arm in data.get("arms", []):
        if arm["name"] == name:
            path = folder / str(arm["group"]) / "adapters" / str(arm["adapter"])
            return path if path.is_dir() else None
    return None


def truncated(data: Mapping[str, Any]) -> list[str]:
    """A sentence per arm that was cut to lower ranks."""
    sentences = []
    for name, curve in (data.get("truncated") or {}).items():
        losses = {point["rank"]: point["loss"] for point in curve["points"]}
        full, enough = curve["trained_rank"], curve["enough"]
        if enough is None:
            what = "there are too few examples to tell which lower rank is as good"
        elif enough < full:
            what = (
                f"cut to rank {enough} it is not found to be worse ({losses[enough]:.4f} against "
                f"{losses[full]:.4f})"
            )
        else:
            what = "every lower rank that it was cut to is worse"
        sentences.append(f"{name}, trained at rank {full}: {what}. Trained at a lower rank an "
                         "adapter may do better than one cut to it.")  # fmt: skip
    return sentences


def label_of(metric: str) -> str:
    """A metric as people read it."""
    return registry.described(metric).label


def metric_of(folder: Path) -> str:
    """The metric that a sweep reports beside the loss."""
    recipe = yaml.safe_load((folder / runs.RECIPE).read_text(encoding="utf-8"))
    return str(recipe["sweep"]["metric"])


def ordered(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Arms by size, references last."""
    arms: Sequence[dict[str, Any]] = data.get("arms", [])
    return sorted(
        arms, key=lambda arm: (arm["reference"] is not None, arm["trainable_parameters"] or 0)
    )


def recommended(data: Mapping[str, Any]) -> set[str]:
    """Names of the arms of the setting that is recommended."""
    for compared in data.get("settings", []):
        if compared["recommended"]:
            return set(compared["arms"])
    return set()


def remark(arm: Mapping[str, Any], data: Mapping[str, Any], mark: str) -> str:
    """What is special about an arm; `mark` where it is recommended."""
    if arm["name"] in recommended(data):
        return mark
    if arm["reference"]:
        return f"reference, {_left(arm)}" if arm["status"] == "left" else "reference"
    if arm["status"] == "left":
        return _left(arm)
    if "loss" in arm and not has_loss(arm):
        return "loss is not a number"
    return "" if arm["status"] == "finished" else str(arm["status"])


def _left(arm: Mapping[str, Any]) -> str:
    """That an arm was not trained to its end, and when it ended."""
    return f"left after step {arm['steps']}"


def has_loss(arm: Mapping[str, Any]) -> bool:
    """Whether an arm has a held-out loss that is a number."""
    return _is_number(arm.get("loss"))


def _is_number(estimate: Mapping[str, Any] | None) -> bool:
    value = None if estimate is None else estimate.get("value")
    return value is not None and math.isfinite(value)


def with_error(estimate: Mapping[str, Any] | None, decimals: int) -> str:
    """A value with its standard error."""
    if estimate is None or not _is_number(estimate):
        return "–"
    error = estimate.get("se")
    text = f"{estimate['value']:.{decimals}f}"
    return text if error is None else f"{text} ± {error:.{decimals}f}"


def shared_peak(data: Mapping[str, Any]) -> str:
    """Why several arms have one peak."""
    together = [arm for arm in data.get("arms", []) if arm.get("together", 1) > 1]
    if not together:
        return ""
    return (
        "Arms that trained in one pass share its peak memory; their time is the pass's by their "
        "share of its arithmetic."
    )


def against_full(data: Mapping[str, Any], metric: str) -> str | None:
    """The recommended arm beside full fine-tuning, both measured here."""
    arms = {arm["name"]: arm for arm in data.get("arms", [])}
    full = arms.get("full")
    name = data.get("recommendation", {}).get("arm")
    if full is None or name not in arms or not (has_loss(full) and has_loss(arms[name])):
        return None
    arm = arms[name]
    parts = []
    if full["peak_bytes"] and arm["peak_bytes"]:
        with_others = f" (shared with {arm['together'] - 1} more)" if arm["together"] > 1 else ""
        parts.append(
            f"peak memory {gib(full['peak_bytes'])} → {gib(arm['peak_bytes'])}{with_others}"
        )
    if full["tokens_per_second"] and arm["tokens_per_second"]:
        ratio = arm["tokens_per_second"] / full["tokens_per_second"]
        faster = f"{ratio:.2g}x faster" if ratio >= 1 else f"{1 / ratio:.2g}x slower"
        parts.append(f"{faster} per token")
    cut = [each for each in (full, arm) if each["status"] == "left"]
    if not cut:
        difference = arm["loss"]["value"] - full["loss"]["value"]
        parts.append(f"held-out loss {difference:+.3f}")
    metric_difference = arm.get("against", {}).get("full")
    if metric_difference and not cut and metric not in ("loss", "perplexity"):
        parts.append(
            f"{label_of(metric)} {metric_difference['value']:+.2f} ({metric_difference['verdict']})"
        )
    parts.append(f"{size(full['file_bytes'])} → {size(arm['file_bytes'])} to ship")
    rate = full["sets"].get("learning_rate")
    sentence = (
        f"Against full fine-tuning (learning rate {rate:g}, not tuned), {name}: {', '.join(parts)}."
    )
    if cut:
        left = " and ".join(f"{each['name']} {_left(each)} of {each['of_steps']}" for each in cut)
        sentence += f" {left}, so their losses are not compared."
    return sentence
