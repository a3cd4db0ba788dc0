"""Search beyond a grid: Optuna asks for settings, cohorts train them, and it is told the losses.

Several settings are asked for at once and trained as one cohort, so a search costs little more than
its share of a run. The study lives in the sweep's folder as Optuna's own journal file (a line per
change, so a kill loses none; `optuna-dashboard` opens it); what was asked for and not yet told is
asked for again under its old name, so that its run goes on where it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lighten.errors import UserError, missing_extra
from lighten.recipe import Range, Recipe
from lighten.recipe.swept import takes_whole_numbers
from lighten.sweeps.arms import Arm, Group, expand, group_arms
from lighten.sweeps.ray_tune import spread

JOURNAL, STUDY, BATCH, SAME = "search.journal", "sweep", "batch", "same"
TRIALS = 20
# Settings that one cohort tries together: more would be drawn before anything was learnt of them.
TOGETHER = 4


@dataclass(frozen=True)
class Trial:
    """A setting that was drawn.

    Attributes:
        arm: Its name is the trial's number.
        loss: Held-out, nats per token; None: not trained to the end yet, or its loss is no number.
        state: `complete`, `fail` or `running`, as Optuna says.
        batch: Number of the first trial that was asked for together with it; None: it was not to
            be trained.
        same: Whether another one that was asked for together with it has its setting, and is
            trained for both.
    """

    arm: Arm
    loss: float | None
    state: str
    batch: int | None = None
    same: bool = False


class Search:
    """A study over the swept settings of a recipe, by held-out loss.

    Lists are drawn from as unordered choices, ranges evenly between their ends (`log: true`: evenly
    in the logarithm); `count` and `factor` mean nothing here.

    Args:
        recipe: Its `sweep` section says what is drawn, how (`search`), and how often (`trials`).
        folder: The sweep's.
        slots: Cohorts that can be trained at once; what is drawn together is spread over them.

    Raises:
        UserError: Optuna is not installed, nothing is swept, or the study is of other settings.
    """

    def __init__(self, recipe: Recipe, folder: Path, slots: int = 1) -> None:
        options, self._slots = recipe.sweep, slots
        if not options.grid:
            raise UserError("sweep: search draws swept settings, and there are none; name some")
        if len(recipe.cohort()) > 1:
            raise UserError(
                "sweep: search draws the settings of one adapter, and the recipe spells out "
                f"{len(recipe.cohort())}; keep one"
            )
        self.recipe, self.trials = recipe, options.trials or TRIALS
        self._arms: dict[int, Arm] = {}
        self._space = {key: _distribution(key, tried) for key, tried in options.grid.items()}
        self._study = _study(folder, options.search or "tpe", recipe.cohort()[0].seed)
        self._require_same_space(folder)

    def ask(self) -> list[Group]:
        """What to train next, in cohorts; nothing at the end.

        First comes what was asked for before and never told. A setting that has a loss already, or
        came to nothing, is not trained again: the study is told the same.
        """
        if waiting := [group for group in self.groups() if self._waits(group)]:
            return waiting
        # Of a small space every setting comes at last; what is drawn again counts as a trial too:
        # at once, or when the one that is trained for both has its loss.
        losses = {
            trial.arm.setting: trial.loss
            for trial in self._drawn_trials()
            if trial.state != "running"
        }
        for trial in self._drawn_trials():
            if trial.state == "running" and trial.same:
                self._tell(_number(trial.arm), losses.get(trial.arm.setting))
        new_trials: dict[str, int] = {}
        while (
            len(new_trials) < max(TOGETHER, self._slots) and len(self._study.trials) < self.trials
        ):
            with _quiet():
                optuna_trial = self._study.ask(self._space)
            setting = self._arm(optuna_trial.number, optuna_trial.params).setting
            if setting in losses:
                self._tell(optuna_trial.number, losses[setting])
            elif setting in new_trials:
                optuna_trial.set_user_attr(SAME, True)
            else:
                new_trials[setting] = optuna_trial.number
                optuna_trial.set_user_attr(BATCH, min(new_trials.values()))
        return [group for group in self.groups() if self._waits(group)]

    def groups(self) -> list[Group]:
        """Every cohort asked for so far, in order: the same after a restart."""
        batches: dict[int, list[Arm]] = {}
        for trial in self._drawn_trials():
            if trial.batch is not None:
                batches.setdefault(trial.batch, []).append(trial.arm)
        return [
            replace(group, name=f"with-{group.arms[0].name}")
            for arms in batches.values()
            for group in spread(group_arms(arms), self._slots)
        ]

    def tell(self, losses: Mapping[str, float | None]) -> None:
        """Give the study the losses by arm; None, or no number: the setting came to nothing."""
        for trial in self._drawn_trials():
            if trial.arm.name in losses and trial.state == "running":
                self._tell(_number(trial.arm), losses[trial.arm.name])

    def _tell(self, number: int, loss: float | None) -> None:
        if loss is not None and math.isfinite(loss):
            self._study.tell(number, loss)
        else:
            self._study.tell(number, state=_states().FAIL)

    def _drawn_trials(self) -> list[Trial]:
        return [
            Trial(self._arm(trial.number, trial.params), trial.value, trial.state.name.lower(),
                  trial.user_attrs.get(BATCH), trial.user_attrs.get(SAME, False))
            for trial in self._study.trials
        ]  # fmt: skip

    def _waits(self, group: Group) -> bool:
        """Whether an arm of the group still waits for its loss."""
        running = {trial.arm.name for trial in self._drawn_trials() if trial.state == "running"}
        return any(arm.name in running for arm in group.arms)

    def _arm(self, number: int, params: Mapping[str, Any]) -> Arm:
        if number not in self._arms:
            grid = {key: [_value(drawn)] for key, drawn in params.items()}
            (arm,) = expand(self.recipe, grid, self.recipe.sweep.scaling)
            self._arms[number] = replace(arm, name=f"trial-{number}")
        return self._arms[number]

    def _require_same_space(self, folder: Path) -> None:
        space = json.dumps(
            {key: str(distribution) for key, distribution in sorted(self._space.items())},
            sort_keys=True,
        )
        before = self._study.user_attrs.get("space")
        if before is None:
            self._study.set_user_attr("space", space)
        elif before != space:
            raise UserError(
                f"{folder / JOURNAL} holds a search over other settings; choose another "
                "--output_dir, or give the same ones to go on with it"
            )


def _number(arm: Arm) -> int:
    """Of the trial that drew an arm."""
    return int(arm.name.rpartition("-")[2])


def _distribution(key: str, tried: list[Any] | Range) -> Any:
    """What Optuna draws from."""
    optuna = _optuna()
    if not isinstance(tried, Range):
        # As text, for Optuna's choices are plain values and a list of modules is none.
        return optuna.distributions.CategoricalDistribution(
            [json.dumps(choice) for choice in tried]
        )
    if takes_whole_numbers(key):
        return optuna.distributions.IntDistribution(int(tried.min), int(tried.max), log=tried.log)
    return optuna.distributions.FloatDistribution(tried.min, tried.max, log=tried.log)


def _value(drawn: Any) -> Any:
    """A choice is text; a number was drawn from a range."""
    return json.loads(drawn) if isinstance(drawn, str) else drawn


def _study(folder: Path, method: str, seed: int) -> Any:
    optuna = _optuna()
    folder.mkdir(parents=True, exist_ok=True)
    backend = optuna.storages.journal.JournalFileBackend(str(folder / JOURNAL))
    with _quiet():
        study = optuna.create_study(
            study_name=STUDY, direction="minimize", load_if_exists=True,
            storage=optuna.storages.JournalStorage(backend),
        )  # fmt: skip
        # A sampler that began anew with the same seed would draw the same settings again.
        seed += len(study.trials)
        if method == "random":
            study.sampler = optuna.samplers.RandomSampler(seed=seed)
        else:
            # Several are asked for at once: those being trained count as bad until they are told.
            study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    return study


def _states() -> Any:
    return _optuna().trial.TrialState


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise missing_extra("optuna", "search") from error
    return optuna


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's own lines, and its notice that a useful option is still called new."""
    import logging
    import warnings

    logger = logging.getLogger("optuna")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", _optuna().exceptions.ExperimentalWarning)
            yield
    finally:
        logger.setLevel(before)
