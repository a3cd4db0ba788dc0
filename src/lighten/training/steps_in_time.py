"""The number of steps of a run with a `max_time`: set before the first, told, and kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lighten import runs
from lighten.data import lengths_of
from lighten.data.batches import TokenRow
from lighten.engine.adapter_optimizer import AdapterOptimizer
from lighten.engine.validation_loss import ValidationLoss
from lighten.parallel import ranks
from lighten.training.checkpoints import TrainerState
from lighten.training.progress import TrainingProgress
from lighten.training.setup import Setup
from lighten.training.time_budget import TimeBudget


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
        self.budget = TimeBudget(str(setup.recipe.max_time), state.elapsed_s, every)

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
        count = setup.recipe.per_device_eval_batch_size * side_by_side
        rows = [row for row in held_out.rows if any(row.supervised[1:])]
        lengths, began = lengths_of(rows), time.perf_counter()
        held_out_loss(setup.adapters[0], rows[:count])
        share = sum(lengths) / max(1, sum(lengths[:count]))
        return (time.perf_counter() - began) * share * len(setup.adapters)

    def _set(self, total: int, sentence: str) -> None:
        """Take the number of steps for the rest of the run and its checkpoints, and say so."""
        self.state.total_steps = total
        self.setup.set_total_steps(total)
        self.progress.note(sentence)
        if self.setup.accelerator.is_main_process:
            run = runs.Run(self.folder)
            other_choices = [
                choice for choice in run.info().get("choices", []) if choice["what"] != "steps"
            ]
            run.update(
                choices=[*other_choices, {"what": "steps", "value": str(total), "reason": sentence}]
            )
