"""lighten's training engine against TRL + PEFT: same model, rows, order, start and losses.

    python benchmarks/train_vs_peers.py --setup        # once: TRL into an environment of its own
    python benchmarks/train_vs_peers.py                # the table; the last line is JSON

Every contender runs in its own process on the very same optimiser steps (token ids and masks are
written to a file first), from the same adapter, with the same optimiser at a constant rate. The
steps hold rows of like length for all of them, so TRL's rows too profit from length grouping. A row
counts only if its losses follow those of TRL in float32, step by step, within the rounding of its
format; a ratio with a row that does not count is null. Speed counts real tokens, not padding: the
median over the steps after warm-up, then over repeats. TRL's best settings are found by trying.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
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

import psutil

PEERS = Path.home() / ".cache" / "lighten" / "bench-trl"
RESULTS = Path(__file__).parent / "results"
TRL = "trl==1.16.0"
ROWS_PER_STEP, LONGEST_TOKENS, RANK = 8, 512, 8
# transformers' names; `MemberSettings` gets the same values.
OPTIMISER = {
    "learning_rate": 1e-4, "weight_decay": 0.0, "max_grad_norm": 1.0,
    "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8,
}  # fmt: skip
# Largest relative difference of a step's loss from TRL's in float32, by the format of the weights
# or, with autocast, of the products. A bfloat16 value is off by up to 2**-9, and so is the loss.
AGREEMENT = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 1e-2}
# A machine busier than this before the start gives no figures worth keeping.
BUSY_PERCENT = 10.0

Steps = list[list[tuple[list[int], list[bool]]]]

OURS, OURS_SAVING = "lighten", "lighten, checkpointing"
FLOAT32, DEFAULTS = "trl, float32", "trl, defaults"
BEST, BEST_SAVING = "trl, best", "trl, best, checkpointing"
CONTENDERS: dict[str, dict[str, Any]] = {
    OURS: {"engine": "lighten", "checkpointing": False},
    OURS_SAVING: {"engine": "lighten", "checkpointing": True},
    # TRL's own defaults: weights as stored, bfloat16 autocast, checkpointing, loss in chunks.
    DEFAULTS: {"engine": "trl", "dtype": "auto", "options": {}, "rounding": "bfloat16"},
    FLOAT32: {"engine": "trl", "dtype": "float32", "options": {"bf16": False}},
}  # fmt: skip
# It starts as the others and never moves: if its losses pass too, agreement of losses says nothing.
CONTROL = {
    "engine": "lighten",
    "checkpointing": False,
    "optimiser": {**OPTIMISER, "learning_rate": 0.0},
}
# What may be TRL's fastest way here. Packing and padding-free rows need FlashAttention 2 or 3.
CANDIDATES: dict[str, dict[str, Any]] = {
    f"{attention}, {'autocast' if autocast else 'no autocast'}": {
        "engine": "trl", "dtype": "bfloat16", "model_options": {"attn_implementation": attention},
        "options": {"gradient_checkpointing": False, "bf16": autocast},
    }
    for attention, autocast in itertools.product(("sdpa", "eager"), (True, False))
}  # fmt: skip


def documentation() -> list[dict[str, str]]:
    """Real text of real lengths: objects of the standard library and their whole docstrings."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if 400 < len(text) < 2400:
                    prompt = f"Document {node.name} of the Python module {path.stem}."
                    found.append({"prompt": prompt, "completion": text})
    return found


def steps_of(model: str, count: int) -> Steps:
    """Whole optimiser steps of encoded rows, of like length within each."""
    from lighten import data
    from lighten.data import Example, Message
    from lighten.data.batches import steps_of_epoch
    from lighten.models import load_tokenizer

    tokenizer = load_tokenizer(model)
    data.choose_template(tokenizer, None)
    examples = [
        Example(
            "stdlib", i, (Message("user", row["prompt"]), Message("assistant", row["completion"])),
            single_turn=True,
        )
        for i, row in enumerate(documentation())
    ]  # fmt: skip
    rows = data.encode(
        examples, tokenizer, max_length=LONGEST_TOKENS, truncation_strategy="drop"
    ).rows
    lengths = [len(row.input_ids) for row in rows]
    order: list[list[int]] = []
    for epoch in itertools.count():
        order += steps_of_epoch(lengths, ROWS_PER_STEP, seed=0, epoch=epoch)
        # A step with fewer rows would shift every later step of a trainer that counts rows.
        order = [step for step in order if len(step) == ROWS_PER_STEP]
        if len(order) >= count:
            break
    return [[(rows[i].input_ids, rows[i].supervised) for i in step] for step in order[:count]]


def matmul_rate(device: str) -> float:
    """Best rate of a large bfloat16 matrix product here, in FLOP/s."""
    import torch

    best = 0.0
    for rows, inner, columns in ((2048, 2048, 2048), (4096, 1024, 4096)):
        if device != "cpu":
            rows, inner, columns = 4 * rows, 4 * inner, 4 * columns
        a = torch.randn(rows, inner, device=device).bfloat16()
        weight = torch.randn(columns, inner, device=device).bfloat16()
        for _ in range(12):
            began = time.perf_counter()
            torch.nn.functional.linear(a, weight)
            if device != "cpu":
                torch.cuda.synchronize()
            best = max(best, 2.0 * rows * inner * columns / (time.perf_counter() - began))
    return best


def step_flops(description: Any, adapter_parameters: int, steps: Steps) -> float:
    """Matrix-product FLOPs that LoRA steps cannot do without.

    Per token 2 + 2 per frozen parameter (forward, and backward to the inputs) and 2 + 4 per adapter
    parameter; per supervised token 2 + 2 per parameter of the head; per row of L tokens and layer
    6 · L² · hidden size for causal attention (2 forward, 4 backward). It leaves out norms, softmax,
    activations and the optimiser, takes the heads together as wide as the hidden size, and counts
    the first layer's input gradient, which nobody needs.
    """
    parts = description.parameters
    frozen, head = parts["attention"] + parts["mlp"], parts["head"] or parts["embedding"]
    total = 0.0
    for row, mask in itertools.chain.from_iterable(steps):
        total += (4.0 * frozen + 6.0 * adapter_parameters) * len(row) + 4.0 * head * sum(mask[1:])
        total += 6.0 * len(row) ** 2 * description.hidden_size * description.layers
    return total


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
    from lighten.train.step import shares_of, train_step

    memory = PeakMemory(job["device"])
    base = models.load(job["model"], device=job["device"])
    cohort = adapters.attach(base.model, [AdapterSpec("default", r=RANK, alpha=2.0 * RANK)])
    cohort.restore("default", job["adapter"])
    if job["checkpointing"]:
        checkpoint_layers(base.model)
    own = job["optimiser"]
    settings = MemberSettings(
        learning_rate=own["learning_rate"], lr_scheduler_type="constant", warmup=0,
        total_steps=len(job["steps"]), weight_decay=own["weight_decay"],
        betas=(own["adam_beta1"], own["adam_beta2"]), epsilon=own["adam_epsilon"],
        max_grad_norm=own["max_grad_norm"], seed=0,
    )  # fmt: skip
    member = Member("default", cohort.parameters("default"), settings)
    objective = Objective(base.model, cohort)
    accelerator = Accelerator(cpu=job["device"] == "cpu")
    scaler = torch.amp.GradScaler(
        accelerator.device.type, enabled=base.model.dtype == torch.float16
    )
    nowhere = Example("", 0)
    ends = [time.time()]
    losses: list[float] = []
    for step in job["steps"]:
        rows = [Row(ids, mask, nowhere) for ids, mask in step]
        items = [Item("default", i, i) for i in range(len(rows))]
        batch = collate(items, rows, ["default"], device=job["device"])
        if not losses:
            objective.verify(batch, shares_of(batch))  # as the training loop does
        report = train_step([batch], [member], objective, accelerator, scaler)
        losses.append(report["default"].loss)
        if job["device"] != "cpu":
            torch.cuda.synchronize()
        ends.append(time.time())
    return {
        "losses": losses,
        "step_seconds": [b - a for a, b in itertools.pairwise(ends)],
        "first_step_s": ends[1] - job["began"],
        "peak_bytes": memory.read()["peak_bytes"],
        "dtype": base.dtype.value,
        "loss_path": objective.reason,
    }


def run_once(
    own: dict[str, Any], job: dict[str, Any], peers: Path, scratch: Path
) -> dict[str, Any]:
    """One contender in a process of its own; a run that fails gives its `error`."""
    path = scratch / "job.json"
    began = time.time()
    path.write_text(
        json.dumps({**job, **own, "scratch": str(scratch / "out"), "began": began}),
        encoding="utf-8",
    )
    if own["engine"] == "lighten":
        command = [sys.executable, __file__, "--worker", str(path)]
    else:
        script = Path(__file__).with_name("peers_trl.py")
        command = [str(peers / "bin" / "python"), str(script), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall_s = time.time() - began
    if done.returncode:
        return {"error": f"exit {done.returncode}: {done.stderr[-2000:]}"}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**found, "wall_s": wall_s}


def speed(run: dict[str, Any], steps: Steps, warmup: int) -> float:
    """Real tokens per second: the median over the steps after warm-up."""
    tokens = [sum(len(ids) for ids, _ in step) for step in steps]
    pairs = list(zip(tokens, run["step_seconds"], strict=True))[warmup:]
    return statistics.median(own / seconds for own, seconds in pairs)


def set_up(peers: Path) -> None:
    """Make the peers' environment, with this environment's versions of what both use."""
    from lighten import hardware

    own = hardware.versions()
    shared = [
        f"{name}=={own[name].partition('+')[0]}"
        for name in ("torch", "transformers", "peft", "accelerate", "numpy")
    ]
    subprocess.run([sys.executable, "-m", "venv", str(peers)], check=True)
    pip = [str(peers / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, TRL, "psutil", *shared], check=True)


def first_adapter(model: str, scratch: Path) -> tuple[str, int]:
    """Write the adapter that all start from; gives the model's folder and the adapter's size."""
    from lighten import adapters, models
    from lighten.adapters import AdapterSpec

    base = models.load(model)
    spec = AdapterSpec("default", r=RANK, alpha=2.0 * RANK, seed=0)
    cohort = adapters.attach(base.model, [spec])
    (scratch / "adapter").mkdir()
    for file, content in adapters.files.contents(cohort, "default").items():
        (scratch / "adapter" / file).write_bytes(content)
    return str(base.path), sum(p.numel() for p in cohort.parameters("default").values())


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run every contender and form the ratios."""
    from lighten.models import describe

    steps = steps_of(arguments.model, max(arguments.steps, arguments.wall_steps))
    short = steps[: arguments.steps]
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        folder, adapter_parameters = first_adapter(arguments.model, scratch)
        job = {
            "model": folder, "adapter": str(scratch / "adapter"), "steps": short,
            "optimiser": OPTIMISER, "device": arguments.device,
        }  # fmt: skip

        def run(label: str, own: dict[str, Any], steps: Steps = short) -> dict[str, Any]:
            found = run_once(own, {**job, "steps": steps}, arguments.peers_venv, scratch)
            if "error" in found:
                print(f"{label}: {found['error']}", flush=True)
            else:
                print(
                    f"{label}: {speed(found, steps, arguments.warmup):.0f} tokens/s, "
                    f"{found['peak_bytes'] / 2**30:.2f} GiB, {found['wall_s']:.0f} s", flush=True,
                )  # fmt: skip
            return found

        tried: dict[str, float | None] = {}
        for name, own in CANDIDATES.items():
            few = short[: arguments.warmup + 3]
            found = run(f"TRL's best? {name}", own, few)
            tried[name] = None if "error" in found else speed(found, few, arguments.warmup)
        fastest = max(CANDIDATES, key=lambda name: tried[name] or 0.0)
        best = CANDIDATES[fastest]
        saving = {**best, "options": {**best["options"], "gradient_checkpointing": True}}
        contenders = {**CONTENDERS, BEST: best, BEST_SAVING: saving}

        results: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
        walls: dict[str, list[dict[str, Any]]] = {OURS: [], BEST: []}
        for repeat in range(arguments.repeats):
            for name, own in contenders.items():
                results[name].append(run(f"repeat {repeat + 1}, {name}", own))
        for repeat in range(arguments.wall_repeats if arguments.wall_steps else 0):
            for name, own_walls in walls.items():
                label = f"{arguments.wall_steps} steps, repeat {repeat + 1}, {name}"
                own_walls.append(run(label, contenders[name], steps[: arguments.wall_steps]))
        control = run("control that does not learn", CONTROL)
    table = tabulate(results, contenders, short, arguments.warmup)
    reference = next((r for r in results[FLOAT32] if "error" not in r), None)
    unlearned = None
    if reference is not None and "error" not in control:
        unlearned = loss_difference(control["losses"], reference["losses"])
    rate = matmul_rate(arguments.device)
    warm = short[arguments.warmup :]
    flops = step_flops(describe(arguments.model), adapter_parameters, warm)
    share = None
    if table[OURS]["valid"]:
        seconds = [sum(run["step_seconds"][arguments.warmup :]) for run in results[OURS]]
        share = flops / statistics.median(seconds) / rate
    counts = [[len(ids) for ids, _ in step] for step in short]
    return {
        **ratios(table, walls, arguments.wall_steps), "limit_share": share, "table": table,
        "control_loss_difference": unlearned, "best_settings": fastest,
        "best_tried_tokens_per_s": tried,
        "matmul_flops_per_s": rate, "flops_after_warmup": flops,
        "wall_runs": walls, "runs": results,
        "data": {
            "sha256": hashlib.sha256(json.dumps(steps).encode()).hexdigest(),
            "tokens_per_row": statistics.mean(itertools.chain.from_iterable(counts)),
            "tokens_per_step": statistics.mean(map(sum, counts)),
            "padded_tokens_per_step": statistics.mean(len(row) * max(row) for row in counts),
            "supervised_tokens_per_step": statistics.mean(
                sum(sum(mask[1:]) for _, mask in step) for step in short
            ),
        },
    }  # fmt: skip


def loss_difference(losses: list[float], reference: list[float]) -> float:
    """Largest relative difference of a step's loss."""
    return max(abs(own - other) / other for own, other in zip(losses, reference, strict=True))


def tabulate(
    results: dict[str, list[dict[str, Any]]],
    contenders: dict[str, dict[str, Any]],
    steps: Steps,
    warmup: int,
) -> dict[str, dict[str, Any]]:
    """A row per contender: medians, spread, and whether all its losses follow the reference."""
    reference = next((r["losses"] for r in results[FLOAT32] if "error" not in r), None)
    table: dict[str, dict[str, Any]] = {}
    for name, runs in results.items():
        if any("error" in run for run in runs):
            table[name] = {"valid": False, "error": next(r["error"] for r in runs if "error" in r)}
            continue
        speeds = [speed(run, steps, warmup) for run in runs]
        apart = None
        if reference is not None:
            apart = max(loss_difference(run["losses"], reference) for run in runs)
        tolerance = AGREEMENT[contenders[name].get("rounding", runs[0]["dtype"])]
        table[name] = {
            "valid": apart is not None and apart <= tolerance,
            "largest_loss_difference": apart,
            "tolerance": tolerance,
            "tokens_per_s": statistics.median(speeds),
            "tokens_per_s_spread": [min(speeds), max(speeds)],
            "peak_bytes": statistics.median(run["peak_bytes"] for run in runs),
            "first_step_s": statistics.median(run["first_step_s"] for run in runs),
            "wall_s": statistics.median(run["wall_s"] for run in runs),
        }
    return table


def ratios(
    table: dict[str, dict[str, Any]], walls: dict[str, list[dict[str, Any]]], wall_steps: int
) -> dict[str, float | None]:
    """Ours over theirs; null where a row does not count or was not measured."""

    def over(figure: str, own: str, other: str) -> float | None:
        if not (table[own]["valid"] and table[other]["valid"]):
            return None
        return float(table[own][figure] / table[other][figure])

    wall = None
    measured = [run for runs in walls.values() for run in runs]
    if measured and all("error" not in run for run in measured):
        apart = max(
            loss_difference(ours["losses"], theirs["losses"])
            for ours, theirs in zip(walls[OURS], walls[BEST], strict=True)
        )
        print(f"{wall_steps} steps: losses of lighten and TRL's best within {apart:.1e}")
        if wall_steps == 60 and apart <= 2 * AGREEMENT["bfloat16"]:  # both are rounded
            ours, theirs = ([run["wall_s"] for run in walls[name]] for name in (OURS, BEST))
            wall = statistics.median(ours) / statistics.median(theirs)
    return {
        "speed_vs_best": over("tokens_per_s", OURS, BEST),
        "speed_vs_defaults": over("tokens_per_s", OURS, DEFAULTS),
        "speed_vs_float32": over("tokens_per_s", OURS, FLOAT32),
        "memory_vs_best": over("peak_bytes", OURS, BEST),
        "memory_vs_checkpointed": over("peak_bytes", OURS_SAVING, BEST_SAVING),
        "wall_60_steps_vs_best": wall,
    }


def store(arguments: argparse.Namespace, found: dict[str, Any], before: dict[str, Any]) -> Path:
    """Write the result; one that should not be quoted goes to a folder that git ignores."""
    from lighten import hardware, runs

    commit, clean = hardware.commit()
    why = {
        "the tree was not clean": not (clean and before["tree_clean"]),
        "the commit changed meanwhile": commit != before["commit"],
        "the machine was busy": before["busy_percent"] > BUSY_PERCENT,
        "fewer than 3 repeats": arguments.repeats < 3,
        "a row does not count": not all(row["valid"] for row in found["table"].values()),
    }
    unlearned = found["control_loss_difference"]
    why["the losses would not tell an adapter that never learns"] = (
        unlearned is None or unlearned <= max(AGREEMENT.values())
    )
    trial = [reason for reason, holds in why.items() if holds]
    folder = RESULTS / "trial" if trial else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    if trial:
        (folder / ".gitignore").write_text("*\n", encoding="ascii")
    stored = {
        "benchmark": "train_vs_peers", "model": arguments.model, "device": arguments.device,
        "steps": arguments.steps, "warmup": arguments.warmup, "repeats": arguments.repeats,
        "wall_steps": arguments.wall_steps, "wall_repeats": arguments.wall_repeats,
        "optimiser": OPTIMISER, "lora_r": RANK, "rows_per_step": ROWS_PER_STEP,
        "started": before, "trial": trial, "machine": asdict(hardware.machine()),
        "versions": hardware.versions(), **found,
    }  # fmt: skip
    path = folder / f"train_vs_peers-{Path(arguments.model).name}-{arguments.device}.json"
    runs.write_json(path, stored)
    return path


def show(found: dict[str, Any]) -> None:
    """Print the table."""
    print(f"TRL's best settings here: {found['best_settings']}")
    print(f"largest loss difference of a control that never learns: "
          f"{found['control_loss_difference']}")  # fmt: skip
    for name, row in found["table"].items():
        if "error" in row:
            print(f"{name:26} failed: {row['error'].strip().splitlines()[-1]}")
            continue
        low, high = row["tokens_per_s_spread"]
        apart = row["largest_loss_difference"]
        print(
            f"{name:26} {row['tokens_per_s']:6.0f} ({low:.0f} to {high:.0f}) tokens/s  "
            f"{row['peak_bytes'] / 2**30:5.2f} GiB  first step after {row['first_step_s']:4.0f} s  "
            + ("no reference" if apart is None else f"loss within {apart:.1e}")
            + ("" if row["valid"] else "  INVALID")
        )


def main() -> None:
    """Parse, measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2, help="first steps that do not count")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--wall-steps", type=int, default=60, help="0: leave the long runs out")
    parser.add_argument("--wall-repeats", type=int, default=3)
    parser.add_argument("--peers-venv", type=Path, default=PEERS)
    parser.add_argument("--setup", action="store_true", help="make the peers' environment")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        job = json.loads(arguments.worker.read_text(encoding="utf-8"))
        print(json.dumps(work_lighten(job)))
        return
    if arguments.setup:
        set_up(arguments.peers_venv)
        return
    if arguments.steps <= arguments.warmup:
        parser.error("--steps has to be more than --warmup")
    if not (arguments.peers_venv / "bin" / "python").exists():
        parser.error(f"no environment at {arguments.peers_venv}: run with --setup first")
    from lighten import hardware

    commit, clean = hardware.commit()
    busy = psutil.cpu_percent(3.0)
    before = {"commit": commit, "tree_clean": clean, "busy_percent": busy}
    if busy > BUSY_PERCENT:
        print(f"the processor is {busy:.0f} % busy: the figures will not hold", flush=True)
    found = compare(arguments)
    show(found)
    print(f"written to {store(arguments, found, before)}")
    keys = ("speed_vs_best", "speed_vs_defaults", "speed_vs_float32", "memory_vs_best",
            "memory_vs_checkpointed", "limit_share", "wall_60_steps_vs_best")  # fmt: skip
    print(json.dumps({key: found[key] for key in keys}))


if __name__ == "__main__":
    main()
