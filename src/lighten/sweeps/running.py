"""Running a sweep: tune, train each group, measure each arm; killed at any moment, it goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lighten import folders, locks, runs
from lighten.engine.schedule import in_steps
from lighten.engine.step import TrainingDiverged
from lighten.errors import UserError
from lighten.evaluation import registry
from lighten.evaluation.evaluation import Progress, held_out_examples
from lighten.evaluation.truncated import truncated_curve
from lighten.machine import hardware
from lighten.paths import expanded
from lighten.recipe import Recipe
from lighten.runs import Run, now
from lighten.sweeps import ray_tune, result, time_plan, tuning
from lighten.sweeps.arms import FULL, Arm, Group, expand, full_arm, grid_of, group_arms
from lighten.sweeps.budget import Halving, left_early
from lighten.sweeps.measure import BASE, Measurement, measure_run
from lighten.sweeps.result import FILE, SweepResult
from lighten.sweeps.search import Search
from lighten.training.progress import TrainingProgress
from lighten.training.rows import data_sha256
from lighten.training.run import train

# What of the `evaluate` section the figures of arms hang on.
OF_ARMS = ("max_examples", "max_new_tokens", "extra_metrics", "bootstrap_samples", "seed")
# How often the time spent is written down while a group trains: what a kill can lose of it.
HEARTBEAT_S = 20.0


def folder_of(recipe: Recipe) -> Path:
    """Where the sweep of a recipe goes."""
    return (
        expanded(recipe.output_dir) if recipe.output_dir else Path("runs") / f"{recipe.name}-sweep"
    )


def sweep(
    recipe: Recipe,
    *,
    resume: bool = False,
    progress: bool = True,
    measuring: Progress | None = None,
) -> SweepResult:
    """Train every arm, measure it, and say which to take.

    Args:
        recipe: What the arms share, and in its `sweep` section what differs.
        resume: Take up an ended sweep again; an unfinished one is taken up anyway.
        progress: Show what happens on standard error.
        measuring: Log how far measuring is.

    Raises:
        UserError: Something the user can mend.
        Interrupted: Log to stop; the state is saved.
    """
    if not recipe.sweep.grid and len(recipe.cohort()) < 2:
        raise UserError(
            "nothing to sweep: give a list, such as --lora_r 8,32,128, or a sweep section in the "
            "recipe"
        )
    held_out_examples(recipe, None, test=False)  # says so if there are none, before anything runs
    for metric in recipe.evaluate.extra_metrics:
        registry.extra(metric)
    if recipe.sweep.truncate:
        _require_plain(expand(recipe, time_plan.swept_grid(recipe)))
    running = Sweep(recipe, resume=resume, progress=progress, measuring=measuring)
    try:
        return running.run()
    except BaseException as error:
        ended = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        with suppress(OSError, ValueError):
            if not running.came_to_nothing(error):
                running.write(status=ended, error=str(error) or type(error).__name__, ended=now())
        raise
    finally:
        locks.release(running.folder)


def _not_measured(recipe: Recipe) -> list[str]:
    """A sentence about parts of the recipe's `evaluate` section that are not of arms."""
    names = [f"evaluate.{name}" for name in ("forgetting", "judge", "tasks")
             if getattr(recipe.evaluate, name)]  # fmt: skip
    if not names:
        return []
    return [
        f"arms are compared by loss and {recipe.sweep.metric}, not by {', '.join(names)}: lighten "
        "evaluate measures these of an arm's run"
    ]


def _require_plain(arms: Sequence[Arm]) -> None:
    """Every arm is plain LoRA, which alone can be cut to lower ranks.

    Raises:
        UserError: One is not.
    """
    for arm in arms:
        peft = arm.options.peft
        if arm.options.use_dora or peft is not None:
            raise UserError(
                f"sweep.truncate cuts plain LoRA adapters to lower ranks, and {arm.name} is "
                f"{'DoRA' if peft is None else peft.get('peft_type')}; remove truncate, and every "
                "rank is trained"
            )


class Sweep:
    """One sweep in its folder.

    Args:
        recipe: What all arms share and how they differ.
        resume: Take up an ended sweep again.
        progress: Show what happens on standard error.
        measuring: Log how far measuring is.

    Raises:
        UserError: The folder holds another sweep that has not ended.
    """

    def __init__(
        self, recipe: Recipe, *, resume: bool, progress: bool, measuring: Progress | None
    ) -> None:
        self.recipe, self.folder = recipe, folder_of(recipe)
        self.shown, self.measuring = TrainingProgress(enabled=progress), measuring
        self._progress = progress
        self._run_info: dict[str, Any] = {}
        self._late = False
        self._claim: folders.Claim | None = None
        self._state = self._open(resume=resume)
        self._spent_before = float(self._state.get("spent_s") or 0.0)
        self._began = self._beat = time.monotonic()

    def run(self) -> SweepResult:
        """Everything that has not been done yet, in order."""
        for notice in (*self.recipe.notices, *_not_measured(self.recipe)):
            self.shown.note(notice)
        commit, clean = hardware.commit()
        self.write(
            status="running", error=None, ended=None,
            started=self._state.get("started") or now(), commit=commit, tree_clean=clean,
            machine=hardware.machine().to_dict(), versions=hardware.versions(),
        )  # fmt: skip
        groups = self._groups() if self.recipe.sweep.search is None else self._searched()
        self.write(groups=result.group_names(groups))
        self._train_in_parallel(groups)
        for place, group in enumerate(groups):
            self._train(group, groups[place:])
            self._measure(group)
            self._collect(groups)
        if self.recipe.sweep.truncate:
            self.write(truncated=self._truncated(groups))
        self.write(status="finished", ended=now())
        return SweepResult(self.folder, self._state)

    def write(self, **parts: Any) -> None:
        """Set parts of `sweep.json`."""
        self._state |= {**parts, "spent_s": self.spent_s()}
        runs.write_json(self.folder / FILE, self._state)
        shared_keys = ("name", "status", "error", "started", "ended", "base", "data", "commit",
                       "tree_clean", "machine", "versions")  # fmt: skip
        info = {key: self._state[key] for key in shared_keys if key in self._state}
        if info != self._run_info:  # for `lighten runs list`
            Run(self.folder).update(kind="sweep", **info)
            self._run_info = info

    def spent_s(self) -> float:
        """Seconds that this sweep took until now, earlier sessions included."""
        return self._spent_before + time.monotonic() - self._began

    def came_to_nothing(self, error: BaseException) -> bool:
        """Whether a mistake of the user's ended it before anything began: nothing is left then."""
        if self._claim is None or not isinstance(error, UserError):
            return False
        return self._claim.undo()

    def _open(self, *, resume: bool) -> dict[str, Any]:
        """The state of a sweep that is taken up, or of a new one."""
        exists = (self.folder / FILE).is_file()
        if exists:
            before = SweepResult.read(self.folder).data
            ended = before.get("status") == "finished"
            if not ended or resume:
                self._require_same()
                self._require_same_data(before)
                locks.acquire(self.folder)
                self.recipe.notices.append(f"going on with the sweep in {self.folder}")
                return before
        folders.require_ours(self.folder)
        ended = exists or (self.folder / runs.METRICS).exists()
        if not exists and ended and Run(self.folder).is_unfinished():
            raise UserError(f"{self.folder} holds an unfinished run; choose another --output_dir")
        data = data_sha256(self.recipe)
        self._claim = folders.claim(self.folder, self.recipe.to_yaml(), aside=ended)
        if self._claim.aside is not None:
            self.recipe.notices.append(
                f"{self.folder} held an ended run, which is now {self._claim.aside}"
            )
        return {"version": 1, "name": self.folder.resolve().name, "data_sha256": data}

    def _require_same(self) -> None:
        """The same sweep may go on, with another budget or number of trials too.

        So may one whose settings change how much memory it takes, and no result.

        Raises:
            UserError: The recipe has changed.
        """
        before, now = Run(self.folder).recipe().completed(), self.recipe.completed()
        for settings in (before, now):
            settings["sweep"] = {
                k: v for k, v in settings["sweep"].items() if k not in ("budget", "trials")
            }
            settings["evaluate"] = {k: settings["evaluate"].get(k) for k in OF_ARMS}
        free = runs.FREE - {"sweep", "evaluate"}
        changed = [key for key in now if key not in free and now[key] != before.get(key)]
        if changed:
            key = changed[0]
            raise UserError(
                f"{self.folder} holds another sweep: {key} was "
                f"{before.get(key)!r} and is now {now[key]!r}; go on with the same settings, or "
                "choose another --output_dir"
            )

    def _require_same_data(self, before: Mapping[str, Any]) -> None:
        """Arms that are still to be trained learn on the rows that the others did.

        Raises:
            UserError: A file has changed since the sweep began.
        """
        if before.get("data_sha256", now_sha256 := data_sha256(self.recipe)) != now_sha256:
            raise UserError(
                f"{self.folder} holds a sweep whose data have changed since it began: arms that "
                "learn on other rows cannot be compared; put the files back, or choose another "
                "--output_dir"
            )

    # What is trained

    def _groups(self) -> list[Group]:
        """The groups to train, the full reference last."""
        recipe, grid = self._planned(), time_plan.swept_grid(self.recipe)
        if recipe.sweep.tune is None:
            arms = expand(recipe, grid)
        else:
            rates = tuning.rates_of(recipe, grid)
            tried = tuning.tuning_arms(recipe, grid, rates)
            if warmup := tuning.shorter_warmup(recipe, tuning.SHARE):
                said = tuning.describe_warmup(warmup, recipe)
                self.shown.note(f"tuning in runs of a quarter of the steps{said}")
            self._tune(group_arms(tried))
            arms = tuning.with_best_rates(recipe, grid, self._state["tuned"])
        groups = ray_tune.spread(group_arms(arms), self._slots())
        if "full" in recipe.sweep.reference:
            groups += group_arms([full_arm(recipe)])
        return groups

    def _searched(self) -> list[Group]:
        """Draw settings, train and measure them, until every trial has been made."""
        recipe = self._planned()
        search = Search(recipe, self.folder, self._slots())
        while batch := search.ask():
            self._train_in_parallel(batch)
            losses: dict[str, float | None] = {}
            for group in batch:
                self._run(group, self.folder, None)
                # Losses choose; answers of every trial would take longer than training them.
                self._measure(group, answers=False)
                for arm in group.arms:
                    measurement = Measurement.read(self.folder, arm.name)
                    losses[arm.name] = (
                        sum(measurement.nll) / sum(measurement.tokens) if measurement else None
                    )
            search.tell(losses)
            self._collect(search.groups())
        groups = search.groups()
        if "full" in recipe.sweep.reference:
            groups += group_arms([full_arm(recipe)])
        return groups

    def _slots(self) -> int:
        """Cohorts that are trained at once: as many as when the sweep began, whatever is there."""
        if self.recipe.sweep.executor != "ray":
            return 1
        if self._state.get("slots") is None:
            self.write(slots=ray_tune.slots())
        return int(self._state["slots"])

    def _train_in_parallel(self, groups: Sequence[Group]) -> None:
        """Let Ray train the groups, if it shall; what follows finds them finished."""
        if self.recipe.sweep.executor == "ray":
            self.shown.note(f"{len(groups)} groups through Ray, {self._slots()} at once")
            ray_tune.train_in_parallel(groups, self.folder)

    def _truncated(self, groups: Sequence[Group]) -> dict[str, Any]:
        """Of each arm, its loss when it is cut to the lower ranks."""
        ranks = grid_of(self.recipe)["lora_r"]
        return {
            arm.name: truncated_curve(
                Run(self.folder / group.name), ranks, adapter=group.adapter(arm),
                progress=self.measuring,
            ).to_dict()
            for group in groups
            for arm in group.arms
            if (measurement := Measurement.read(self.folder, arm.name)) is not None
            and measurement.has_loss and arm.name != FULL
        }  # fmt: skip

    def _collect(self, groups: Sequence[Group]) -> None:
        """Put what is known by now into `sweep.json`."""
        self.write(**self._run_facts(groups), **result.collect(self.folder, self.recipe, groups))

    def _tune(self, groups: Sequence[Group]) -> None:
        """Train the arms that find the rates; keep their held-out losses."""
        if self._state.get("tuned"):
            return
        losses: dict[str, dict[str, float | None]] = {}
        folder = self.folder / "tune"
        for group in groups:
            run = self._run(group, folder, None)
            last = {m["adapter"]: m["loss"] for m in run.metrics() if m["kind"] == "eval"}
            for arm in group.arms:
                rate = f"{arm.options.learning_rate:g}"
                stopped_early = group.adapter(arm) in left_early(run)
                loss = None if stopped_early else last.get(group.adapter(arm))
                losses.setdefault(tuning.untuned(arm), {})[rate] = loss
        self.write(tuned=tuning.chosen(losses))
        for sentence in tuning.describe(self._state["tuned"]):
            self.shown.note(sentence)

    def _planned(self) -> Recipe:
        """The recipe with as many steps as the budget allows, and each arm's `max_time`."""
        budget_s = self.recipe.sweep.budget_s
        if budget_s is None and self.recipe.max_time is None:
            return self.recipe
        if self._state.get("plan") is None:
            if budget_s is None:
                plan = time_plan.plan_of_arms(self.recipe, self.folder, self.measuring)
            else:
                plan = time_plan.plan_of_budget(
                    self.recipe, self.folder, budget_s, self.spent_s(), self.measuring
                )
            self.write(plan=plan)
            self.shown.note(f"the plan for the time there is: {plan['note']}")
        plan = self._state["plan"]
        changes = {"max_steps": plan["steps"], "eval_steps": plan["rung"], "max_time": None}
        warmup = tuning.shorter_warmup(self.recipe, plan["steps"] / plan["wanted_steps"])
        return self.recipe.changed({**changes, **warmup})

    # Training and measuring

    def _train(self, group: Group, to_come: Sequence[Group]) -> None:
        budget = self.recipe.sweep.budget_s
        deadline = None
        if budget is not None:
            plan, left_s = self._state["plan"], budget - self.spent_s()
            if self._measures_base():
                left_s -= time_plan.speed_of(plan, group).measuring_s
            deadline = self.spent_s() + time_plan.share_of(plan, to_come) * left_s
        self._run(group, self.folder, deadline)

    def _run(self, group: Group, place: Path, deadline: float | None) -> Run:
        """Train a group, or go on with it, unless there is nothing left to do."""
        recipe = group.recipe(place)
        if ray_tune.is_done(group, place):
            return Run(recipe.run_folder)
        self._require_same_data(self._state)
        exists = (recipe.run_folder / runs.RECIPE).is_file()
        self.shown.note(f"{group.name}: {', '.join(arm.name for arm in group.arms)}")
        pruner = Halving(
            recipe.run_folder,
            recipe.max_steps or 0,
            in_steps(recipe.eval_steps or 1, recipe.max_steps or 1),
            None if deadline is None else lambda: self._left_s(deadline),
            None if deadline is None else time_plan.speed_of(self._state["plan"], group),
            self._keep_time,
        )
        try:
            return train(recipe, resume=exists, progress=self._progress, pruner=pruner)
        except TrainingDiverged as error:
            self.shown.note(f"{group.name}: nothing is left to train ({error})")
            return Run(recipe.run_folder)

    def _left_s(self, deadline: float) -> float:
        return deadline - self.spent_s()

    def _keep_time(self) -> None:
        """Write down the time spent, now and then."""
        if time.monotonic() - self._beat > HEARTBEAT_S:
            self._beat = time.monotonic()
            self.write()

    def _measure(self, group: Group, *, answers: bool = True) -> None:
        """Measure the arms of a trained group, and the base with the first of them."""
        run = Run(self.folder / group.name)
        if run.info().get("status") != "finished":
            return
        diverged = {name for name, event in left_early(run).items()
                    if event.get("diverged")}  # fmt: skip
        names: list[tuple[str, str | None]] = [
            (arm.name, group.adapter(arm))
            for arm in group.arms
            if group.adapter(arm) not in diverged
        ]
        if self._measures_base():
            names.insert(0, (BASE, None))
        measure_run(
            run, names, self.folder, self.recipe, progress=self.measuring, answers=answers,
            time_for_answers=self._time_for_answers,
        )  # fmt: skip

    def _measures_base(self) -> bool:
        """Whether the untouched base is still to be measured."""
        return BASE in self.recipe.sweep.reference and not Measurement.read(self.folder, BASE)

    def _time_for_answers(self) -> bool:
        """Whether the budget has room for the answers of one more model."""
        budget_s = self.recipe.sweep.budget_s
        if budget_s is None:
            return True
        speeds = self._state["plan"]["speeds"].values()
        if self.spent_s() + max(speed["measuring_s"] for speed in speeds) <= budget_s:
            return True
        if not self._late:
            self.shown.note("the time is up: losses are measured, answers are not")
        self._late = True
        return False

    def _run_facts(self, groups: Sequence[Group]) -> dict[str, Any]:
        """Base and data, as the first run found them."""
        info = Run(self.folder / groups[0].name).info()
        return {"base": info.get("base"), "data": info.get("data")}
