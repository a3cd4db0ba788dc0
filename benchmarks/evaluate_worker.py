"""`lighten evaluate` in a process of its own: `python benchmarks/evaluate_worker.py JOB.json`.

The job names the run and what is measured; the last line printed is JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import lighten
from lighten.evaluation import (
    evaluation as loaded,  # imports are no part of the time, as the peer's
)


def main() -> None:
    """Evaluate and print what was found."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    assert loaded is not None
    began = time.perf_counter()
    evaluation = lighten.evaluate(
        lighten.Run(job["run"]), max_examples=job["examples"], max_new_tokens=job["new_tokens"]
    )
    seconds = time.perf_counter() - began
    models = {
        "base" if model["adapter"] is None else "adapter": {
            "losses": [loss for loss, _ in model["losses"]],
            "texts": [example["answers"][model["name"]] for example in evaluation.examples],
        }
        for model in evaluation.models
    }
    print(json.dumps({"seconds": seconds, "models": models}))


if __name__ == "__main__":
    main()
