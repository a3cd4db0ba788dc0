"""One measured training for `plan_accuracy.py`, in a process of its own: `plan_worker.py JOB.json`.

What `lighten train` does from before the base is loaded to the last step, on rows of one length.
The last line printed is JSON: the peak after each stage and the seconds of each step. After each
step it waits: the rates that the plan rests on are timed then.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks import engine
from benchmarks.machine import TURN
from benchmarks.steps import Row
from lighten.engine.step import AdapterStep
from lighten.machine.hardware import PeakMemory
from lighten.recipe import Recipe
from lighten.training.base import load_base


def rows_of(count: int, tokens: int, supervised: float, vocabulary: int, seed: int) -> list[Row]:
    """Rows of random tokens of which the last share is supervised."""
    generator = torch.Generator().manual_seed(seed)
    answer = max(1, min(tokens - 1, round(tokens * supervised)))
    mask = [False] * (tokens - answer) + [True] * answer
    return [
        (torch.randint(0, vocabulary, (tokens,), generator=generator).tolist(), list(mask))
        for _ in range(count)
    ]


class Watched(engine.FixedSteps):
    """The training loop, noting the peak after each step and waiting for its turn."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seconds: list[float] = []
        self.peaks: list[int] = []

    def _record(self, report: dict[str, AdapterStep], seconds: float) -> None:
        super()._record(report, seconds)
        self.seconds.append(seconds)
        self.peaks.append(int(self.memory.read()["peak_bytes"]))
        print(TURN, flush=True)
        sys.stdin.readline()


def main() -> None:
    """Train and print what was measured."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    recipe = Recipe.from_values(job["recipe"])
    engine.before_loading()
    memory = PeakMemory("cpu")
    base = load_base(recipe, "cpu", learns=True)
    stages = {"loading": memory.read()["peak_bytes"]}
    vocabulary = int(base.model.config.get_text_config().vocab_size)
    steps = recipe.max_steps or 1
    lessons = {
        member.name: [
            rows_of(job["rows"], job["tokens"], job["supervised"], vocabulary, place * steps + step)
            for step in range(steps)
        ]
        for place, member in enumerate(recipe.cohort())
    }
    setup = engine.set_up(recipe, lessons, "cpu", base)
    scratch = Path(job["scratch"])
    scratch.mkdir(parents=True, exist_ok=True)
    loop = Watched(setup, lessons, Path(mkdtemp(dir=scratch)), memory)
    loop.run()
    peak = memory.read()
    print(json.dumps({
        **peak, "stages": {**stages, "steps": loop.peaks}, "step_seconds": loop.seconds,
        "choices": {what: choice.value for what, choice in setup.choices.items()},
        "micro_batches": job["rows"],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
