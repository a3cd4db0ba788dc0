"""Several ranks: every strategy against one process, the largest model, and runs that are killed.

    python benchmarks/scale_table.py                    # all parts; the last line is JSON
    python benchmarks/scale_table.py --only strategies  # or kills, largest, streamed, nvme
    python benchmarks/scale_table.py --only kills --kills 3

A tiny Llama shape with random weights, float32, two ranks over gloo. The loss trajectory and what
is shipped are compared with those of one process that has as many examples in a step: ragged
counts of supervised tokens, 1 and 3 micro-batches a step, two adapters with their own rates.
A kill is SIGKILL at a random moment after the start, of one rank or of all; the run is resumed,
every fourth time with another number of ranks. The largest model within a limit of memory is
`largest.py`'s, the streamed parts are those of `streamed_base.py`, which is run for them, and the
comparison with DeepSpeed's ZeRO-3 over NVMe is `zero3_nvme.py`'s, where `make deepspeed` has made
its environment. What was not measured is null.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import largest, machine, zero3_nvme
from benchmarks.streamed_base import GIB

PARTS = ("strategies", "kills", "largest", "streamed", "nvme")
STRATEGIES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
COHORT = [{"name": "quick", "lora_r": 4, "learning_rate": 3e-3},
          {"name": "slow", "lora_r": 8, "learning_rate": 1e-3}]  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "cohort": {"adapters": COHORT, "lora_dropout": 0.1},
    "full": {"method": "full", "learning_rate": 1e-3},
    "last layers": {"trainable_layers": "last_1", "learning_rate": 1e-3},
}
STEPS, KILLED_STEPS = 6, 60
LONGEST_S = 600.0
VOCABULARY = 2048  # of the largest models: their layers are what counts
MODEL = """
import sys
from tests.tiny import save_tiny
save_tiny(__import__("pathlib").Path(sys.argv[1]))
"""


def start(folder: Path, settings: dict[str, Any], ranks: int, *words: str) -> subprocess.Popen[str]:
    """`lighten train` with so many ranks, running."""
    file = folder / f"{Path(settings['output_dir']).name}.yaml"
    file.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "lighten", "train", str(file), "--no-plan", *words]
    if ranks > 1:
        command += ["--processes", str(ranks)]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "LIGHTEN_DEVICE": "cpu"},
    )  # fmt: skip


def train(folder: Path, settings: dict[str, Any], ranks: int) -> Path:
    """A whole training; its run folder.

    Raises:
        SystemExit: It failed.
    """
    process = start(folder, settings, ranks)
    _, errors = process.communicate(timeout=LONGEST_S)
    if process.returncode:
        raise SystemExit(f"{settings['output_dir']} with {ranks} ranks: {errors[-2000:]}")
    return Path(settings["output_dir"])


def difference(run_folder: Path, reference: Path) -> dict[str, float]:
    """The largest relative difference of a loss, and the largest difference of a weight."""
    from safetensors.torch import load_file

    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (run_folder, reference)
    ]
    assert len(losses[0]) == len(losses[1])
    weights = 0.0
    files = [*run_folder.glob("adapters/*/*.safetensors"), *run_folder.glob("model/*.safetensors")]
    assert files
    for file in files:
        theirs = load_file(reference / file.relative_to(run_folder))
        for key, value in load_file(file).items():
            weights = max(weights, float((value - theirs[key]).abs().max()))
    return {
        "loss": max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True)),
        "weights": weights,
    }


def strategies(folder: Path, base: dict[str, Any]) -> list[dict[str, Any]]:
    """Every strategy, method and accumulation beside one process."""
    rows = []
    for what, method in METHODS.items():
        for count in (1, 3):
            shared = {**base, **method, "max_steps": STEPS}
            alone = train(folder, {
                **shared, "gradient_accumulation_steps": 2 * count,
                "output_dir": str(folder / f"{what}-one-{count}"),
            }, 1)  # fmt: skip
            for strategy in STRATEGIES:
                distributed = train(folder, {
                    **shared, "gradient_accumulation_steps": count, "strategy": strategy,
                    "output_dir": str(folder / f"{what}-{strategy}-{count}"),
                }, 2)  # fmt: skip
                rows.append({"method": what, "strategy": strategy, "micro_batches": count,
                             **difference(distributed, alone)})  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
    return rows


def kills(folder: Path, base: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Runs that are killed at a random moment and go on; what is shipped beside a whole one."""
    draw = random.Random(0)
    shared = {
        **base, **METHODS["cohort"], "max_steps": KILLED_STEPS, "save_steps": 5,
        "strategy": "fsdp", "gradient_accumulation_steps": 1,
    }  # fmt: skip
    began = time.monotonic()
    reference = train(folder, {**shared, "output_dir": str(folder / "whole")}, 2)
    usual_s = time.monotonic() - began
    steps_s = json.loads((reference / "run.json").read_text())["training"]["seconds"]
    rows: list[dict[str, Any]] = []
    for number in range(count):
        settings = {**shared, "output_dir": str(folder / f"killed-{number}")}
        run, other_ranks = Path(settings["output_dir"]), number % 4 == 3
        process = start(folder, settings, 2)
        if other_ranks:  # what never began would not go on with another number, but begin with it
            while process.poll() is None and not (run / "metrics.jsonl").exists():
                time.sleep(0.01)
            time.sleep(draw.uniform(0.0, 1.0) * steps_s)
        else:
            time.sleep(draw.uniform(0.1, 1.0) * usual_s)
        ranks: list[psutil.Process] = []
        while process.poll() is None and len(ranks) < 2:  # a busy machine has not started them yet
            time.sleep(0.05)
            ranks = psutil.Process(process.pid).children()
        victims = draw.sample(ranks, draw.choice([1, len(ranks)])) if ranks else []
        for victim in victims:
            victim.send_signal(signal.SIGKILL)
        ended = time.monotonic()
        process.communicate(timeout=60)
        ended = time.monotonic() - ended
        # What was killed before there was a run begins anew: a step of one rank is another one.
        other_ranks = other_ranks and run.exists()
        resumed = start(
            folder, settings, 1 if other_ranks else 2, *(["--resume"] if run.exists() else [])
        )
        _, errors = resumed.communicate(timeout=LONGEST_S)
        row: dict[str, Any] = {
            "kill": number, "another_number_of_ranks": other_ranks, "ended_s": ended,
            "ranks_killed": len(victims), "resumed": resumed.returncode == 0,
        }  # fmt: skip
        if resumed.returncode == 0:
            row |= difference(run, reference)
            row["equal"] = row["weights"] <= (1e-5 if other_ranks else 0.0)
        else:
            row |= {"said": errors[-500:], "equal": False}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def figures_of(script: str) -> dict[str, Any]:
    """The figures of another benchmark of this folder, by its last line."""
    process = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script))],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    figures: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Measure, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--gib", type=float, default=3.0, help="limit of each process")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the largest models")
    arguments = parser.parse_args()
    requested = arguments.only or PARTS
    before = machine.before_start()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="lighten-scale-") as scratch:
        folder = Path(scratch)
        subprocess.run(
            [sys.executable, "-c", MODEL, str(folder / "base")], check=True,
            cwd=Path(__file__).parents[1], capture_output=True,
        )  # fmt: skip
        data = folder / "chat.jsonl"
        data.write_text("".join(map(lesson, range(40))), encoding="utf-8")
        base = {
            "model_name_or_path": str(folder / "base"), "dataset": str(data), "dtype": "float32",
            "per_device_train_batch_size": 2, "max_train_samples": 13, "val_size": 0,
        }  # fmt: skip
        if "strategies" in requested:
            results["strategies"] = strategies(folder, base)
        if "kills" in requested:
            results["kills"] = kills(folder, base, arguments.kills)
        if "largest" in requested:
            results["largest"] = largest.largest(
                folder / "models", limit_bytes=int(arguments.gib * GIB),
                hidden=arguments.hidden, vocabulary=VOCABULARY,
            )  # fmt: skip
    if "streamed" in requested:
        results["streamed"] = figures_of("streamed_base.py")
    if "nvme" in requested and zero3_nvme.python_of(zero3_nvme.ENVIRONMENT).exists():
        results["nvme"] = figures_of("zero3_nvme.py")
    machine.store("scale_table", results, before, {
        "few kills": "kills" in requested and arguments.kills < 20,
        "small models": "largest" in requested and (arguments.gib, arguments.hidden) != (3.0, 1024),
    })  # fmt: skip
    print(json.dumps(last_line(results)))


def last_line(results: dict[str, Any]) -> dict[str, Any]:
    """The figures of all parts; those of parts that were left out are null."""
    rows, ended = results.get("strategies"), results.get("kills")
    of_largest, of_streamed = results.get("largest", {}), results.get("streamed", {})
    of_nvme = results.get("nvme", {})
    return {
        "strategies_max_difference":
            max(max(row["loss"], row["weights"]) for row in rows) if rows else None,
        **{name: of_largest.get(name) for name in largest.FIGURES},
        "streamed_8_vs_8_runs": of_streamed.get("streamed_8_vs_8_runs"),
        **{name: of_nvme.get(name) for name in zero3_nvme.RATIOS},
        "kills_resumed": sum(row["equal"] for row in ended) if ended else None,
    }  # fmt: skip


def lesson(number: int) -> str:
    """One of the conversations, whose answers are of unequal length."""
    answer = f"The answer is {2 * number}. " * (1 + number % 5)
    return json.dumps({"messages": [
        {"role": "user", "content": f"What is {number} plus {number}? " + "please " * (number % 7)},
        {"role": "assistant", "content": answer},
    ]}) + "\n"  # fmt: skip


if __name__ == "__main__":
    main()
