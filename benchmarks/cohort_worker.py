"""One process of `cohort.py`: runs one after another and cohorts, back to back on one base.

    python benchmarks/cohort_worker.py JOB.json

The last line printed is JSON. A run's first step does not count: it checks the loss and meets new
shapes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks import engine, plain_peft
from benchmarks.comparison import loss_difference
from benchmarks.steps import Steps
from lighten import models
from lighten.engine.batching import choose_passes
from lighten.engine.workers import FULL_TOKENS
from lighten.machine.hardware import PeakMemory
from lighten.training.base import load_base

# Rows of a micro-batch never decide in a cohort: its tokens do.
MANY_ROWS = 4096
# PEFT's runs are alike in length, so that few of them tell the time of all.
PEFT_RUNS = 2

Lessons = Mapping[str, Steps]


def timed(seconds: Sequence[float]) -> float:
    """Seconds of the steps that count."""
    return sum(seconds[1:])


def run_ours(
    base: models.Base,
    lessons: Lessons,
    job: Mapping[str, Any],
    start: Mapping[str, str] | None,
    memory: PeakMemory | None = None,
) -> dict[str, Any]:
    """A cohort of the lessons' adapters on a base that is left as it was.

    The peak is above what the process held when `memory` was made, or else when this begins.
    """
    steps = len(next(iter(lessons.values())))
    first_rows = [row for lesson in lessons.values() for row in lesson[0]]
    # What the run would decide if its batch were this step, and not as many rows as a micro-batch
    # may hold. Compiled layers stay behind when a cohort is taken off, and several cannot use them.
    full_workers = sum(len(ids) for ids, _ in first_rows) // FULL_TOKENS
    side_by_side = max(1, min(torch.get_num_threads(), len(first_rows), full_workers))
    settings = {
        "per_device_train_batch_size": MANY_ROWS, "torch_compile": False, "workers": side_by_side,
        **job["settings"],
    }  # fmt: skip
    recipe = engine.recipe_of(job["model"], list(lessons), steps, settings=settings)
    memory = memory or PeakMemory(job["device"])
    setup = engine.set_up(recipe, lessons, job["device"], base)
    if len(lessons) > 1:
        tokens_per_adapter = sum(len(ids) for ids, _ in first_rows) // len(lessons)
        passes = choose_passes(base, tokens_per_adapter, setup.tokens_per_microbatch, side_by_side)
        setup.choices["passes"], setup.one_adapter_at_a_time = passes, passes.value == "apart"
    try:
        return engine.train(setup, lessons, Path(job["scratch"]), memory, start=start)
    finally:
        setup.trained.detach()


def ours(job: Mapping[str, Any], base: models.Base) -> dict[str, Any]:
    """Every adapter alone, then the first N of them together."""
    lessons, start = job["lessons"], job["start"]
    names = list(lessons)

    def train_members(members: Sequence[str]) -> dict[str, Any]:
        return run_ours(
            base, {name: lessons[name] for name in members}, job, {n: start[n] for n in members}
        )

    alone = {name: train_members([name]) for name in names}
    together = {size: train_members(names[:size]) for size in job["sizes"] if size > 1}
    losses_alone = {name: run["losses"][name] for name, run in alone.items()}
    return {
        "passes": {size: run["choices"]["passes"] for size, run in together.items()},
        "alone_s": [timed(run["step_seconds"]) for run in alone.values()],
        "cohort_s": {size: timed(run["step_seconds"]) for size, run in together.items()},
        "largest_loss_difference": {
            size: largest_difference(run["losses"], losses_alone)
            for size, run in together.items()
        },
        "losses": losses_alone,
        "idle": any(idle(run) for run in (*alone.values(), *together.values())),
        "choices": alone[names[0]]["choices"],
    }  # fmt: skip


def peft(job: Mapping[str, Any], load: Callable[[], Any]) -> dict[str, Any]:
    """PEFT's adapters one after another in a plain loop."""
    names = list(job["lessons"])[:PEFT_RUNS]
    model = PeftModel.from_pretrained(
        load(), job["start"][names[0]], adapter_name=names[0], is_trainable=True
    )
    for name in names[1:]:
        model.load_adapter(job["start"][name], adapter_name=name, is_trainable=True)
    lessons = {name: job["lessons"][name] for name in names}
    run = plain_peft.train(model, lessons, job["device"], engine.OPTIMISER)
    return {
        "alone_s": [timed(seconds) for seconds in run["step_seconds"].values()],
        "losses": run["losses"],
        "idle": idle(run),
    }


def largest_difference(
    losses: Mapping[str, Sequence[float]], reference: Mapping[str, Sequence[float]]
) -> float:
    """Largest relative difference of any adapter's loss at any step; of no number, no number."""
    return float(np.max([loss_difference(losses[name], reference[name]) for name in losses]))


def idle(run: Mapping[str, Any]) -> bool:
    """Whether an adapter has not trained at all (trap 51)."""
    still = any(not moved > 0.0 for moved in run["moved"].values())
    return still or not all(norm > 0.0 for norms in run["grad_norms"].values() for norm in norms)


def _peft_base(job: Mapping[str, Any]) -> Any:
    """As PEFT's documentation loads it, with the attention that is quickest on short rows here."""
    options: dict[str, Any] = {}
    if job["settings"].get("load_in_4bit"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    attention = "eager" if job["device"] == "cpu" else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.bfloat16, attn_implementation=attention,
        device_map=job["device"], **options,
    )  # fmt: skip
    model.requires_grad_(False)
    return model


def main() -> None:
    """Do what the job says and print what was measured."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    engine.before_loading()
    if job["engine"] == "peft":
        print(json.dumps(peft(job, lambda: _peft_base(job))))
        return
    memory = PeakMemory(job["device"])
    recipe = engine.recipe_of(job["model"], list(job["lessons"]), 1, settings=job["settings"])
    base = load_base(recipe, job["device"])
    if job["engine"] == "memory":
        # The same meter throughout: the one that the loop tells of its workers' processes.
        result = run_ours(base, job["lessons"], job, None, memory)
        keys = ("peak_bytes", "method", "choices")
        print(json.dumps({**{key: result[key] for key in keys}, "idle": idle(result)}))
    else:
        print(json.dumps(ours(job, base)))


if __name__ == "__main__":
    main()
