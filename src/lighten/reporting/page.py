"""The verb `report`: runs as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from lighten import runs as run_files
from lighten.evaluation.metrics import METRICS
from lighten.evaluation.registry import described
from lighten.folders import COMPARISON, REPORT, SWEEP, resume_command
from lighten.reporting import attention, comparison, evaluated, planned, quantized, text
from lighten.reporting.charts import Series, line_chart, number, smoothed
from lighten.runs import Run
from lighten.wording import counted, typed

# Answers shown side by side; all of them are in evaluation.json.
SHOWN_EXAMPLES = 24
# Of these so many are seen at once, the rest unfolds.
FIRST_EXAMPLES = 4


def write_page(runs: Sequence[Run], output: Path | None = None) -> Path:
    """Write the page of one run or several.

    Args:
        runs: At least one.
        output: Where; default `report.html` in the run's folder, of several `comparison.html` in
            the first one's.

    Returns:
        Where it was written.
    """
    target = output or runs[0].folder / (REPORT if len(runs) == 1 else COMPARISON)
    run_files.write_text(target, page(runs))
    return target


def environment() -> jinja2.Environment:
    """Where templates come from and what they may call."""
    env = jinja2.Environment(
        loader=jinja2.PackageLoader("lighten.reporting", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    env.filters |= {
        "count": counted, "mb": text.size, "gib": text.gib, "duration": text.duration,
        "number": number,
    }  # fmt: skip
    return env


def page(runs: Sequence[Run]) -> str:
    """The page as HTML text."""
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            title=" · ".join(run.name for run in runs),
            runs=[_run(_trained(run)) for run in runs],
            comparison=_comparison(runs) if len(runs) > 1 else None,
            marked=text.marked,
            first_examples=FIRST_EXAMPLES,
            metric_labels={metric.name: metric.label for metric in METRICS},
        )
    )


def _run(run: Run) -> dict[str, Any]:
    """What the template shows of one run."""
    parts = ("base", "data", "machine", "adapters", "choices", "status", "error", "started",
             "ended", "commit")  # fmt: skip
    info = {**dict.fromkeys(parts), **run.info()}  # a run that failed early lacks some
    evaluation, lines = run.evaluation(), run.metrics()
    return {
        "name": run.name,
        "info": info,
        "headline": text.headline(info, evaluation),
        "commands": next_commands(run, info, evaluated=evaluation is not None),
        "saved": _saved(run),
        "tiles": tiles(info, evaluation),
        "loss": loss_chart([(run.name, lines)], named=False),
        "speed": _speed_chart(lines),
        "memory": _memory_chart(lines),
        "plan": planned.section(run.plan(), info),
        "table": _table(evaluation),
        "evaluated": evaluated.section(evaluation),
        "quantized": quantized.section(run.quantized()),
        "attention": attention.section(run.benched()),
        "differences": {
            (d["adapter"], d["metric"]): d for d in (evaluation or {}).get("differences", [])
        },
        "examples": (evaluation or {}).get("examples", [])[:SHOWN_EXAMPLES],
        "example_count": len((evaluation or {}).get("examples", [])),
        "evaluation": evaluation,
        "held_out_notes": text.held_out_notes(info, evaluation),
        "watched_notes": text.watched_notes(info, evaluation),
        "sizes": _sizes(info),
        "recipe": (run.folder / run_files.RECIPE).read_text(encoding="utf-8"),
    }


def tiles(info: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """The figures a reader wants first."""
    tiles = []
    models = (evaluation or {}).get("models", [])
    if len(models) > 1:
        base, tuned = models[0], min(models[1:], key=_held_out_loss)
        # Of several adapters the tiles show the one with the lowest held-out loss, by name.
        whose = f", {tuned['name']}" if len(models) > 2 else ""
        for name, label in (("perplexity", "Perplexity"), ("chrf", "chrF"), ("bleu", "BLEU")):
            if name in base["metrics"] and name in tuned["metrics"]:
                differences = (evaluation or {}).get("differences", [])
                tiles.append(
                    {
                        "label": f"{label}{whose}",
                        "before": number(base["metrics"][name]["value"]),
                        "after": number(tuned["metrics"][name]["value"]),
                        "note": text.verdict_of(differences, tuned["name"], name),
                    }
                )
    training = info.get("training")
    if training:
        speed = training.get("tokens_per_second")
        tiles.append(
            {
                "label": "Training",
                "before": "",
                "after": text.duration(training["seconds"]),
                "note": f"{speed:,.0f} real tokens/s" if speed else "",
            }
        )
        tiles.append(
            {
                "label": "Peak memory",
                "before": "",
                "after": text.gib(training["peak_bytes"]),
                "note": training.get("method", ""),
            }
        )
    if info.get("adapters"):
        adapter = info["adapters"][0]
        kind = str(adapter.get("kind", "adapter")).capitalize()
        tiles.append(
            {
                "label": f"{kind} file"
                if len(info["adapters"]) == 1
                else f"File of {adapter['name']}",
                "before": "",
                "after": text.size(adapter["file_bytes"]),
                "note": f"beside the base's {text.size(info['base']['weights_bytes'])}",
            }
        )
    return tiles


def _held_out_loss(model: Mapping[str, Any]) -> float:
    value = model["metrics"].get("loss", {}).get("value")
    return float("inf") if value is None else float(value)


def _adapters(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(str(line["adapter"]) for line in lines))


def loss_chart(runs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], *, named: bool) -> str:
    """Training loss, raw and smoothed, and held-out loss with its standard error."""
    series: list[Series] = []
    colour = 0
    for run, lines in runs:
        for adapter in _adapters(lines):
            label = " ".join(
                part for part in (run if named else "", "" if adapter == "default" else adapter)
                if part
            )  # fmt: skip
            train = [m for m in lines if m["adapter"] == adapter and m["kind"] == "train"]
            watched = [m for m in lines if m["adapter"] == adapter and m["kind"] == "eval"]
            steps, losses = [m["step"] for m in train], [m["loss"] for m in train]
            if not named:
                series.append(Series(f"{label} train", steps, losses, faint=True, colour=colour))
                series.append(
                    Series(f"{label} train, smoothed".strip(), steps, smoothed(losses),
                           colour=colour)
                )  # fmt: skip
                colour += 1
            series.append(
                Series(
                    f"{label} held-out".strip(),
                    [m["step"] for m in watched],
                    [m["loss"] for m in watched],
                    [m.get("loss_se") for m in watched],
                    markers=True,
                    colour=colour,
                )
            )
            colour += 1
    return line_chart(
        series, title="Loss over steps", x_label="optimiser step", y_label="loss, nats per token"
    )


def _per_step(lines: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    """A figure of each step, summed over its adapters."""
    totals: dict[int, float] = {}
    for line in lines:
        if line["kind"] == "train":
            totals[line["step"]] = totals.get(line["step"], 0.0) + line[key]
    return totals


def _speed_chart(lines: Sequence[Mapping[str, Any]]) -> str:
    tokens = _per_step(lines, "tokens")
    seconds = {line["step"]: line["seconds"] for line in lines if line["kind"] == "train"}
    speed = [tokens[step] / seconds[step] if seconds[step] else None for step in tokens]
    return line_chart(
        [
            Series("per step", list(tokens), speed, faint=True),
            Series("smoothed", list(tokens), smoothed(speed)),
        ],
        title="Speed over steps",
        x_label="optimiser step",
        y_label="real tokens per second",
    )


def _memory_chart(lines: Sequence[Mapping[str, Any]]) -> str:
    train = [line for line in lines if line["kind"] == "train"]
    peaks = {line["step"]: line["peak_bytes"] / 2**30 for line in train if line.get("peak_bytes")}
    return line_chart(
        [Series("peak so far", list(peaks), list(peaks.values()))],
        title="Peak memory over steps",
        x_label="optimiser step",
        y_label="GiB",
        from_zero=True,
    )


def _saved(run: Run) -> list[str]:
    """Folders of what was trained, as far as it is there."""
    model = run.model()
    return [str(path) for path in (*run.adapters().values(), *([model] if model else []))]


def _table(evaluation: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Rows of the before-and-after table: a metric and each model's estimate of it."""
    if evaluation is None:
        return []
    extras = evaluation.get("settings", {}).get("extra_metrics", [])
    return [
        {
            "name": metric.name,
            "label": metric.label,
            "better": "lower is better" if metric.lower_is_better else "higher is better",
            "cells": [
                {"model": model["name"], **model["metrics"][metric.name]}
                for model in evaluation["models"]
            ],
        }
        for metric in (*METRICS, *map(described, extras))
        if all(metric.name in model["metrics"] for model in evaluation["models"])
    ]


def _sizes(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Bars to scale: the model and what training adds to ship."""
    if not info.get("base"):
        return []
    bars = [{"label": "base model, as loaded", "bytes": info["base"]["weights_bytes"]}]
    bars += [
        {
            "label": f"{adapter.get('kind', 'adapter')} {adapter['name']}",
            "bytes": adapter["file_bytes"],
        }
        for adapter in info.get("adapters") or []
        if adapter.get("file_bytes")
    ]
    longest = max(bar["bytes"] for bar in bars)
    return [{**bar, "share": 100 * bar["bytes"] / longest} for bar in bars]


def _comparison(runs: Sequence[Run]) -> dict[str, Any]:
    """What the template shows of several runs side by side."""
    compared = comparison.compare(runs)
    names = comparison.run_names(runs)
    return {
        "sentences": compared.sentences,
        "columns": [column.label for column in compared.columns],
        "rows": [
            {
                "label": entry.label,
                "is_base": entry.is_base,
                "differs": entry.differs,
                "verdict": entry.verdict,
                "difference": comparison.difference_text(entry),
                "cells": [
                    _cell(entry, column, place in compared.best[column.name])
                    for column in compared.columns
                ],
            }
            for place, entry in enumerate(compared.entries)
        ],
        "loss": loss_chart(
            [(name, _watched(run)) for name, run in zip(names, runs, strict=True)], named=True
        ),
    }


def _trained(run: Run) -> Run:
    """What is shown of a run beside others: of a sweep the run of the arm that it recommends."""
    arm = comparison.arm_of_sweep(run) if (run.folder / SWEEP).is_file() else None
    return run if arm is None else Run(run.folder / str(arm["group"]))


def _watched(run: Run) -> list[dict[str, Any]]:
    """Lines of a run's metrics; of a sweep those of the arm that it recommends."""
    arm = comparison.arm_of_sweep(run) if (run.folder / SWEEP).is_file() else None
    lines = _trained(run).metrics()
    return lines if arm is None else [line for line in lines if line["adapter"] == arm["adapter"]]


def _cell(entry: comparison.Entry, column: comparison.Column, best: bool) -> dict[str, Any]:
    """One figure of the comparison with its interval."""
    value, interval = entry.figures.get(column.name), entry.intervals.get(column.name)
    return {
        "label": column.label,
        "text": "–" if value is None else column.text(value),
        "interval": "" if interval is None else f"[{number(interval[0])}, {number(interval[1])}]",
        "best": best,
    }


def next_commands(run: Run, info: Mapping[str, Any], *, evaluated: bool) -> list[tuple[str, str]]:
    """What people do next with a run: commands, and what each is for."""
    folder = typed(run.folder)
    if info.get("status") in (*run_files.UNFINISHED, "failed"):
        return [(resume_command(run.folder), "go on from the newest checkpoint")]
    beside = (f"lighten runs compare {folder} RUN", "stand it beside another run")
    if info.get("status") == run_files.MODEL_ALONE:
        return [(f"lighten chat {folder}", "ask it yourself"), beside]
    recipe = run.recipe()
    commands = []
    if not evaluated and not (info.get("data") or {}).get("nothing_held_out"):
        commands.append((f"lighten evaluate {folder}", "measure it against the untouched base"))
        commands.append((f"lighten report {folder}", "write this page again, with the figures"))
    commands.append((f"lighten chat {folder} --compare", "ask it yourself, beside the base"))
    trained = recipe.cohort()
    rank = max((adapter.lora_r for adapter in trained), default=0)
    plain = recipe.method == "lora" and recipe.peft is None and not recipe.use_dora
    if plain and rank > 1:
        which = f" --adapter {typed(trained[0].name)}" if len(trained) > 1 else ""
        commands.append((f"lighten adapter info {folder}{which}", "how much of its rank it uses"))
        commands.append(
            (f"lighten adapter resize {folder}{which} --rank {max(1, rank // 2)}",
             "a smaller adapter file")
        )  # fmt: skip
    return [*commands, beside]
