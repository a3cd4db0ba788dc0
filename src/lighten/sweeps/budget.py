"""What can be done in the time there is: successive halving on held-out loss.

Source: Jamieson and Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter
Optimization (arXiv 1502.07943). Here arms are dropped only where the measured speed says that not
all of them can be trained to the end, and no more of them than that.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lighten import runs
from lighten.engine.validation_loss import ValidationLoss
from lighten.runs import Run

EVENTS = "left.jsonl"
TIME_UP = "the time was up"
# Rungs where arms may be dropped, if the recipe names no eval_steps.
RUNGS = 8
# Losses say little before this share of the steps: the rate has only just warmed up.
FIRST_RUNG = 0.125
# Of the time: what a plan leaves for steps that turn out slower, where an arm that is alone in its
# run would be cut just before its end.
SPARE = 0.15


@dataclass(frozen=True)
class Speed:
    """What was measured of the work.

    Attributes:
        step_s: One step of one arm.
        evaluation_s: One evaluation of one arm while training.
        measuring_s: Measuring one arm when it is trained.
        starting_s: Loading model and data once.
    """

    step_s: float
    evaluation_s: float
    measuring_s: float
    starting_s: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Work:
    """What is trained in one run.

    Attributes:
        arms: How many.
        speed: What the work takes.
    """

    arms: int
    speed: Speed

    def needs_s(self, steps: int, rung: int) -> float:
        """Seconds to train and measure all of its arms; the model is loaded for each of the two."""
        return 2 * self.speed.starting_s + _to_the_end(self.arms, steps, rung, self.speed)


def keep(arms: int, left_s: float, steps: int, rung: int, speed: Speed) -> int:
    """How many arms can go on so that halving at every later rung ends in time; at least one.

    Args:
        arms: Still training.
        left_s: Time there is.
        steps: Steps still to make.
        rung: Steps between evaluations.
        speed: What the work takes.
    """
    while arms > 1 and not _feasible(arms, left_s, steps, rung, speed, 1):
        arms -= 1
    return arms


def longest(groups: Sequence[Work], left_s: float, steps: int, rung: Callable[[int], int]) -> int:
    """The most steps, up to those wanted, that half of the arms of every group can train in time.

    Fewer at the end would leave too little to compare. A group of one arm can drop nobody: it has
    to come to its end in its share of the time.

    Args:
        groups: What is trained one after another.
        left_s: Time there is for all of it.
        steps: Steps that are wanted.
        rung: Steps between evaluations, by the steps of a run.
    """
    if any(work.arms == 1 for work in groups):
        left_s *= 1 - SPARE

    def in_time(number: int) -> bool:
        every = rung(number)
        needs_s = [work.needs_s(number, every) for work in groups]
        return all(
            _feasible(
                work.arms, left_s * need_s / sum(needs_s) - 2 * work.speed.starting_s, number,
                every, work.speed, (work.arms + 1) // 2,
            )
            for work, need_s in zip(groups, needs_s, strict=True)
        )  # fmt: skip

    low, high = 1, steps
    while low < high:  # the cost grows with the steps
        middle = (low + high + 1) // 2
        if in_time(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _feasible(arms: int, left_s: float, steps: int, rung: int, speed: Speed, least: int) -> bool:
    """Whether so many arms can go on to the next rung, halved there and later down to the least."""
    if _to_the_end(arms, steps, rung, speed) <= left_s:
        return True
    if arms <= least or steps <= rung:
        return False
    spent_s = arms * (rung * speed.step_s + speed.evaluation_s)
    after = max(least, (arms + 1) // 2)
    # What leaves is measured too, at least on what chooses.
    left_after_s = left_s - spent_s - (arms - after) * speed.measuring_s
    return left_after_s > 0 and _feasible(after, left_after_s, steps - rung, rung, speed, least)


def _to_the_end(arms: int, steps: int, rung: int, speed: Speed) -> float:
    evaluations = -(-steps // rung)
    each = steps * speed.step_s + evaluations * speed.evaluation_s + speed.measuring_s
    return arms * each


class Halving:
    """The pruner of one group's run.

    Args:
        folder: The run's folder, where it writes who left and why.
        total_steps: Of the run.
        rung: Steps between evaluations.
        left_s: Time left for this group, asked anew each time; None: no limit.
        speed: What the work takes, until this run has measured it itself.
        beat: Called after every step.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        rung: int,
        left_s: Callable[[], float] | None,
        speed: Speed | None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self._beat = beat
        self._path, self._total, self._rung = folder / EVENTS, total_steps, rung
        self._left_s, self._speed = left_s, speed
        self._last_s: float | None = None

    def leaving(
        self, step: int, losses: Mapping[str, ValidationLoss], active: Sequence[str]
    ) -> Collection[str]:
        """Who trains no further after this step."""
        self._beat()
        speed = self._measured(losses, len(active))
        if self._left_s is None or speed is None or step == self._total:
            return ()
        left_s = self._left_s()
        if left_s < len(active) * speed.measuring_s:
            for name in active:
                self._say(step, name, TIME_UP)
            return active
        if not losses or step < FIRST_RUNG * self._total:
            return ()
        kept_count = keep(len(active), left_s, self._total - step, self._rung, speed)
        # What is not a number is in no order with others.
        ranked = sorted(active, key=lambda name: (math.isnan(losses[name].loss), losses[name].loss))
        for name in ranked[kept_count:]:
            self._say(
                step, name,
                f"held-out loss {losses[name].loss:.4f}, the lowest {losses[ranked[0]].loss:.4f}; "
                f"the time does for {kept_count} of {len(ranked)}",
            )  # fmt: skip
        return ranked[kept_count:]

    def diverged(self, step: int, name: str) -> None:
        """Note an arm whose loss is not a number."""
        self._say(step, name, "its loss or gradient was not a number", diverged=True)

    def _measured(self, losses: Mapping[str, ValidationLoss], active: int) -> Speed | None:
        """The speed, followed as a moving mean over the steps of this very run."""
        now, last = time.monotonic(), self._last_s
        # The next step follows an evaluation and perhaps a checkpoint: it is no measure.
        self._last_s = None if losses else now
        if last is not None and not losses and self._speed is not None:
            step_s = (now - last) / max(1, active)
            speed = self._speed
            self._speed = replace(speed, step_s=0.9 * speed.step_s + 0.1 * step_s)
        return self._speed

    def _say(self, step: int, name: str, why: str, *, diverged: bool = False) -> None:
        line = {"step": step, "arm": name, "why": why, "diverged": diverged}
        runs.append_line(self._path, line)


def left_early(run: Run) -> dict[str, dict[str, Any]]:
    """Who left an ended run early and why, by adapter.

    What a kill undid, because the run went on from an earlier checkpoint, is passed over.
    """
    steps = {adapter["name"]: adapter["steps"] for adapter in run.info().get("adapters") or []}
    return {
        str(line["arm"]): line
        for line in runs.read_lines(run.folder / EVENTS)
        if steps.get(line["arm"], 0) <= line["step"]
    }
