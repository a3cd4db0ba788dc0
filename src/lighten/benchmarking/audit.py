"""The verb `audit`: the plain way beside each technique on the user's data, within a budget.

Each row is measured in a process of its own and stored at once, so that an audit which was stopped
goes on where it was. Rows of high value come first; what the budget leaves out says so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lighten import whole_files
from lighten.artifacts.source import open_source
from lighten.benchmarking import measuring, ratios, techniques
from lighten.benchmarking.measuring import Measuring
from lighten.benchmarking.running import now
from lighten.benchmarking.techniques import LONG, TRAINING, Technique
from lighten.errors import UserError
from lighten.machine import devices, hardware
from lighten.models.load import checksum, weight_files
from lighten.recipe import Recipe
from lighten.wording import counted

VERSION = 1
FILE = "audit.json"
# Of the time that is left after a first look: the first measurement of all rows. The rest is for
# second processes, without which no ratio has an interval.
FIRST_ROUND = 0.6
# Of the budget, what a single row may take at most.
MOST_OF_ONE = 0.2
MOST_PROCESSES = 4
# Kept back for the page, for ending a process and for what was imported before.
RESERVE_S, RESERVE = 5.0, 0.02
FEWEST_STEPS, MOST_STEPS = 4, 40
LOOK_STEPS = 2


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        budget_s: Seconds for all of it.
        memory_bytes: What a process may hold; None: nine tenths of what is free.
        examples: Held-out examples that losses are measured on.
        steps: Of each training; None: as many as the budget has room for.
        prompt_tokens: Of a prompt whose answer is timed.
        new_tokens: Of that answer.
        long_tokens: Of a long row; None: as many as the budget has room for; 0: none.
    """

    budget_s: float
    memory_bytes: int | None = None
    examples: int = 100
    steps: int | None = None
    prompt_tokens: int = 64
    new_tokens: int = 32
    long_tokens: int | None = None

    def check(self) -> None:
        """Raise what is wrong.

        Raises:
            UserError: A setting out of its bounds.
        """
        if self.steps is not None and self.steps < 2:
            raise UserError("steps: a training that is timed has 2 steps or more")
        if self.new_tokens < 2:
            raise UserError("new_tokens: an answer that is timed has 2 tokens or more")
        if self.examples < 1 or self.prompt_tokens < 1:
            raise UserError("examples and prompt_tokens are whole numbers from 1")


@dataclass
class Audit:
    """What `audit.json` holds.

    Attributes:
        folder: Where it is.
        facts: Machine, versions, model, data and settings.
        rows: A row per technique, in the order of the page; `status` is `measured`, `failed` or
            `not measured`, the latter two with `why`.
        steps: Optimiser steps of each training.
        spent_s: Seconds so far.
        status: `running` or `finished`.
    """

    folder: Path
    facts: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    steps: int | None = None
    spent_s: float = 0.0
    status: str = "running"

    def __repr__(self) -> str:
        measured = sum(row["status"] == "measured" for row in self.rows)
        return f"Audit({self.facts['model']}, {measured} of {len(self.rows)} rows measured)"

    def row(self, group: str, name: str) -> dict[str, Any]:
        """A row by its group and name.

        Raises:
            KeyError: There is none.
        """
        for own in self.rows:
            if (own["group"], own["name"]) == (group, name):
                return own
        raise KeyError(f"{group}: {name}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "version": VERSION, **self.facts, "steps": self.steps, "spent_s": self.spent_s,
            "status": self.status, "rows": self.rows,
        }  # fmt: skip


def audit(
    model: str,
    *,
    recipe: Callable[[Mapping[str, Any]], Recipe],
    folder: Path,
    settings: Settings,
    told: Callable[[str], None] = lambda _: None,
) -> Audit:
    """Measure all that applies; see `lighten.audit`.

    Args:
        model: The base.
        recipe: The user's recipe under some settings.
        folder: Where `audit.json` goes.
        settings: How much.
        told: Hears what is being done.

    Raises:
        UserError: Something the user can mend.
    """
    began = time.monotonic()
    settings.check()
    source = open_source(model)
    if source.adapter is not None or source.run is not None:
        raise UserError(f"{model} is trained already; give the model that an audit is to begin at")
    given = recipe({"method": "lora"})
    facts = _facts(model, given, settings)
    found = _taken_up(folder, facts, settings, told)
    if found.status == "finished":
        told(f"{folder / FILE} is complete; choose another --output_dir to measure anew")
        return found
    work = _Work(found, recipe, settings, began - found.spent_s, told)
    work.all_rows()
    found.status = "finished"
    work.store()
    return found


def _facts(model: str, recipe: Recipe, settings: Settings) -> dict[str, Any]:
    commit, clean = hardware.commit()
    source = open_source(model)
    data = recipe.dataset
    return {
        "created": now(), "model": model,
        "base_sha256": checksum(weight_files(source.base_folder)), "data": data,
        "machine": hardware.machine().to_dict(), "versions": hardware.versions(),
        "commit": commit, "tree_clean": clean, "device": devices.named(None).label,
        "recipe": recipe.completed(), "settings": asdict(settings),
    }  # fmt: skip


def _taken_up(
    folder: Path, facts: dict[str, Any], settings: Settings, told: Callable[[str], None]
) -> Audit:
    """The audit of a folder, where it is of the same thing; rows that a budget left out are free.

    Raises:
        UserError: The folder holds something else.
    """
    path = folder / FILE
    if not path.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder} holds other files; choose another --output_dir")
        return Audit(folder, facts)
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        same = ("base_sha256", "recipe", "device", "versions")
        changed = [name for name in same if before[name] != facts[name]]
        changed += [
            name for name, value in facts["settings"].items()
            if name != "budget_s" and before["settings"].get(name) != value
        ]  # fmt: skip
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{path} is no audit of this version; choose another --output_dir"
        ) from error
    if changed:
        raise UserError(
            f"{path} was measured with other {', '.join(changed)}; choose another --output_dir"
        )
    richer = settings.budget_s > before["settings"]["budget_s"]
    status = "running" if richer else before["status"]
    kept = [row for row in before["rows"] if not (row.get("budget") and status == "running")]
    if status == "running":
        told(f"going on: {counted(len(kept), 'row')} measured or explained already")
    first = {**{key: before[key] for key in facts}, "settings": facts["settings"]}
    return Audit(folder, first, kept, before["steps"], before["spent_s"], status)


class _Work:
    """One audit at work.

    Args:
        found: Where results go.
        recipe: The user's, under some settings.
        settings: How much.
        began: When the budget began to run, on the monotonic clock.
        told: Hears what is being done.
    """

    def __init__(
        self, found: Audit, recipe: Callable[[Mapping[str, Any]], Recipe], settings: Settings,
        began: float, told: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.found, self.settings, self.began, self.told = found, settings, began, told
        self.device = devices.named(None)
        self.measuring = Measuring(recipe, self.device, settings, found.folder)
        self.techniques: Sequence[Technique] = ()

    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        budget = self.settings.budget_s
        return budget - max(RESERVE_S, RESERVE * budget) - (time.monotonic() - self.began)

    def store(self) -> None:
        """Write what there is."""
        self.found.spent_s = time.monotonic() - self.began
        order = {own.key: place for place, own in enumerate(self.techniques)}
        self.found.rows.sort(key=lambda row: order.get(f"{row['group']}: {row['name']}", 0))
        self.found.rows = ratios.summarised(self.found.rows)
        whole_files.write_json(self.found.folder / FILE, self.found.to_dict())

    def all_rows(self) -> None:
        """Each row once, then again while there is time."""
        self._look()
        long = self._long_tokens()
        self.techniques = techniques.techniques(self.device.kind, long)
        known = {f"{row['group']}: {row['name']}" for row in self.found.rows}
        for technique in sorted(self.techniques, key=lambda own: -own.value):
            if technique.key in known:
                continue
            self.found.rows.append(self._row(technique))
            self.store()
        self._again()

    def _look(self) -> None:
        """What a row costs, and so how many steps there is room for."""
        if self.found.steps is not None and any(row["processes"] for row in self.found.rows):
            self.measuring.steps = self.found.steps
            return
        if self.settings.steps is not None or self.left_s() <= 0:
            self.found.steps = self.measuring.steps = self.settings.steps or FEWEST_STEPS
            return
        self.told("a first look: what a row costs here")
        self.measuring.steps = LOOK_STEPS
        plain = Technique("plain", TRAINING, "", 0, techniques.PLAIN)
        allowed = min(self.left_s(), MOST_OF_ONE * self.settings.budget_s)
        outcome, seconds = self.measuring.process(plain, allowed, measures_loss=True)
        steps = FEWEST_STEPS
        if outcome.records:
            first = outcome.records[0]
            per_step = first["step_seconds"][-1]
            beside = max(0.0, seconds - sum(first["step_seconds"]))
            rows = len(techniques.techniques(self.device.kind, 1))
            steps = int((FIRST_ROUND * self.left_s() / rows - beside) / max(per_step, 1e-9))
        self.found.steps = max(FEWEST_STEPS, min(MOST_STEPS, steps))
        self.measuring.steps = self.found.steps
        self.store()

    def _long_tokens(self) -> int | None:
        for row in self.found.rows:
            if row["group"] == LONG:
                return int(row["tokens"])
        if self.settings.long_tokens == 0:
            return None
        self.told("planning a long row")
        return self.settings.long_tokens or self.measuring.long_tokens(self.left_s())

    def _row(self, technique: Technique) -> dict[str, Any]:
        """A row, measured or with the reason why not."""
        row: dict[str, Any] = {
            "group": technique.group, "name": technique.name, "what": technique.what,
            "plain": technique.plain, "status": "not measured", "processes": [],
        }  # fmt: skip
        if technique.group == LONG:
            row["tokens"] = technique.settings["max_length"]
        if (why := technique.obstacle or self._lacks(technique)) is not None:
            return {**row, "why": why}
        if (wanted := self._cost(technique)) > self.left_s():
            return {**row, **_budget(wanted, self.left_s(), self.settings.budget_s)}
        self.told(f"{technique.key}")
        try:
            row |= self.measuring.predicted(technique)
        except UserError as error:
            return {**row, "status": "failed", "why": str(error).splitlines()[0]}
        if self.left_s() <= 0:
            return {**row, **_budget(wanted, 0.0, self.settings.budget_s)}
        allowed = min(self.left_s(), MOST_OF_ONE * self.settings.budget_s)
        outcome, seconds = self.measuring.process(technique, allowed, measures_loss=True)
        row["cost_s"] = seconds
        merged = measuring.merged(outcome.records)
        if merged:
            row["processes"].append(merged)
        if outcome.error is None and merged:
            return {**row, "status": "measured"}
        if outcome.timed_out:
            return {**row, "processes": [], "budget": True,
                    "why": f"budget: it was ended after {seconds:.0f} s; a larger --budget "
                           "measures it"}  # fmt: skip
        why = outcome.error or "it measured nothing"
        return {
            **row, "processes": [], "status": "failed", "why": why,
            "out_of_memory": outcome.out_of_memory,
            "process_peak_bytes": outcome.process_peak_bytes,
        }  # fmt: skip

    def _lacks(self, technique: Technique) -> str | None:
        if technique.needs is None or self.measuring.adapter.is_dir():
            return None
        return f"it needs the adapter of “{technique.needs}”, which was not measured"

    def _cost(self, technique: Technique) -> float:
        """Seconds that a row is expected to take: as the dearest of its group did; 0: not known."""
        same = [row.get("cost_s", 0.0) for row in self.found.rows
                if row["group"] == technique.group]  # fmt: skip
        return max(same, default=0.0)

    def _again(self) -> None:
        """Second processes, and more, in turn, while there is time."""
        by_key = {own.key: own for own in self.techniques}
        for count in range(1, MOST_PROCESSES):
            for row in self.found.rows:
                key = f"{row['group']}: {row['name']}"
                few = row["status"] == "measured" and len(row["processes"]) == count
                if not few or row["cost_s"] > self.left_s() or key not in by_key:
                    continue
                self.told(f"{key}, process {count + 1}")
                outcome, _ = self.measuring.process(by_key[key], self.left_s(), measures_loss=False)
                merged = measuring.merged(outcome.records)
                if outcome.error is None and merged:
                    row["processes"].append(merged)
                    self.store()
            if not any(len(row["processes"]) > count for row in self.found.rows):
                return


def _budget(wanted: float, left: float, budget: float) -> dict[str, Any]:
    takes = f"it takes about {wanted:.0f} s, and " if wanted else ""
    return {
        "budget": True,
        "why": f"budget: {takes}{max(0.0, left):.0f} s of {budget:.0f} were left; a larger "
        "--budget measures it",
    }  # fmt: skip
