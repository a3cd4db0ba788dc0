"""lighten's training engine against TRL + PEFT: same model, rows, order, start and losses.

    python benchmarks/train_vs_peers.py --setup        # once: TRL into an environment of its own
    python benchmarks/train_vs_peers.py                # the table; the last line is JSON

Every contender runs in its own process on the very same optimiser steps (token ids and masks are
written to a file first), from the same adapter, with AdamW at a constant rate. A row counts only if
its losses follow TRL's in float32 within the rounding of its format. Speed counts real tokens, the
median over the steps after warm-up and over repeats.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

PEERS = Path.home() / ".cache" / "lighten" / "bench-trl"
RESULTS = Path(__file__).parent / "results"
ROWS_PER_STEP, LONGEST = 8, 512
# Losses may differ from TRL's by this much, relative, at any step: the rounding of bfloat16.
AGREEMENT = 0.03
# One micro-batch size and rate for all; what differs is written out.
LEARNING_RATE = 1e-4
BEST = {"gradient_checkpointing": False, "bf16": True}
CONTENDERS: dict[str, dict[str, Any]] = {
    "lighten": {"engine": "lighten", "checkpointing": False},
    "lighten, checkpointing": {"engine": "lighten", "checkpointing": True},
    "trl, defaults": {"engine": "trl", "dtype": "float32", "options": {}},
    "trl, best": {"engine": "trl", "dtype": "bfloat16", "options": BEST},
    "trl, checkpointing": {
        "engine": "trl", "dtype": "bfloat16",
        "options": {"gradient_checkpointing": True, "bf16": True},
    },
}  # fmt: skip


def documentation() -> list[dict[str, str]]:
    """Real text of real lengths: objects of the standard library and their whole docstrings."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if 300 < len(text) < 1800:
                    prompt = f"Document {node.name} of the Python module {path.stem}."
                    found.append({"prompt": prompt, "completion": text})
    return found


def steps_of(model: str, count: int) -> list[list[tuple[list[int], list[bool]]]]:
    """Optimiser steps of encoded rows, grouped by length as every contender may."""
    from lighten import data
    from lighten.data import Example, Message
    from lighten.data.batches import steps_of_epoch
    from lighten.models import load_tokenizer

    tokenizer = load_tokenizer(model)
    data.choose_template(tokenizer, None)
    examples = [
        Example("stdlib", i, (Message("user", row["prompt"]), Message("assistant",
                row["completion"])), single_turn=True)
        for i, row in enumerate(documentation())
    ]  # fmt: skip
    rows = data.encode(examples, tokenizer, max_length=LONGEST, truncation_strategy="drop").rows
    lengths = [len(row.input_ids) for row in rows]
    order = steps_of_epoch(lengths, ROWS_PER_STEP, seed=0, epoch=0)
    while len(order) < count:
        order += order
    return [[(rows[i].input_ids, rows[i].supervised) for i in step] for step in order[:count]]


def matmul_rate(device: str) -> float:
    """Best rate of a large bfloat16 matrix product here, in FLOP/s."""
    import torch

    a, b = (torch.randn(2048, 2048, device=device).bfloat16() for _ in range(2))
    seconds = []
    for _ in range(12):
        began = time.perf_counter()
        a @ b
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(seconds)


def step_flops(model: str, tokens: int, supervised: int) -> float:
    """Matrix-product FLOPs that a LoRA step cannot do without.

    Forward and backward through the frozen layers, 2 + 2 per parameter and token, and through the
    head at supervised positions only. It leaves out attention scores, the low-rank products, norms
    and the optimiser.
    """
    from lighten.models import describe

    parts = describe(model).parameters
    layers = parts["attention"] + parts["mlp"]
    head = parts["head"] or parts["embedding"]
    return 4.0 * layers * tokens + 4.0 * head * supervised


def work_lighten(job: dict[str, Any]) -> dict[str, Any]:
    """The job in this process, with the pieces that `lighten.train` is made of."""
    import torch
    from accelerate import Accelerator

    from lighten import adapters, models
    from lighten.adapters import AdapterSpec
    from lighten.data import Example, Row
    from lighten.data.batches import Item, collate
    from lighten.hardware import PeakMemory
    from lighten.train.loss import Objective
    from lighten.train.member import Member, MemberSettings
    from lighten.train.memory import checkpoint_layers
    from lighten.train.step import train_step

    memory = PeakMemory(job["device"])
    began = time.perf_counter()
    base = models.load(job["model"], device=job["device"])
    cohort = adapters.attach(base.model, [AdapterSpec("default", r=8, alpha=16.0)])
    adapters.files.restore_from(cohort, "default", job["adapter"])
    if job["checkpointing"]:
        checkpoint_layers(base.model)
    steps = len(job["steps"])
    settings = MemberSettings(
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", warmup=0, total_steps=steps,
        weight_decay=0.0, betas=(0.9, 0.999), epsilon=1e-8, max_grad_norm=1.0, seed=0,
    )  # fmt: skip
    member = Member("default", cohort.parameters("default"), settings)
    objective = Objective(base.model, cohort)
    accelerator = Accelerator(cpu=job["device"] == "cpu")
    scaler = torch.amp.GradScaler(job["device"], enabled=False)
    nowhere = Example("", 0)
    ends, losses = [time.perf_counter()], []
    for step in job["steps"]:
        rows = [Row(ids, mask, nowhere) for ids, mask in step]
        items = [Item("default", i, i) for i in range(len(rows))]
        batch = collate(items, rows, ["default"], device=job["device"])
        report = train_step([batch], [member], objective, accelerator, scaler)
        losses.append(report["default"].loss)
        ends.append(time.perf_counter())
    return {
        "losses": losses,
        "step_seconds": [b - a for a, b in itertools.pairwise(ends)],
        "first_step_s": ends[1] - began,
        "wall_s": ends[-1] - began,
        "peak_bytes": memory.read()["peak_bytes"],
    }


def run_once(name: str, job: dict[str, Any], peers: Path, scratch: Path) -> dict[str, Any]:
    """One contender in a process of its own."""
    own = CONTENDERS[name]
    path = scratch / "job.json"
    path.write_text(json.dumps({**job, **own, "scratch": str(scratch / "out")}))
    python = sys.executable if own["engine"] == "lighten" else str(peers / "bin" / "python")
    script = [__file__, "--worker"] if own["engine"] == "lighten" else [
        str(Path(__file__).with_name("peers_trl.py"))
    ]  # fmt: skip
    done = subprocess.run([python, *script, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def set_up(peers: Path) -> None:
    """Make the peers' environment."""
    subprocess.run([sys.executable, "-m", "venv", str(peers)], check=True)
    pip = [str(peers / "bin" / "pip"), "install", "--quiet"]
    subprocess.run([*pip, "torch==2.13.0", "trl==1.16.0", "peft", "psutil"], check=True)


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run every contender and form the ratios."""
    from lighten import adapters, models
    from lighten.adapters import AdapterSpec

    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        base = models.load(arguments.model)
        cohort = adapters.attach(base.model, [AdapterSpec("default", r=8, alpha=16.0, seed=0)])
        for file, content in adapters.files.contents(cohort, "default").items():
            (scratch / "adapter").mkdir(exist_ok=True)
            (scratch / "adapter" / file).write_bytes(content)
        steps = steps_of(arguments.model, max(arguments.steps, arguments.wall_steps))
        job = {
            "model": str(base.path), "adapter": str(scratch / "adapter"),
            "steps": steps[: arguments.steps], "learning_rate": LEARNING_RATE,
            "device": arguments.device,
        }  # fmt: skip
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
        for repeat in range(arguments.repeats):
            for name in CONTENDERS:
                runs[name].append(run_once(name, job, arguments.peers_venv, scratch))
                last = runs[name][-1]
                print(f"repeat {repeat + 1}, {name}: {sum(last['step_seconds']):.1f} s, "
                      f"{last['peak_bytes'] / 2**30:.2f} GiB", flush=True)  # fmt: skip
        wall = {}
        if arguments.wall_steps:
            job["steps"] = steps[: arguments.wall_steps]
            for name in ("lighten", "trl, best"):
                wall[name] = run_once(name, job, arguments.peers_venv, scratch)["wall_s"]
                print(f"{arguments.wall_steps} steps, {name}: {wall[name]:.1f} s", flush=True)
    return summary(arguments, steps[: arguments.steps], runs, wall)


def summary(
    arguments: argparse.Namespace,
    steps: list[list[tuple[list[int], list[bool]]]],
    runs: dict[str, list[dict[str, Any]]],
    wall: dict[str, float],
) -> dict[str, Any]:
    """Medians, ratios and whether the losses agree."""
    tokens = [sum(len(ids) for ids, _ in step) for step in steps]
    supervised = [sum(sum(mask[1:]) for _, mask in step) for step in steps]
    warm = arguments.warmup
    reference = runs["trl, defaults"][0]["losses"]
    table: dict[str, dict[str, Any]] = {}
    for name, own in runs.items():
        speeds = [
            statistics.median(t / s for t, s in zip(tokens[warm:], r["step_seconds"][warm:],
                                                    strict=True))
            for r in own
        ]  # fmt: skip
        apart = max(abs(a - b) / b for a, b in zip(own[0]["losses"], reference, strict=True))
        table[name] = {
            "tokens_per_s": statistics.median(speeds),
            "tokens_per_s_spread": [min(speeds), max(speeds)],
            "peak_bytes": statistics.median(r["peak_bytes"] for r in own),
            "first_step_s": statistics.median(r["first_step_s"] for r in own),
            "largest_loss_difference": apart,
            "valid": apart < AGREEMENT,
        }
    ours, best = table["lighten"], table["trl, best"]
    needed = step_flops(arguments.model, sum(tokens[warm:]), sum(supervised[warm:]))
    seconds = statistics.median(sum(r["step_seconds"][warm:]) for r in runs["lighten"])
    ratios = {
        "speed_vs_best": ours["tokens_per_s"] / best["tokens_per_s"],
        "speed_vs_defaults": ours["tokens_per_s"] / table["trl, defaults"]["tokens_per_s"],
        "memory_vs_best": ours["peak_bytes"] / best["peak_bytes"],
        "memory_vs_checkpointed": table["lighten, checkpointing"]["peak_bytes"]
        / table["trl, checkpointing"]["peak_bytes"],
        "limit_share": needed / seconds / matmul_rate(arguments.device),
        "wall_60_steps_vs_best": wall["lighten"] / wall["trl, best"]
        if arguments.wall_steps == 60 else None,
    }  # fmt: skip
    means = {"tokens_per_step": statistics.mean(tokens),
             "supervised_per_step": statistics.mean(supervised)}  # fmt: skip
    return {"table": table, "wall_s": wall, **means, **ratios}


def main() -> None:
    """Parse, measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--wall-steps", type=int, default=60)
    parser.add_argument("--peers-venv", type=Path, default=PEERS)
    parser.add_argument("--setup", action="store_true")
    parser.add_argument("--worker", type=Path)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work_lighten(json.loads(arguments.worker.read_text()))))
        return
    if arguments.setup:
        set_up(arguments.peers_venv)
        return
    from lighten import hardware, runs

    found = compare(arguments)
    commit, clean = hardware.commit()
    stored = {
        "benchmark": "train_vs_peers", "model": arguments.model, "repeats": arguments.repeats,
        "steps": arguments.steps, "commit": commit, "tree_clean": clean,
        "machine": asdict(hardware.machine()), "versions": hardware.versions(), **found,
    }  # fmt: skip
    runs.write_json(RESULTS / f"train_vs_peers-{arguments.device}.json", stored)
    for name, own in found["table"].items():
        print(f"{name:24} {own['tokens_per_s']:7.0f} tokens/s  {own['peak_bytes'] / 2**30:5.2f} GiB"
              f"  loss within {own['largest_loss_difference']:.1e}"
              f"{'' if own['valid'] else '  INVALID'}")  # fmt: skip
    keys = ("speed_vs_best", "speed_vs_defaults", "memory_vs_best", "memory_vs_checkpointed",
            "limit_share", "wall_60_steps_vs_best")  # fmt: skip
    print(json.dumps({key: found[key] for key in keys}))


if __name__ == "__main__":
    main()
