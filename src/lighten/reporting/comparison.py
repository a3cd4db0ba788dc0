"""Several runs side by side: which is best in what, and whether that can be told from chance."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lighten import runs as run_files
from lighten.data import FEWEST
from lighten.evaluation.metrics import METRICS
from lighten.evaluation.registry import OF_ANSWERS, described
from lighten.folders import SWEEP
from lighten.reporting import text
from lighten.reporting.bounds import reach
from lighten.reporting.charts import number
from lighten.runs import Run

# Figures of a training, which hang on where it was and on how many adapters shared it.
TRAINING = ("seconds", "tokens_per_second", "peak_bytes")
# More names than this are counted instead.
MOST_NAMES = 3


@dataclass(frozen=True)
class Column:
    """One figure of the comparison.

    Attributes:
        name: Its key.
        label: Its head.
        short: Its head in a terminal.
        lower_is_better: Whether less is more; None: no value is better than another.
        text: How a value reads.
        held_out: Whether it was measured by an evaluation, on its examples.
    """

    name: str
    label: str
    short: str
    lower_is_better: bool | None
    text: Callable[[float], str] = number
    held_out: bool = False


@dataclass
class Entry:
    """What one run trained (an adapter, or the base's own weights), or an untouched base.

    Attributes:
        run: Name of the run.
        label: What to call it: the run's name, with the adapter's where it has several.
        is_base: Whether it is a base, for reference.
        figures: Measured values by column.
        intervals: Their intervals, where known.
        differs: The settings in which its run differs from the others.
        measured_on: What its held-out figures were measured on; equal ones can be compared.
        measured_by: How, of each figure that hangs on more than the examples.
        examples: A digest of those, where it is known.
        watched_on: The same of the loss that was watched while it trained.
        trained_by: The machine of each figure of the training, and how many adapters it is of.
        losses: Negative log-likelihood and tokens of each held-out example, if recorded.
        difference: From the lowest held-out loss, with bounds that hold for all entries at once.
        verdict: How its loss stands to the lowest.
    """

    run: str
    label: str
    is_base: bool
    figures: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    differs: str = ""
    measured_on: tuple[Any, ...] | None = None
    measured_by: dict[str, Any] = field(default_factory=dict)
    examples: str | None = None
    watched_on: tuple[Any, ...] | None = None
    trained_by: dict[str, tuple[Any, int]] = field(default_factory=dict)
    losses: list[list[float]] | None = None
    difference: tuple[float, float, float] | None = None
    verdict: str = ""


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other.

    Attributes:
        entries: What was trained, in the order of the runs; bases last.
        columns: The figures that any of them has.
        best: The places in `entries` of the best of each column, by the column's name.
        sentences: The verdict, and what to know about it.
    """

    entries: list[Entry]
    columns: list[Column]
    best: dict[str, set[int]]
    sentences: list[str]


def _peak(count: float) -> str:
    """Memory as closely as the other figures: models of one size differ little."""
    return f"{number(count / 2**30)} GiB"


def _columns(extra_metrics: Sequence[str]) -> list[Column]:
    """Every figure that there may be, those of metrics that an evaluation was asked for too."""
    held_out = [
        Column(metric.name, metric.label, metric.name, metric.lower_is_better, held_out=True)
        for metric in (*METRICS, *map(described, extra_metrics))
        if metric.name != "perplexity"  # it is the loss in another unit
    ]
    return [
        *held_out,
        Column("watched", "held-out loss while training", "watched loss", True),
        Column("seconds", "training time", "time", True, text.duration),
        Column("tokens_per_second", "real tokens/s", "tok/s", False),
        Column("peak_bytes", "peak memory", "GiB", True, _peak),
        Column("file_bytes", "to ship", "MB", True, text.size),
    ]


# The columns for which a terminal has room, and the unit that their head names.
_NARROW = {
    "loss": None, "watched": None, "chrf": None, "seconds": None, "peak_bytes": 2**30,
    "file_bytes": 1e6,
}  # fmt: skip


def compare(runs: Sequence[Run]) -> Comparison:
    """Compare what the runs trained.

    Args:
        runs: Two or more; the same one twice is called by its place too.
    """
    names = run_names(runs)
    differs = _differences(runs)
    entries: list[Entry] = []
    bases: dict[tuple[Any, ...], Entry] = {}
    for run, name, differing in zip(runs, names, differs, strict=True):
        sweep = (run.folder / SWEEP).is_file()
        trained, base = _of_sweep(run, name) if sweep else _entries(run, name)
        for entry in trained:
            entry.differs = "; ".join(filter(None, (entry.differs, differing)))
        entries += trained
        if base is not None:
            bases.setdefault((base.label, base.measured_on, base.examples), base)
    measured = [entry for entry in entries if entry.measured_on is not None]
    if all(entry.examples for entry in measured):  # which earlier versions did not keep
        for entry in measured:
            entry.measured_on = (*(entry.measured_on or ()), entry.examples)
    sentences = [*_conclusions(entries), *_asked_differently(measured),
                 *_trained_differently(entries), *_notes(runs, names)]  # fmt: skip
    everything = [*entries, *bases.values()]
    extras = dict.fromkeys(
        name for run in runs for name in _settings(run.evaluation()).get("extra_metrics", [])
    )
    columns = [
        column
        for column in _columns(list(extras))
        if any(column.name in entry.figures for entry in entries)
        and not (column.name == "watched" and all("loss" in entry.figures for entry in entries))
    ]
    best = {column.name: _best(column, entries) for column in columns}
    return Comparison(everything, columns, best, sentences)


def _settings(evaluation: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """How a run was measured, if it was."""
    return (evaluation or {}).get("settings") or {}


def _asked_differently(entries: Sequence[Entry]) -> list[str]:
    """What it means that answers, or losses on general text, were measured in other ways."""
    sentences = []
    for column, what in (("chrf", "answers"), ("general_loss", "losses on general text")):
        ways = {entry.measured_by[column] for entry in entries if column in entry.figures}
        if len(ways) > 1:
            reason = (
                "with other settings (max_new_tokens, chat template)"
                if column == "chrf" else "on other text"
            )  # fmt: skip
            sentences.append(
                f"The {what} were measured {reason}, so these figures do not say which is better."
            )
    return sentences


def _trained_differently(entries: Sequence[Entry]) -> list[str]:
    """What it means that times and memory are of other machines, or of several adapters at once."""
    trained = [entry for entry in entries if "seconds" in entry.figures]
    sentences = dict[str, None]()
    if len({entry.trained_by["seconds"][0] for entry in trained}) > 1:
        sentences["The runs were trained on different machines, so times and memory do not say "
                  "which settings are cheaper."] = None  # fmt: skip
    for entry in trained:
        count = entry.trained_by["peak_bytes"][1]
        figures = "memory is" if entry.trained_by["seconds"][1] == 1 else "time and memory are"
        if count > 1:
            sentences[f"{entry.run} trained {count} adapters in one pass: its {figures} that of "
                      "all of them."] = None  # fmt: skip
    return list(sentences)


def _notes(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """What has to be said of the runs' held-out examples: each thing once, with its runs."""
    runs_by_note: dict[str, list[str]] = {}
    for run, name in zip(runs, names, strict=True):
        for note in text.held_out_notes(run.info(), run.evaluation()):
            runs_by_note.setdefault(note, []).append(name)
    return [
        f"{', '.join(dict.fromkeys(run_names))}: {note}" for note, run_names in runs_by_note.items()
    ]


def run_names(runs: Sequence[Run]) -> list[str]:
    """The runs' names, no two alike.

    The folder's whole path where two share a name, and the place where they share that too.
    """
    names = [run.name for run in runs]
    names = [
        name if names.count(name) == 1 else str(run.folder)
        for run, name in zip(runs, names, strict=True)
    ]
    return [
        name if names.count(name) == 1 else f"{name} ({place})"
        for place, name in enumerate(names, 1)
    ]


def _differences(runs: Sequence[Run]) -> list[str]:
    """The settings in which each run differs, in a line: those that it sets, if any."""
    rows = [row for row in run_files.compare(runs) if row["kind"] == "setting"]
    lines = []
    for place in range(len(runs)):
        values = {row["what"]: row["values"][place] for row in rows}
        chosen = {key: value for key, value in values.items() if value is not None} or values
        lines.append("; ".join(f"{key} {text.setting(value)}" for key, value in chosen.items()))
    return lines


def _entries(run: Run, name: str) -> tuple[list[Entry], Entry | None]:
    """What a run trained with its figures, and its base if that was measured."""
    info, evaluation = run.info(), run.evaluation() or {}
    measured = {model["name"]: model for model in evaluation.get("models", [])}
    saved = {record["name"]: record for record in info.get("adapters") or []}
    trained = list(dict.fromkeys([*saved, *(model for model in measured if model != "base")]))
    if run.is_model_alone() and not trained:
        trained = [*measured]  # the base is what was measured, and not for reference
    status = str(info.get("status", "not started"))
    tail = "" if status == "finished" else f" ({status})"
    entries = []
    for adapter in trained or [""]:
        label = name if len(trained) <= 1 else f"{name} {adapter}"
        entry = Entry(name, label + tail, is_base=False)
        _add(entry, info.get("training") or {}, TRAINING)
        entry.trained_by = _trained_by(info, max(1, len(saved)))
        if saved.get(adapter, {}).get("diverged"):  # it has no file, and is not evaluated
            entry.verdict = "diverged"
        else:
            _add(entry, saved.get(adapter, {}), ("file_bytes",))
        watched = saved.get(adapter, {}).get("eval_loss")
        if watched is not None:
            entry.figures["watched"] = float(watched)
            # Of files of their own, or a part of the training data.
            data = info.get("data") or {}
            files = data.get("eval_sha256") or data.get("sha256")
            entry.watched_on = (data.get("eval_rows"), data.get("eval_supervised_tokens"), files)
        if adapter in measured:
            _add_measured(entry, measured[adapter], evaluation, info)
        entries.append(entry)
    if "base" not in measured or "base" in trained:
        return entries, None
    model = Path(str((info.get("base") or {}).get("name", ""))).name
    stored = (info.get("base") or {}).get("quantization")
    label = f"base {model}".strip() + (f" in {stored}" if stored else "")
    base = Entry(name, label, is_base=True)
    _add_measured(base, measured["base"], evaluation, info)
    return entries, base


def arm_of_sweep(run: Run) -> dict[str, Any] | None:
    """What a sweep knows of the arm that it recommends, else of that with the lowest loss."""
    data = json.loads((run.folder / SWEEP).read_text(encoding="utf-8"))
    name = (data.get("recommendation") or {}).get("arm")
    losses = {
        arm["name"]: arm["loss"]["value"]
        for arm in data.get("arms", [])
        if arm["reference"] is None and (arm.get("loss") or {}).get("value") is not None
    }
    chosen = min(losses, key=losses.__getitem__, default=None) if name is None else name
    return next((arm for arm in data.get("arms", []) if arm["name"] == chosen), None)


def _of_sweep(run: Run, name: str) -> tuple[list[Entry], None]:
    """What a sweep measured of one arm; see `arm_of_sweep`."""
    arm = arm_of_sweep(run)
    if arm is None:
        return [Entry(name, f"{name} (a sweep that has measured no arm)", is_base=False)], None
    sets = "; ".join(f"{key} {text.setting(value)}" for key, value in arm["sets"].items())
    entry = Entry(name, f"{name}: {arm['name']}", is_base=False, differs=sets)
    _add(entry, arm, (*TRAINING, "file_bytes"))
    # Time is the arm's share of a pass already; memory is that of all arms in it.
    info = {**run.info(), "training": {"method": arm.get("peak_method")}}
    entry.trained_by = _trained_by(info, 1)
    entry.trained_by["peak_bytes"] = (entry.trained_by["peak_bytes"][0], int(arm["together"]))
    model: dict[str, Any] = {"metrics": {**arm.get("metrics", {}), "loss": arm.get("loss") or {}}}
    file = run.folder / "arms" / f"{arm['name']}.json"
    if file.is_file():
        measured = json.loads(file.read_text(encoding="utf-8"))
        pairs = zip(measured["nll"], measured["tokens"], strict=True)
        model["losses"] = [list(pair) for pair in pairs]
        limit = measured.get("max_new_tokens") or run.recipe().evaluate.max_new_tokens
        template = ((info.get("data") or {}).get("template") or {}).get("name")
        asked = {"max_new_tokens": limit, "chat_template": template}
        data = {"rows": len(model["losses"]), "examples_sha256": measured.get("chosen_sha256")}
        _add_measured(entry, model, {"dataset": data, "settings": asked}, {})
    return [entry], None


def _trained_by(info: Mapping[str, Any], count: int) -> dict[str, tuple[Any, int]]:
    """What figures of a training hang on beside its settings: where, and for how many adapters."""
    machine, training = info.get("machine") or {}, info.get("training") or {}
    gpus = [gpu["name"] for gpu in machine.get("gpus") or ()]
    on_gpu = str(training.get("method")).startswith("cuda")
    place = (*gpus,) if on_gpu else (machine.get("processor"), machine.get("cores"))
    return dict.fromkeys(TRAINING, (place, count))


def _add(entry: Entry, source: Mapping[str, Any], keys: Sequence[str]) -> None:
    entry.figures |= {key: float(source[key]) for key in keys if source.get(key) is not None}


def _add_measured(
    entry: Entry, model: Mapping[str, Any], evaluation: Mapping[str, Any], info: Mapping[str, Any]
) -> None:
    """Held-out figures of one model."""
    for metric, estimate in model["metrics"].items():
        if estimate.get("value") is None:
            continue
        entry.figures[metric] = float(estimate["value"])
        if estimate.get("low") is not None and estimate.get("high") is not None:
            entry.intervals[metric] = (float(estimate["low"]), float(estimate["high"]))
    entry.losses = model.get("losses")
    dataset = evaluation.get("dataset") or {}
    # Losses per token of two tokenizers cannot be compared, whatever the examples are.
    tokens = tuple(tokens for _, tokens in entry.losses) if entry.losses else None
    base = None if tokens else (info.get("base") or {}).get("name")
    entry.measured_on = (dataset.get("rows"), tokens or dataset.get("path"), base)
    entry.examples = dataset.get("examples_sha256")
    settings = _settings(evaluation)
    asked = (settings.get("max_new_tokens"), settings.get("chat_template"))
    entry.measured_by = dict.fromkeys((*OF_ANSWERS, *settings.get("extra_metrics", [])), asked)
    entry.measured_by["general_loss"] = (settings.get("general_text") or {}).get("sha256")


def _best(column: Column, entries: Sequence[Entry]) -> set[int]:
    """Places of the best values of a column, where some are better than others.

    A cost is one of those that read alike: 0.251 s and 0.252 s are no difference.
    """
    values = {place: entry.figures[column.name] for place, entry in enumerate(entries)
              if column.name in entry.figures}  # fmt: skip
    read = {place: value if column.held_out or column.name == "watched" else column.text(value)
            for place, value in values.items()}  # fmt: skip
    if column.lower_is_better is None or len(set(read.values())) < 2:
        return set()
    ways = {
        (entries[place].measured_on, entries[place].measured_by.get(column.name))
        for place in values
    }
    if column.held_out and len(ways) > 1:
        return set()
    if column.name == "watched" and len({entries[place].watched_on for place in values}) > 1:
        return set()
    if len({entries[place].trained_by.get(column.name) for place in values}) > 1:
        return set()
    best = (min if column.lower_is_better else max)(values, key=values.__getitem__)
    return {place for place, value in read.items() if value == read[best]}


def _conclusions(entries: Sequence[Entry]) -> list[str]:
    """Set each entry's difference and verdict, and say it in sentences."""
    measured = [entry for entry in entries if "loss" in entry.figures]
    missing = [entry.run for entry in entries if entry.measured_on is None and not entry.verdict]
    sentences = []
    if missing:
        names = list(dict.fromkeys(missing))
        sentences.append(
            f"Not evaluated: {', '.join(names)} (lighten evaluate RUN); without that there is no "
            "verdict on it."
        )
    if len(measured) < 2:
        return sentences
    if len({entry.measured_on for entry in measured}) > 1:
        return [
            "The runs were measured on different held-out examples or with different tokenizers, "
            "so their figures do not say which is better.",
            *sentences,
        ]
    best = min(range(len(measured)), key=lambda place: measured[place].figures["loss"])
    lowest = measured[best]
    lowest.verdict = "lowest"
    few = int((lowest.measured_on or (0,))[0] or 0) < FEWEST
    intervals = [entry.intervals.get("loss", (np.nan, np.nan)) for entry in measured]
    off = reach([entry.losses for entry in measured], intervals)[best]
    for entry, half in zip(measured, off.tolist(), strict=True):
        if entry is lowest:
            continue
        value = entry.figures["loss"] - lowest.figures["loss"]
        entry.difference = None if np.isnan(half) else (value, value - half, value + half)
        if few:
            entry.verdict = "too few examples"
        elif entry.difference is None:
            entry.verdict = "not compared"
        elif entry.difference[1] > 0:
            entry.verdict = "worse"
        else:
            entry.verdict = "cannot be told apart"
    return [_verdict(lowest, [entry for entry in measured if entry is not lowest]), *sentences]


def _verdict(lowest: Entry, other_entries: Sequence[Entry]) -> str:
    """Which is best, and what cannot be told apart from it."""
    parts = [f"{lowest.label} has the lowest held-out loss ({number(lowest.figures['loss'])})"]
    for verdict, phrase in (
        ("cannot be told apart", "cannot be told apart from it"),
        ("worse", "worse"),
        ("too few examples", f"measured on too few examples to tell (fewer than {FEWEST})"),
        ("not compared", "not compared"),
    ):
        labels = [entry.label for entry in other_entries if entry.verdict == verdict]
        if labels:
            verb = (
                "" if verdict == "cannot be told apart" else "is " if len(labels) == 1 else "are "
            )
            who = ", ".join(labels) if len(labels) <= MOST_NAMES else f"{len(labels)} others"
            parts.append(f"{who} {verb}{phrase}")
    advice = ""
    if any(entry.verdict == "cannot be told apart" for entry in other_entries):
        advice = " Of those that cannot be told apart, take the cheapest."
    return f"{'; '.join(parts)}.{advice}"


def difference_text(entry: Entry) -> str:
    """An entry's difference with its bounds, or nothing."""
    if entry.difference is None:
        return ""
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*entry.difference)


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """The comparison for a terminal: heads, and a row per entry; `*` marks the best of a column."""
    chosen = [column for column in comparison.columns if column.name in _NARROW]
    rows = []
    for place, entry in enumerate(comparison.entries):
        row = [entry.label]
        for column in chosen:
            value = entry.figures.get(column.name)
            mark = "*" if place in comparison.best[column.name] else ""
            if value is None:
                row.append("–")
            else:
                unit = _NARROW[column.name]
                row.append((number(value / unit) if unit else column.text(value)) + mark)
        rows.append([*row, f"{difference_text(entry)} {entry.verdict}".strip()])
    return ["", *(column.short for column in chosen), "above the lowest loss"], rows
