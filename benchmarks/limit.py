"""How close a step is to what this machine's arithmetic and memory allow, part by part.

    python benchmarks/limit.py        # the table; the last line is JSON

One micro-batch of a real run is taken as it is: hooks keep what every layer was given, and then
each part runs by itself, forward and backward, through all layers in turn (so that weights come
from memory as they do in a step, not from a cache). A part's limit is the longer of its matrix
products at the measured rate of a large one and its bytes at the measured rate of a large copy.

Isolated timing was preferred to a profiler's classes: a backward kernel does not say which part of
the model it belongs to. What the parts leave out (residuals, rotation, embedding, Python) is the
row `rest`, the whole step less its parts; with a compiled step, parts run by themselves can take
longer than the step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import engine, machine
from benchmarks.contenders import LONG_RUN
from benchmarks.parts import PARTS, Parts
from benchmarks.steps import ROWS_PER_STEP, encoded, steps_of
from lighten.data.batches import MicroBatch
from lighten.engine.forward_backward import shares_of
from lighten.engine.step import train_step
from lighten.machine.hardware import PeakMemory
from lighten.training.setup import Setup


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Time the whole step and its parts."""
    engine.before_loading()
    device = arguments.device
    lessons = {"default": steps_of(encoded(arguments.model), 1, grouped=False)}
    settings = {"per_device_train_batch_size": ROWS_PER_STEP}
    if device != "cpu":
        settings["tokens_per_microbatch"] = 16384

    def setup_with(changes: Mapping[str, Any]) -> Setup:
        recipe = engine.recipe_of(arguments.model, ["default"], 1, settings={**settings, **changes})
        return engine.set_up(recipe, lessons, device)

    whole_steps = whole_step(setup_with(LONG_RUN), lessons, arguments.repeats, scratch)
    setup = setup_with({})
    flops_per_s = machine.matmul_rate(device, setup.base.dtype.value)
    bytes_per_s = machine.memory_rate(device)
    batch = first_micro_batch(setup, lessons, scratch)
    parts = Parts(setup, batch)
    rows: dict[str, dict[str, Any]] = {}
    for part in PARTS:
        parts.run(part)  # warm-up
        seconds = [parts.run(part) for _ in range(arguments.repeats)]
        work = parts.work(part)
        least = work.least_seconds(flops_per_s, bytes_per_s)
        median = statistics.median(seconds)
        rows[part] = {
            "seconds": median, "spread": [min(seconds), max(seconds)], "flops": work.flops,
            "bytes": work.bytes, "least_seconds": least,
            "limit_share": least / median if median > 0 else None,
            "bound": "arithmetic" if work.flops / flops_per_s >= work.bytes / bytes_per_s
            else "memory",
        }  # fmt: skip
    whole_s = statistics.median(whole_steps)
    least = sum(row["least_seconds"] for row in rows.values())
    flops = sum(row["flops"] for row in rows.values())
    rows["rest"] = {"seconds": whole_s - sum(row["seconds"] for row in rows.values())}
    rows["whole"] = {
        "seconds": whole_s, "spread": [min(whole_steps), max(whole_steps)], "least_seconds": least,
        "flops": flops, "limit_share": least / whole_s,
        "matmul_share": flops / flops_per_s / whole_s,
    }  # fmt: skip
    return {
        "parts": rows, "matmul_flops_per_s": flops_per_s, "memory_bytes_per_s": bytes_per_s,
        "tokens": batch.tokens, "padded_tokens": batch.input_ids.numel(),
        "supervised_tokens": len(batch.labels), "rows": len(batch.lengths),
        "choices": {what: choice.value for what, choice in setup.choices.items()},
    }  # fmt: skip


def first_micro_batch(setup: Setup, lessons: Mapping[str, Any], scratch: Path) -> MicroBatch:
    """The largest micro-batch of the step, laid out as the loop does."""
    loop = engine.FixedSteps(setup, lessons, scratch, PeakMemory(setup.accelerator.device.type))
    batch = next(loop._batches.of(0, setup.adapters))
    if setup.objective.verify(batch, shares_of(batch)):
        batch = next(loop._batches.of(0, setup.adapters))
    return batch


def whole_step(
    setup: Setup, lessons: Mapping[str, Any], repeats: int, scratch: Path
) -> list[float]:
    """Seconds of whole optimiser steps on that one micro-batch."""
    batch = first_micro_batch(setup, lessons, scratch)
    seconds = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        train_step([batch], setup.adapters, setup.objective, setup.accelerator, setup.scaler)
        machine.synchronize(setup.accelerator.device.type)
        seconds.append(time.perf_counter() - began)
    return seconds[2:]


def show(result: Mapping[str, Any]) -> None:
    """Print the table."""
    print(f"{result['tokens']} tokens in {result['rows']} rows; matrix products reach "
          f"{result['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s, copies "
          f"{result['memory_bytes_per_s'] / 1e9:.1f} GB/s")  # fmt: skip
    for name, row in result["parts"].items():
        line = f"{name:12} {1000 * row['seconds']:9.2f} ms"
        if "least_seconds" in row:
            line += f"  at least {1000 * row['least_seconds']:8.2f} ms"
            line += (
                "" if row["limit_share"] is None else f"  {row['limit_share']:5.0%} of the limit"
            )
            line += f" ({row['bound']})" if "bound" in row else ""
        print(line)


def main() -> None:
    """Parse, measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    before = machine.before_start()
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(arguments, Path(temporary))
    show(result)
    why = {"fewer than 3 repeats": arguments.repeats < 3}
    name = f"limit-{Path(arguments.model).name}-{arguments.device}"
    machine.store(name, {**vars(arguments), **result}, before, why)
    shares = {name: row.get("limit_share") for name, row in result["parts"].items()}
    shares.pop("rest")
    print(
        json.dumps(
            {"limit_share": shares, "matmul_share": result["parts"]["whole"]["matmul_share"]}
        )
    )


if __name__ == "__main__":
    main()
