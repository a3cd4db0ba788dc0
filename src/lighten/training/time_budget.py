"""`max_time`: as many steps as fit into a time, by the measured speed of the very run.

Before its first step a run tries a few: their gradients are formed and thrown away, no optimiser
moves, and so what follows is what `max_steps` with the same number would have given. The number is
kept in every checkpoint; a run that goes on keeps it. Only where steps turn out much slower than
those tried (somebody else began to work on the machine) does a run make fewer of them, and says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lighten import runs
from lighten.data import lengths_of
from lighten.data.batches import TokenRow
from lighten.engine.adapter_optimizer import AdapterOptimizer
from lighten.engine.validation_loss import ValidationLoss
from lighten.parallel import ranks
from lighten.recipe.section import seconds
from lighten.training.checkpoints import TrainerState
from lighten.training.progress import TrainingProgress
from lighten.training.setup import Setup
from lighten.wording import counted

# Steps that are measured, if they take no more than this share of the time there is.
TRIES, TRIED_SHARE = 3, 0.05
# A run is cut short when it would take so many times its time.
LATE = 1.15
# A step's speed is looked at over so many of the last ones: fewer would say little.
WATCHED = 5


@dataclass(frozen=True)
class Pace:
    """What was measured of the work, all adapters together.

    Attributes:
        step_s: Of a step with as many tokens as the data's steps have on average.
        evaluation_s: Of one evaluation of the validation rows; 0 where there are none.
    """

    step_s: float
    evaluation_s: float = 0.0

    def of_steps(self, steps: int, every: float) -> float:
        """Seconds of steps with an evaluation after every so many of them and after the last.

        Args:
            steps: How many.
            every: Steps between evaluations, or below 1 their share of all.
        """
        evaluations = math.ceil(steps / every) if every >= 1 else min(steps, math.ceil(1 / every))
        return steps * self.step_s + evaluations * self.evaluation_s


def steps_within(left_s: float, pace: Pace, most: int, every: float) -> int:
    """The most steps that end in time, at least one.

    Args:
        left_s: The time there is.
        pace: What the work takes.
        most: Steps that are wanted at most.
        every: Steps between evaluations, or below 1 their share of all.
    """
    low, high = 1, max(1, most)
    while low < high:  # the time grows with the steps
        middle = (low + high + 1) // 2
        if pace.of_steps(middle, every) <= left_s:
            low = middle
        else:
            high = middle - 1
    return low


class TimeBudget:
    """The clock of one run.

    Args:
        max_time: The recipe's.
        spent_s: What earlier sessions of the run took.
        every: Steps between evaluations, or below 1 their share of all.
        evaluation_s: Of one evaluation, where earlier sessions made some.
    """

    def __init__(
        self, max_time: str, spent_s: float, every: float, evaluation_s: float = 0.0
    ) -> None:
        self.max_time, self.budget_s, self.every = max_time, seconds(max_time), every
        self._began = time.monotonic() - spent_s
        self._evaluation_s = evaluation_s
        self._last_s: list[float] = []

    def spent_s(self) -> float:
        """Of this run until now, earlier sessions included."""
        return time.monotonic() - self._began

    def measure(
        self,
        rehearse: Callable[[], float],
        evaluation_s: Callable[[], float],
        agree: Callable[[bool], bool],
    ) -> Pace:
        """Try steps.

        Args:
            rehearse: Makes a step whose gradients are thrown away; seconds that a step with an
                average number of tokens would have taken by it.
            evaluation_s: Seconds that an evaluation would take.
            agree: The main rank's answer, on every rank.
        """
        began = time.monotonic()
        rehearse()  # checks the loss, forks workers, fills caches: no step after it does
        step_times: list[float] = []
        enough = False
        while not enough:
            step_times.append(rehearse())
            over = time.monotonic() - began > TRIED_SHARE * self.budget_s
            enough = agree(over or len(step_times) == TRIES)
        self._evaluation_s = evaluation_s()
        return Pace(sum(step_times) / len(step_times), self._evaluation_s)

    def steps(self, pace: Pace, most: int) -> int:
        """Of the whole run."""
        return steps_within(self.budget_s - self.spent_s(), pace, most, self.every)

    def describe(self, pace: Pace, steps: int, most: int, per_epoch: int) -> str:
        """What will be done, before it starts."""
        share = f"{steps / per_epoch:.2g} of an epoch"
        speed = f"a step takes about {pace.step_s:.2g} s"
        if pace.evaluation_s:
            speed += f", an evaluation {pace.evaluation_s:.2g} s"
        if steps == 1 and pace.of_steps(1, self.every) > self.budget_s - self.spent_s():
            return f"max_time {self.max_time} is too short: one step is made all the same; {speed}"
        if steps == most:
            minutes = pace.of_steps(steps, self.every) / 60
            return (
                f"max_time {self.max_time} is enough for all {counted(steps, 'step')}, {share}: "
                f"{speed}, {minutes:.1f} min in all"
            )
        return f"max_time {self.max_time}: {counted(steps, 'step')} of {most:,}, {share}; {speed}"

    def fewer_steps(self, step: int, total: int, step_s: float) -> int | None:
        """How many steps there is time for where those planned would take much too long, or None.

        Args:
            step: Steps made.
            total: Steps planned.
            step_s: What the last one took.
        """
        self._last_s = [*self._last_s[1 - WATCHED :], step_s]
        if len(self._last_s) < WATCHED or step >= total:
            return None
        pace = Pace(sum(self._last_s) / WATCHED, self._evaluation_s)
        left_s = self.budget_s - self.spent_s()
        if pace.of_steps(total - step, self.every) <= LATE * self.budget_s - self.spent_s():
            return None
        fewer = step + steps_within(left_s, pace, total - step, self.every)
        return fewer if fewer < total else None


class StepsInTime:
    """Sets how many steps a run makes; all ranks take the main one's number.

    Args:
        setup: The run's.
        state: Where it stands.
        progress: Where to say it.
        folder: The run's.
    """

    def __init__(
        self, setup: Setup, state: TrainerState, progress: TrainingProgress, folder: Path
    ) -> None:
        self.setup, self.state, self.progress, self.folder = setup, state, progress, folder
        every = setup.recipe.eval_steps or setup.steps_per_epoch
        evaluation_s = 0.0
        if state.step and setup.accelerator.is_main_process:  # whose answers count
            evaluation_s = _last_evaluation_s(runs.Run(folder))
        self.budget = TimeBudget(str(setup.recipe.max_time), state.elapsed_s, every, evaluation_s)

    def fit(
        self,
        tokens: Sequence[int],
        attempt: Callable[[int], None],
        held_out_loss: Callable[[AdapterOptimizer, Sequence[TokenRow]], ValidationLoss],
    ) -> None:
        """Set the number of steps from the speed of a few tries, and say what will be done.

        Args:
            tokens: Of each step of the first epoch.
            attempt: Makes the passes of one of these steps.
            held_out_loss: Measures an adapter on rows.
        """
        mean = sum(tokens) / len(tokens)
        # The first one is checked as the first step is; then those that are of the usual size.
        typical = min(range(len(tokens)), key=lambda place: abs(tokens[place] - mean))
        places = iter((0,))

        def timed() -> float:
            place, began = next(places, typical), time.perf_counter()
            attempt(place)
            return (time.perf_counter() - began) * mean / max(1, tokens[place])

        def agree(answer: bool) -> bool:
            return ranks.of_main(self.setup.accelerator, answer)

        most = self.setup.total_steps
        pace = self.budget.measure(timed, lambda: self._evaluation_s(held_out_loss), agree)
        total = ranks.of_main(self.setup.accelerator, self.budget.steps(pace, most))
        self._set(total, self.budget.describe(pace, total, most, self.setup.steps_per_epoch))

    def after_step(self, took_s: float) -> None:
        """End earlier where steps take much longer than those that were tried."""
        total = self.setup.total_steps
        fewer = self.budget.fewer_steps(self.state.step, total, took_s)
        fewer = ranks.of_main(self.setup.accelerator, fewer)
        if fewer is not None:
            self._set(fewer, f"steps take longer than those tried: {fewer} in all instead of "
                             f"{total}, so that max_time holds")  # fmt: skip

    def _evaluation_s(
        self, held_out_loss: Callable[[AdapterOptimizer, Sequence[TokenRow]], ValidationLoss]
    ) -> float:
        """What an evaluation of all adapters would take, by one over a few rows."""
        setup, held_out = self.setup, self.setup.rows.held_out
        if held_out is None:
            return 0.0
        side_by_side = setup.workers * setup.accelerator.num_processes
        # Of machines with other numbers of cores the workers differ; the rows may not.
        count = ranks.of_main(
            setup.accelerator, setup.recipe.per_device_eval_batch_size * side_by_side
        )
        rows = [row for row in held_out.rows if any(row.supervised[1:])]
        lengths, began = lengths_of(rows), time.perf_counter()
        held_out_loss(setup.adapters[0], rows[:count])
        share = sum(lengths) / max(1, sum(lengths[:count]))
        return (time.perf_counter() - began) * share * len(setup.adapters)

    def _set(self, total: int, sentence: str) -> None:
        """Take the number of steps for the rest of the run and its checkpoints, and say so."""
        self.state.total_steps = total
        self.setup.set_total_steps(total)
        self.progress.end_at(total)
        self.progress.note(sentence)
        if self.setup.accelerator.is_main_process:
            run = runs.Run(self.folder)
            other_choices = [
                choice for choice in run.info().get("choices", []) if choice["what"] != "steps"
            ]
            run.update(
                choices=[*other_choices, {"what": "steps", "value": str(total), "reason": sentence}]
            )


def _last_evaluation_s(run: runs.Run) -> float:
    """Seconds of a run's last evaluation, all adapters together; 0 before there was one."""
    lines = [line for line in run.metrics() if line["kind"] == "eval"]
    return float(sum(line["seconds"] for line in lines if line["step"] == lines[-1]["step"]))
