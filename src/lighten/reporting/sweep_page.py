"""A sweep as one self-contained HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lighten import runs
from lighten.reporting import sweep_table, text
from lighten.reporting.charts import Point, Series, line_chart, number, scatter_chart, smoothed
from lighten.reporting.page import environment


def is_sweep(folder: Path) -> bool:
    """Whether a sweep lies in the folder."""
    return (folder / sweep_table.FILE).is_file()


def write_sweep_page(folder: Path, output: Path | None = None) -> Path:
    """Write the page of a sweep and return where.

    Args:
        folder: The sweep's.
        output: Where; default `report.html` in the folder.
    """
    target = output or folder / "report.html"
    runs.write_text(target, sweep_page(folder))
    return target


def sweep_page(folder: Path) -> str:
    """The page as HTML text."""
    data: dict[str, Any] = json.loads((folder / sweep_table.FILE).read_text(encoding="utf-8"))
    recipe = (folder / runs.RECIPE).read_text(encoding="utf-8")
    options = yaml.safe_load(recipe)["sweep"]
    metric = str(options["metric"])
    columns, rows = sweep_table.table(data, metric)
    arms = sweep_table.ordered(data)
    parts = ("base", "data", "machine", "versions", "plan", "tuned", "error", "started", "ended",
             "commit", "tree_clean", "recommendation", "groups", "spent_s", "status",
             "truncated", "notes")  # fmt: skip
    return environment().get_template("sweep.html.j2").render(
        title=f"{data['name']} · sweep",
        data={**dict.fromkeys(parts), **data},
        reasons=(data.get("recommendation") or {}).get("reasons", []),
        taken=sweep_table.adapter_of(folder, data),
        tiles=_tiles(data, metric),
        against_full=sweep_table.against_full(data, metric),
        columns=columns,
        rows=[
            {"cells": row, "chosen": arm["name"] in sweep_table.recommended(data)}
            for arm, row in zip(arms, rows, strict=True)
        ],
        shared_peak=sweep_table.shared_peak(data),
        settings=data.get("settings", []),
        left_early=[arm for arm in arms if arm["status"] == "left"],
        measured_on=next((arm for arm in arms if "chosen_on" in arm), None),
        metric=sweep_table.label_of(metric),
        metric_name=metric,
        held_out=held_out_chart(arms),
        training=_training_chart(arms),
        memory=_scatter(
            arms, "state_bytes", 2**20, "Loss against memory",
            "memory of what learns, MiB",
        ),
        time=_scatter(arms, "seconds", 1.0, "Loss against time", "training time, seconds"),
        options=options,
        tuned=_tuned(data),
        cut=sweep_table.truncated(data),
        recipe=recipe,
    )  # fmt: skip


def _tiles(data: Mapping[str, Any], metric: str) -> list[dict[str, str]]:
    """The figures a reader wants first."""
    arms = {arm["name"]: arm for arm in data.get("arms", [])}
    name = str((data.get("recommendation") or {}).get("arm"))
    tiles = [{"label": "Arms", "value": str(len([a for a in arms.values() if not a["reference"]])),
              "note": f"in {text.duration(data.get('spent_s'))}"}]  # fmt: skip
    if name not in arms or not sweep_table.has_loss(arms[name]):
        return tiles
    arm, base = arms[name], arms.get("base", {})
    if base.get("model") != arm.get("model"):  # that of another model
        base = {}
    tiles = [
        {"label": "Take", "value": name,
         "note": f"learning rate {arm['sets']['learning_rate']:g}"
         if "learning_rate" in arm["sets"] else ""},
        {"label": "Held-out loss", "value": f"{arm['loss']['value']:.3f}",
         "note": f"base {base['loss']['value']:.3f}" if sweep_table.has_loss(base) else ""},
        *tiles,
    ]  # fmt: skip
    estimate = arm.get("metrics", {}).get(metric)
    if estimate and metric != "loss":
        untouched = base.get("metrics", {}).get(metric)
        note = f"base {number(untouched['value'])}" if untouched else ""
        tiles.append({"label": sweep_table.label_of(metric).split(",")[0].capitalize()
                      if metric == "exact_match" else sweep_table.label_of(metric),
                      "value": number(estimate["value"]), "note": note})  # fmt: skip
    tiles.append({"label": "To ship", "value": text.size(arm["file_bytes"]),
                  "note": f"{arm['trainable_parameters']:,} parameters"})  # fmt: skip
    tiles.append({"label": "Peak memory", "value": text.gib(arm["peak_bytes"]),
                  "note": f"for {arm['together']} arms in one pass" if arm["together"] > 1
                  else ""})  # fmt: skip
    return tiles


def held_out_chart(arms: Sequence[Mapping[str, Any]]) -> str:
    """Every arm's held-out loss over the steps, with standard errors."""
    series = [
        Series(
            arm["name"], [p[0] for p in arm["curve"]], [p[1] for p in arm["curve"]],
            [p[2] for p in arm["curve"]], markers=True, colour=place,
        )
        for place, arm in enumerate(arms)
    ]  # fmt: skip
    return line_chart(
        series, title="Held-out loss over steps", x_label="optimiser step",
        y_label="held-out loss, nats per token",
    )  # fmt: skip


def _training_chart(arms: Sequence[Mapping[str, Any]]) -> str:
    """Every arm's smoothed training loss."""
    series = [
        Series(
            arm["name"], [p[0] for p in arm["train_curve"]],
            smoothed([p[1] for p in arm["train_curve"]]), colour=place,
        )
        for place, arm in enumerate(arms)
    ]  # fmt: skip
    return line_chart(
        series, title="Training loss over steps, smoothed", x_label="optimiser step",
        y_label="loss, nats per token",
    )  # fmt: skip


def _scatter(
    arms: Sequence[Mapping[str, Any]], key: str, unit: float, title: str, x_label: str
) -> str:
    """Held-out loss over a cost, with the frontier."""
    points = [
        Point(arm["name"], arm[key] / unit, arm["loss"]["value"], arm["loss"]["se"], place)
        for place, arm in enumerate(arms)
        if arm.get(key) and sweep_table.has_loss(arm)
    ]
    return scatter_chart(
        points, title=title, x_label=x_label, y_label="held-out loss, nats per token"
    )


def _tuned(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the short runs found, one row per setting."""
    rows = []
    for setting, outcome in (data.get("tuned") or {}).items():
        sets = {k: v for k, v in json.loads(setting).items() if k != "lora_alpha"}
        what = ", ".join(f"{key} {value}" for key, value in sets.items())
        losses = sorted(outcome["losses"].items(), key=lambda pair: float(pair[0]))
        rows.append({"what": what or "default", "best": outcome["best"], "losses": losses,
                     "at_the_edge": outcome["at_the_edge"]})  # fmt: skip
    return rows
