"""What a sweep found: `sweep.json`, made from the runs and measurements in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from lighten import runs
from lighten.evaluation import metrics
from lighten.evaluation.bootstrap import Resamples
from lighten.evaluation.registry import described
from lighten.evaluation.verdicts import verdict
from lighten.recipe import EvaluateOptions, Recipe
from lighten.recipe.steps import rows_per_step, steps_per_epoch
from lighten.runs import Run
from lighten.sweeps import costs
from lighten.sweeps.arms import FULL, Group
from lighten.sweeps.budget import TIME_UP, left_early
from lighten.sweeps.measure import BASE, Measurement, formula_of, statistics_of
from lighten.sweeps.recommend import Candidate, Recommendation, after_training, recommend
from lighten.wording import counted

FILE = "sweep.json"
# What a sweep may go on with otherwise, and costs an arm nothing.
_NO_COST = ("output_dir", "report_to", "logging_steps", "save_every", "save_steps",
            "save_total_limit", "evaluate", "quantize", "sweep")  # fmt: skip


@dataclass
class SweepResult:
    """A sweep's folder and what `sweep.json` holds.

    Attributes:
        folder: Where everything is.
        data: The file's content.
    """

    folder: Path
    data: dict[str, Any]

    def __repr__(self) -> str:
        arms = counted(sum(arm["reference"] is None for arm in self.arms), "arm")
        return f"SweepResult({str(self.folder)!r}, {arms}, recommended={self.recommended!r})"

    def __fspath__(self) -> str:
        """Its folder, so that it can be given to whatever takes a folder, as `lighten.report`."""
        return str(self.folder)

    def _repr_html_(self) -> str:
        """The recommendation and every arm, for notebooks."""
        # The report knows what it draws; it is looked up when a notebook asks.
        return str(import_module("lighten.reporting.notebook").sweep_html(self))

    @classmethod
    def read(cls, folder: Path) -> SweepResult:
        """What is in a sweep's folder."""
        return cls(folder, json.loads((folder / FILE).read_text(encoding="utf-8")))

    @property
    def recommended(self) -> str | None:
        """Name of the arm to take (the first of its seeds), or None."""
        name: str | None = self.data["recommendation"]["arm"]
        return name

    @property
    def arms(self) -> list[dict[str, Any]]:
        """Every arm with its figures, references last."""
        arms: list[dict[str, Any]] = self.data["arms"]
        return arms

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return self.data


def collect(folder: Path, recipe: Recipe, groups: Sequence[Group]) -> dict[str, Any]:
    """Arms and recommendation from what lies in the sweep's folder by now.

    Args:
        folder: The sweep's.
        recipe: The sweep's.
        groups: All of them, trained or not; the full reference among them.
    """
    rows = [row for group in groups for row in _group_rows(folder, group)]
    measured = {
        name: measurement
        for name in (*(row["name"] for row in rows), BASE)
        if (measurement := Measurement.read(folder, name)) is not None
    }
    if BASE in measured:
        rows.append(_base_row(groups[0].name))
    settings = recipe.evaluate
    for row in rows:
        if row["name"] in measured:
            measurement = measured[row["name"]]
            _add_measured(row, measurement, recipe.sweep.metric, settings)
    _add_differences(rows, measured, recipe)
    notes = dict.fromkeys(note for measurement in measured.values() for note in measurement.notes)
    if BASE in measured and len({measurement.model for measurement in measured.values()}) > 1:
        sentence = (
            f"The untouched base is that of {measured[BASE].model}: arms that train another model "
            "are not compared with it."
        )
        notes[sentence] = None
    notes |= dict.fromkeys(_other_costs(folder, recipe, groups))
    finished = _comparable(rows, measured)
    recommendation, arms_of = _recommended(rows, finished, measured, recipe)
    return {
        "arms": rows,
        "settings": _settings(recommendation, arms_of, rows),
        "notes": list(notes),
        "recommendation": {
            **recommendation.to_dict(),
            "arm": arms_of[recommendation.name][0] if recommendation.name is not None else None,
        },
    }


def _other_costs(folder: Path, recipe: Recipe, groups: Sequence[Group]) -> list[str]:
    """A sentence where the sweep went on with settings that change what arms cost."""
    begun = [folder / group.name for group in groups
             if (folder / group.name / runs.RECIPE).is_file()]  # fmt: skip
    recipes = [Run(place).recipe().completed() for place in begun]
    names = [
        key for key in sorted(runs.FREE - {*_NO_COST, *recipe.sweep.grid})
        if any(completed[key] != recipes[0][key] for completed in recipes)
    ]  # fmt: skip
    if not names:
        return []
    return [
        f"The sweep went on with another {', '.join(names)}: times and memory of its arms do not "
        "say which settings are cheaper."
    ]


def _group_rows(folder: Path, group: Group) -> list[dict[str, Any]]:
    """What training says of each arm of one group."""
    run_folder = folder / group.name
    run = Run(run_folder) if (run_folder / runs.RECIPE).is_file() else None
    info = run.info() if run else {}
    training, adapters = info.get("training", {}), info.get("adapters", [])
    by_name = {adapter["name"]: adapter for adapter in adapters}
    lines, events = (run.metrics(), left_early(run)) if run else ([], {})
    total = max((line["step"] for line in lines), default=0)
    base = info.get("base", {}).get("parameters", 0)
    rows = []
    for arm in group.arms:
        name = group.adapter(arm)
        adapter, event = by_name.get(name, {}), events.get(name)
        curve = [[m["step"], m["loss"], m.get("loss_se")] for m in lines
                 if m["adapter"] == name and m["kind"] == "eval"]  # fmt: skip
        train = [m for m in lines if m["adapter"] == name and m["kind"] == "train"]
        low_rank = 0
        if run is not None and name in run.adapters():
            low_rank = costs.low_rank_parameters(run.adapters()[name])
        parameters = adapter.get("trainable_parameters")
        rows.append(
            {
                "name": arm.name,
                "sets": dict(arm.sets),
                "setting": arm.setting,
                "group": group.name,
                "adapter": name,
                "reference": FULL if arm.name == FULL else None,
                "status": "left" if event else info.get("status", "waiting"),
                "why": event["why"] if event else info.get("error"),
                "steps": adapter.get("steps", len(train)),
                "of_steps": arm.recipe.max_steps or total,
                "epochs": _epochs(adapter.get("steps", len(train)), arm.recipe, info),
                "tokens": sum(m["tokens"] for m in train),
                "trainable_parameters": parameters,
                "file_bytes": adapter.get("file_bytes"),
                "state_bytes": None if parameters is None
                else costs.state_bytes(parameters, arm.recipe.optim),
                "peak_bytes": training.get("peak_bytes"),
                "peak_method": training.get("method"),
                "together": len(group.arms),
                "run_seconds": training.get("seconds"),
                "run_tokens_per_second": training.get("tokens_per_second"),
                "served": {
                    "adapter_bytes": adapter.get("file_bytes"),
                    "flops_per_token": costs.serving_flops(low_rank),
                    "share_of_base": low_rank / base if base else None,
                },
                "curve": curve,
                "train_curve": [[m["step"], m["loss"]] for m in train],
            }
        )  # fmt: skip
    _add_times(rows, base)
    return rows


def _epochs(steps: int, recipe: Recipe, info: Mapping[str, Any]) -> float | None:
    """Passes over the data that so many steps are; None before the data were read."""
    rows = info.get("data", {}).get("train_rows")
    return steps / steps_per_epoch(rows, rows_per_step(recipe)) if rows else None


def _add_times(rows: Sequence[dict[str, Any]], base: int) -> None:
    """The run's seconds by each arm's share of its arithmetic."""
    work = [
        row["tokens"] * costs.training_flops(base, row["trainable_parameters"] or 0) for row in rows
    ]
    for row, share in zip(rows, costs.shares(work), strict=True):
        row["time_share"] = share
        row["seconds"] = None if row["run_seconds"] is None else share * row["run_seconds"]
        row["tokens_per_second"] = row["tokens"] / row["seconds"] if row["seconds"] else None


def _base_row(measured_in: str) -> dict[str, Any]:
    """The untouched base as a row like the arms'."""
    empty = dict.fromkeys(
        ("why", "seconds", "tokens_per_second", "time_share", "peak_bytes", "peak_method",
         "run_seconds", "run_tokens_per_second", "state_bytes")
    )  # fmt: skip
    return {
        **empty, "name": BASE, "sets": {}, "setting": BASE, "group": measured_in,
        "adapter": None, "reference": BASE, "status": "finished", "steps": 0, "of_steps": 0,
        "epochs": 0.0,
        "tokens": 0, "trainable_parameters": 0, "file_bytes": 0, "together": 1,
        "served": {"adapter_bytes": 0, "flops_per_token": 0.0, "share_of_base": 0.0},
        "curve": [], "train_curve": [],
    }  # fmt: skip


def _add_measured(
    row: dict[str, Any], measurement: Measurement, metric: str, settings: EvaluateOptions
) -> None:
    """Held-out loss and metric with their standard errors."""
    samples, seed = settings.bootstrap_samples, settings.seed
    row["loss"] = measurement.loss(Resamples(len(measurement.nll), samples, seed)).to_dict()
    row["chosen_on"], row["told_on"] = measurement.chosen_on, measurement.told_on
    row["model"] = measurement.model
    row["generated_tokens_per_second"] = measurement.generated_tokens_per_second
    values = {}
    usual = [definition.name for definition in metrics.METRICS]
    for name in dict.fromkeys([*usual, *measurement.statistics]):
        counts = statistics_of(measurement, name)
        if counts is not None and len(counts) and (name != "loss" or metric == "loss"):
            draws = Resamples(len(counts), samples, seed)
            values[name] = draws.estimate(counts, formula_of(name)).to_dict()
    row["metrics"] = values


def _add_differences(
    rows: Sequence[dict[str, Any]], measured: Mapping[str, Measurement], recipe: Recipe
) -> None:
    """Each arm's metric minus each reference's, paired over the telling examples."""
    metric = recipe.sweep.metric
    lower = described(metric).lower_is_better
    # What the time cut says nothing of what full fine-tuning would have come to.
    references = [row["name"] for row in rows if row["reference"] and row["status"] != "left"]
    for row in rows:
        row["against"] = {}
        for name in references:
            if name == row["name"] or not {name, row["name"]} <= set(measured):
                continue
            if name == BASE and measured[name].model != measured[row["name"]].model:
                continue  # another model's base says nothing of what training changed
            a = statistics_of(measured[row["name"]], metric)
            b = statistics_of(measured[name], metric)
            if a is None or b is None or len(a) != len(b) or not len(a):
                continue
            draws = Resamples(len(a), recipe.evaluate.bootstrap_samples, recipe.evaluate.seed)
            difference = draws.difference(a, b, formula_of(metric))
            row["against"][name] = {
                **difference.to_dict(),
                "verdict": verdict(difference, len(a), lower_is_better=lower),
            }  # fmt: skip


def _comparable(
    rows: Sequence[dict[str, Any]], measured: Mapping[str, Measurement]
) -> list[dict[str, Any]]:
    """Arms that trained to their end; where none did, all those for which the time was up."""
    arms = [
        row for row in rows
        if row["reference"] is None and row["name"] in measured and measured[row["name"]].has_loss
    ]  # fmt: skip
    ended = [row for row in arms if row["status"] != "left"]
    return ended or [row for row in arms if row["why"] == TIME_UP]


def _recommended(
    rows: Sequence[dict[str, Any]],
    finished: Sequence[dict[str, Any]],
    measured: Mapping[str, Measurement],
    recipe: Recipe,
) -> tuple[Recommendation, dict[str, list[str]]]:
    """The recommendation over settings, and the arms of each setting by its name."""
    cut = finished if finished and finished[0]["status"] == "left" else []
    if len(cut_at := {row["steps"] for row in cut}) > 1:
        reason = (
            f"The time was up before any arm was trained to its end, after {min(cut_at)} to "
            f"{max(cut_at)} steps of {cut[0]['of_steps']}: arms that differ in steps cannot be "
            "compared, so nothing is recommended; give more time."
        )
        return Recommendation(None, None, "not comparable", [reason]), {}
    together: dict[str, list[dict[str, Any]]] = {}
    for row in finished:
        together.setdefault(row["setting"], []).append(row)
    # A setting one of whose seeds left early has another mean than the rest.
    most = max((len(seed_rows) for seed_rows in together.values()), default=0)
    complete = {
        seed_rows[0]["name"] if len(seed_rows) == 1 else _without_seed(seed_rows): seed_rows
        for seed_rows in together.values()
        if len(seed_rows) == most
    }
    arms_of = {name: [row["name"] for row in seed_rows] for name, seed_rows in complete.items()}
    used = [name for names in arms_of.values() for name in names]
    counts = [measured[name].tokens for name in used]
    if any(tokens != counts[0] for tokens in counts):
        reason = (
            "The arms' tokenizers cut the same answers into different tokens, so their losses per "
            "token cannot be compared; compare the metric."
        )
        return Recommendation(None, None, "not comparable", [reason]), arms_of
    candidates = [
        Candidate(
            name,
            np.stack([np.asarray(measured[row["name"]].nll) for row in seed_rows]),
            int(seed_rows[0]["file_bytes"] or 0),
            float(seed_rows[0]["served"]["share_of_base"] or 0.0),
        )
        for name, seed_rows in complete.items()
    ]
    tried = [row["name"] for row in rows if row["reference"] is None]
    broken = [name for name in tried if name in measured and not measured[name].has_loss]
    base = measured.get(BASE)
    if base is not None and any(measured[name].model != base.model for name in used):
        base = None
    recommendation = recommend(
        candidates,
        np.asarray(counts[0] if counts else [], float),
        base=np.asarray(base.nll) if base is not None and base.has_loss else None,
        left_out=[name for name in tried if name not in {*used, *broken}],
        broken=broken,
        cut=(cut[0]["steps"], cut[0]["of_steps"]) if cut else None,
        samples=recipe.evaluate.bootstrap_samples,
        seed=recipe.evaluate.seed,
    )
    shares = [row["epochs"] for row in finished if row["name"] in used and row["epochs"]]
    steps = [row["steps"] for row in finished if row["name"] in used]
    return (
        after_training(recommendation, min(shares), min(steps)) if shares else recommendation
    ), arms_of


def _without_seed(seed_rows: Sequence[Mapping[str, Any]]) -> str:
    """The arms' name without what tells the seeds apart."""
    parts = str(seed_rows[0]["name"]).split("-")
    seed = f"seed{seed_rows[0]['sets'].get('seed')}"
    return "-".join(part for part in parts if part != seed) or str(seed_rows[0]["name"])


def _settings(
    recommendation: Recommendation,
    arms_of: Mapping[str, Sequence[str]],
    rows: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """One row per setting that was compared, seeds averaged, smallest first."""
    by_name = {row["name"]: row for row in rows}
    settings = []
    for comparison in recommendation.comparisons:
        first = by_name[arms_of[comparison.name][0]]
        settings.append(
            {
                **vars(comparison),
                "arms": list(arms_of[comparison.name]),
                "recommended": comparison.name == recommendation.name,
                "file_bytes": first["file_bytes"],
                "trainable_parameters": first["trainable_parameters"],
            }
        )
    return settings


def group_names(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """What `sweep.json` keeps of the plan."""
    return [{"name": group.name, "arms": [arm.name for arm in group.arms]} for group in groups]
