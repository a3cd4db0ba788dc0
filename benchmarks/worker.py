"""lighten on given steps, in a process of its own: `python benchmarks/worker.py JOB.json`.

The job names the model, each adapter's steps and start, the optimiser and settings of the recipe;
the last line printed is JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import engine
from lighten.machine.hardware import PeakMemory


def main() -> None:
    """Train and print what was measured."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    engine.before_loading()
    memory = PeakMemory(job["device"])
    recipe = engine.recipe_of(
        job["model"], list(job["lessons"]), len(next(iter(job["lessons"].values()))),
        optimiser=job["optimiser"], settings=job["settings"],
    )  # fmt: skip
    setup = engine.set_up(recipe, job["lessons"], job["device"])
    result = engine.train(
        setup, job["lessons"], Path(job["scratch"]), memory, start=job["start"],
        learns=job.get("learns", True),
    )  # fmt: skip
    print(json.dumps({**result, "first_step_s": result["first_step_at"] - job["began"]}))


if __name__ == "__main__":
    main()
