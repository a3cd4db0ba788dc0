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

from lighten import locks, whole_files
from lighten.artifacts.source import open_source
from lighten.benchmarking import measuring, ratios, techniques
from lighten.benchmarking.measuring import Measuring
from lighten.benchmarking.techniques import LONG, TRAINING, Technique
from lighten.errors import UserError
from lighten.machine import devices, hardware
from lighten.models.load import checksum, weight_files
from lighten.recipe import Recipe
from lighten.runs import AUDIT, now
from lighten.training.rows import data_sha256
from lighten.wording import counted, first_line

VERSION = 1
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
        if self.long_tokens is not None and (self.long_tokens < 0 or self.long_tokens == 1):
            raise UserError("long_tokens: a row has 2 tokens or more; 0 leaves long rows out")


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

    def __fspath__(self) -> str:
        """Its folder, so that it can be given to whatever takes a folder, as `lighten.report`."""
        return str(self.folder)

    def row(self, group: str, name: str) -> dict[str, Any]:
        """A row by its group and name.

        Raises:
            KeyError: There is none.
        """
        for row in self.rows:
            if (row["group"], row["name"]) == (group, name):
                return row
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
    log: Callable[[str], None] = lambda _: None,
) -> Audit:
    """Measure all that applies; see `lighten.audit`.

    Args:
        model: The base.
        recipe: The user's recipe under some settings.
        folder: Where `audit.json` goes.
        settings: How much.
        log: Given a line about what is being done.

    Raises:
        UserError: Something the user can mend.
    """
    began = time.monotonic()
    settings.check()
    source = open_source(model)
    if source.adapter is not None or source.run is not None:
        raise UserError(f"{model} is trained already; give the model that an audit is to begin at")
    base_recipe = recipe({"method": "lora"})
    facts = _facts(model, base_recipe, settings)
    before = _load_or_start(folder, facts, settings)
    if before.status == "finished":
        failed = sum(_may_succeed(row) for row in before.rows)
        tries = f", or a larger --budget to try {counted(failed, 'failed row')} again"
        log(
            f"{folder / AUDIT} is complete; choose another --output_dir to measure anew"
            f"{tries if failed else ''}"
        )
        return before
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise whole_files.cannot_write(error, folder) from error
    locks.acquire(folder)  # two that write one file would each lose the other's rows
    try:
        result = _load_or_start(folder, facts, settings, log)
        work = _AuditRunner(result, recipe, settings, began - result.spent_s, log)
        work.all_rows()
        result.status = "finished"
        work.store()
    finally:
        locks.release(folder)
    return result


def _facts(model: str, recipe: Recipe, settings: Settings) -> dict[str, Any]:
    commit, clean = hardware.commit()
    source = open_source(model)
    data = recipe.dataset
    return {
        "created": now(), "model": model,
        "base_sha256": checksum(weight_files(source.base_folder)), "data": data,
        "data_sha256": data_sha256(recipe),
        "machine": hardware.machine().to_dict(), "versions": hardware.versions(),
        "commit": commit, "tree_clean": clean, "device": devices.named(None).label,
        "recipe": recipe.completed(), "settings": asdict(settings),
    }  # fmt: skip


def _load_or_start(
    folder: Path, facts: dict[str, Any], settings: Settings,
    log: Callable[[str], None] = lambda _: None,
) -> Audit:  # fmt: skip
    """The audit of a folder, where it is of the same thing; rows that a budget left out are free.

    Raises:
        UserError: The folder holds something else.
    """
    path = folder / AUDIT
    if not path.is_file():
        if folder.is_dir() and any(entry.name != locks.LOCK for entry in folder.iterdir()):
            raise UserError(f"{folder} holds other files; choose another --output_dir")
        return Audit(folder, facts)
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        compared_keys = ("base_sha256", "recipe", "device", "versions")
        changed = [name for name in compared_keys if before[name] != facts[name]]
        # Rows are paired by place: those of other data would be taken for the same examples.
        if before.get("data_sha256", facts["data_sha256"]) != facts["data_sha256"]:
            changed.append("data")
        changed += [
            name for name, value in facts["settings"].items()
            if name != "budget_s" and before["settings"].get(name) != value
        ]  # fmt: skip
        richer = settings.budget_s > before["settings"]["budget_s"]
        steps, spent_s = before["steps"], float(before["spent_s"])
        failed = sum(_may_succeed(row) for row in before["rows"])
        goes_on = richer or (failed and spent_s < _usable_s(settings.budget_s))
        status = "running" if goes_on else str(before["status"])
        kept_rows = [
            row for row in before["rows"] if not (row.get("budget") and status == "running")
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no audit of this version; choose another --output_dir"
        ) from error
    if changed:
        raise UserError(
            f"{path} was measured with other {', '.join(changed)}; choose another --output_dir"
        )
    if status == "running":
        explained = counted(len(kept_rows) - failed, "row")
        log(
            f"going on: {explained} measured or explained already"
            f"{f', {failed} that failed tried again' if failed else ''}"
        )
    merged_facts = {
        **{key: before.get(key, value) for key, value in facts.items()},
        "settings": facts["settings"],
    }
    return Audit(folder, merged_facts, kept_rows, steps, spent_s, status)


class _AuditRunner:
    """One audit at work.

    Args:
        result: Where results go.
        recipe: The user's, under some settings.
        settings: How much.
        began: When the budget began to run, on the monotonic clock.
        log: Given a line about what is being done.
    """

    def __init__(
        self, result: Audit, recipe: Callable[[Mapping[str, Any]], Recipe], settings: Settings,
        began: float, log: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.result, self.settings, self.began, self.log = result, settings, began, log
        self.device = devices.named(None)
        self.measuring = Measuring(recipe, self.device, settings, result.folder)
        self.techniques: Sequence[Technique] = ()

    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return _usable_s(self.settings.budget_s) - (time.monotonic() - self.began)

    def store(self) -> None:
        """Write what there is."""
        self.result.spent_s = time.monotonic() - self.began
        order = {technique.key: place for place, technique in enumerate(self.techniques)}
        self.result.rows.sort(key=lambda row: order.get(_key(row), 0))
        self.result.rows = ratios.summarised(self.result.rows)
        whole_files.write_json(self.result.folder / AUDIT, self.result.to_dict())

    def all_rows(self) -> None:
        """Each row once, then again while there is time."""
        self._choose_steps()
        long = self._long_tokens()
        self.techniques = techniques.techniques(self.device.kind, long)
        before = {_key(row): row for row in self.result.rows}
        for technique in sorted(self.techniques, key=lambda technique: -technique.value):
            old = before.get(technique.key)
            if old is not None and not self._is_due(technique, old):
                continue
            row = self._row(technique)
            if old is not None and row.get("budget"):
                continue  # why it failed says more
            others = [other for other in self.result.rows if _key(other) != technique.key]
            self.result.rows = [*others, row]
            self.store()
        self._repeat()

    def _is_due(self, technique: Technique, old: Mapping[str, Any]) -> bool:
        """Whether a row that is there is measured again: its fault may be gone by now."""
        waited = old["status"] == "not measured" and technique.needs is not None
        return _may_succeed(old) or (waited and self.measuring.adapter.is_dir())

    def _choose_steps(self) -> None:
        """What a row costs, and so how many steps there is room for."""
        if self.result.steps is not None and any(row["processes"] for row in self.result.rows):
            self.measuring.steps = self.result.steps
            return
        if self.settings.steps is not None or self.left_s() <= 0:
            self.result.steps = self.measuring.steps = self.settings.steps or FEWEST_STEPS
            return
        self.log("a first look: what a row costs here")
        self.measuring.steps = LOOK_STEPS
        plain = Technique("plain", TRAINING, "", 0, techniques.PLAIN)
        allowed = min(self.left_s(), MOST_OF_ONE * self.settings.budget_s)
        outcome, seconds = self.measuring.process(plain, allowed, measures_loss=True)
        steps = FEWEST_STEPS
        if outcome.records:
            record = outcome.records[0]
            per_step = record["step_seconds"][-1]
            overhead_s = max(0.0, seconds - sum(record["step_seconds"]))
            rows = len(techniques.techniques(self.device.kind, 1))
            steps = int((FIRST_ROUND * self.left_s() / rows - overhead_s) / max(per_step, 1e-9))
        self.result.steps = max(FEWEST_STEPS, min(MOST_STEPS, steps))
        self.measuring.steps = self.result.steps
        self.store()

    def _long_tokens(self) -> int | None:
        for row in self.result.rows:
            if row["group"] == LONG:
                return int(row["tokens"])
        if self.settings.long_tokens == 0:
            return None
        self.log("planning a long row")
        return self.settings.long_tokens or self.measuring.long_tokens(self.left_s())

    def _row(self, technique: Technique) -> dict[str, Any]:
        """A row, measured or with the reason why not."""
        row: dict[str, Any] = {
            "group": technique.group, "name": technique.name, "what": technique.what,
            "plain": technique.plain, "status": "not measured", "processes": [],
        }  # fmt: skip
        if technique.group == LONG:
            row["tokens"] = technique.settings["max_length"]
        if technique.obstacle is not None:
            return {**row, "why": technique.obstacle}
        if (missing := self._missing_adapter(technique)) is not None:
            return {**row, **missing}
        if (cost_s := self._cost(technique)) > self.left_s():
            return {**row, **_out_of_budget(cost_s, self.left_s(), self.settings.budget_s)}
        self.log(f"{technique.key}")
        try:
            row |= self.measuring.predicted(technique)
        except UserError as error:
            return {**row, "status": "failed", "why": first_line(error)}
        if self.left_s() <= 0:
            return {**row, **_out_of_budget(cost_s, 0.0, self.settings.budget_s)}
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

    def _missing_adapter(self, technique: Technique) -> dict[str, Any] | None:
        """Why a row lacks the adapter that it takes; None: it does not."""
        if technique.needs is None or self.measuring.adapter.is_dir():
            return None
        why = f"it needs the adapter of “{technique.needs}”, which was not measured"
        needed = [row for row in self.result.rows
                  if (row["group"], row["name"]) == (TRAINING, technique.needs)]  # fmt: skip
        if any(row.get("budget") for row in needed):  # and is measured with a larger one
            return {"budget": True, "why": f"budget: {why}; a larger --budget measures both"}
        return {"why": why}

    def _cost(self, technique: Technique) -> float:
        """Seconds that a row is expected to take: as the dearest of its group did; 0: not known."""
        costs = [row.get("cost_s", 0.0) for row in self.result.rows
                 if row["group"] == technique.group]  # fmt: skip
        return max(costs, default=0.0)

    def _repeat(self) -> None:
        """Second processes, and more, in turn, while there is time."""
        by_key = {technique.key: technique for technique in self.techniques}
        for count in range(1, MOST_PROCESSES):
            for row in self.result.rows:
                key = _key(row)
                few = row["status"] == "measured" and len(row["processes"]) == count
                if not few or row["cost_s"] > self.left_s() or key not in by_key:
                    continue
                self.log(f"{key}, process {count + 1}")
                outcome, _ = self.measuring.process(by_key[key], self.left_s(), measures_loss=False)
                merged = measuring.merged(outcome.records)
                if outcome.error is None and merged:
                    row["processes"].append(merged)
                    self.store()
            if not any(len(row["processes"]) > count for row in self.result.rows):
                return


def _key(row: Mapping[str, Any]) -> str:
    """As `Technique.key`."""
    return f"{row['group']}: {row['name']}"


def _may_succeed(row: Mapping[str, Any]) -> bool:
    """Whether a row failed by what may be gone by now, as a full disk; memory is what it was."""
    return row["status"] == "failed" and not row.get("out_of_memory")


def _usable_s(budget_s: float) -> float:
    """Seconds of a budget that rows may take."""
    return budget_s - max(RESERVE_S, RESERVE * budget_s)


def _out_of_budget(cost_s: float, remaining_s: float, budget_s: float) -> dict[str, Any]:
    takes = f"it takes about {cost_s:.0f} s, and " if cost_s else ""
    return {
        "budget": True,
        "why": f"budget: {takes}{max(0.0, remaining_s):.0f} s of {budget_s:.0f} were left; a "
        "larger --budget measures it",
    }  # fmt: skip
