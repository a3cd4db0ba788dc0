"""N adapters in one pass against N runs one after another, lighten's and PEFT's.

    python benchmarks/cohort.py        # the table; the last line is JSON

Each adapter has rows of its own; all have as many tokens per step. Runs one after another and
cohorts follow each other in one fresh process per base, tokens and repeat, so that a machine that
changes its speed changes both. PEFT trains one adapter after another in a plain loop, from the same
start.

A cohort counts only if each of its adapters has the losses that it has alone: with float32 products
within 1e-4 (measured once, on the largest cohort), and with rounded ones within twice what rounding
does to an adapter alone. Each may be that far from float32, and so twice as far from the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from benchmarks import machine
from benchmarks.comparison import AGREEMENT, loss_difference
from benchmarks.steps import Row, Steps, encoded, slices

SIZES = (1, 2, 4, 8)
TOKENS = (64, 512)
# Steps per run, the first not counted: many where they are short.
STEPS = {64: 5, 512: 2}
LONGEST_ROW = 128
BASES: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "nf4": {"dtype": "bfloat16", "load_in_4bit": True},
}
# Tokens of a micro-batch where memory is compared, whatever the device would choose.
MEMORY_TOKENS = 1024

Result = dict[str, Any]


def lessons(rows: list[Row], names: Sequence[str], tokens: int, steps: int) -> dict[str, Steps]:
    """Rows of its own for each adapter, `tokens` of them in every step."""
    length = min(tokens, LONGEST_ROW)
    rows_per_step = tokens // length
    cut = iter(slices(rows, length, rows_per_step * steps * len(names)))
    return {
        name: [[next(cut) for _ in range(rows_per_step)] for _ in range(steps)] for name in names
    }


def starts(model: str, names: Sequence[str], scratch: Path) -> tuple[str, dict[str, str]]:
    """The model's folder, and a first adapter for each name as a folder: PEFT reads both too."""
    from benchmarks.engine import RANK
    from lighten import adapters, models
    from lighten.adapters import AdapterSpec

    base = models.load(model)
    specs = [AdapterSpec(n, r=RANK, alpha=2.0 * RANK, seed=i) for i, n in enumerate(names)]
    cohort = adapters.attach(base.model, specs)
    folders = {}
    for name in names:
        folder = scratch / "start" / name
        folder.mkdir(parents=True)
        for file, content in adapters.files.contents(cohort, name).items():
            (folder / file).write_bytes(content)
        folders[name] = str(folder)
    return str(base.path), folders


def measure(arguments: argparse.Namespace) -> Result:
    """Run everything, each in a process of its own."""
    rows = encoded(arguments.model)
    sizes = [size for size in SIZES if size <= arguments.largest]
    names = [f"a{i}" for i in range(sizes[-1])]
    taught = {
        tokens: lessons(rows, names, tokens, STEPS.get(tokens, 2)) for tokens in arguments.tokens
    }
    results: dict[str, dict[int, dict[str, list[Result]]]] = {}
    exact: dict[str, dict[int, Result]] = {}
    memory: dict[int, list[Result]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        folder, start = starts(arguments.model, names, scratch)
        shared = {
            "model": folder, "device": arguments.device, "sizes": sizes, "start": start,
        }  # fmt: skip

        def run(label: str, job: Mapping[str, Any]) -> Result:
            result = machine.in_fresh_process("cohort_worker.py", {**shared, **job}, scratch)
            status = result["error"].strip().splitlines()[-1] if "error" in result else "done"
            print(f"{label}: {status}, {result.get('wall_s', 0.0):.0f} s", flush=True)
            return result

        for base in arguments.bases:
            for tokens in arguments.tokens:
                settings = {**BASES[base], "dtype": "float32"}
                job = {"engine": "lighten", "settings": settings, "lessons": taught[tokens],
                       "sizes": sizes[-1:]}  # fmt: skip
                exact.setdefault(base, {})[tokens] = run(f"{base}, {tokens} tokens, float32", job)
        for repeat in range(arguments.repeats):
            for base in arguments.bases:
                for tokens in arguments.tokens:
                    by_engine = results.setdefault(base, {}).setdefault(tokens, {})
                    for engine in ("lighten", "peft"):
                        job = {"engine": engine, "settings": BASES[base],
                               "lessons": taught[tokens]}  # fmt: skip
                        label = f"repeat {repeat + 1}, {base}, {tokens} tokens, {engine}"
                        by_engine.setdefault(engine, []).append(run(label, job))
            for size in (1, 4):
                # Each adapter has a full micro-batch for each of two workers.
                memory_lessons = lessons(rows, names[:size], 2 * MEMORY_TOKENS, 2)
                settings = {**BASES["bfloat16"], "tokens_per_microbatch": MEMORY_TOKENS}
                job = {"engine": "memory", "settings": settings, "lessons": memory_lessons}
                label = f"repeat {repeat + 1}, memory of {size}"
                memory.setdefault(size, []).append(run(label, job))
    table = [
        row
        for base, by_tokens in results.items()
        for tokens, engines in by_tokens.items()
        for row in tabulate(
            base, tokens, sizes, engines["lighten"], engines["peft"], exact[base][tokens]
        )
    ]
    return {
        **ratios(table, memory), "table": table, "memory": memory, "runs": results, "exact": exact,
    }  # fmt: skip


def tabulate(
    base: str,
    tokens: int,
    sizes: Sequence[int],
    ours: Sequence[Result],
    peft: Sequence[Result],
    exact: Result,
) -> list[Result]:
    """A row per size of cohort: seconds per step and ratios, medians over the repeats.

    Args:
        base: Of the rows.
        tokens: Of each adapter in a step.
        sizes: Of the cohorts.
        ours: The repeats.
        peft: The same of PEFT.
        exact: With float32 products.
    """
    rows: list[Result] = []
    for size in sizes:
        row: Result = {"base": base, "tokens": tokens, "adapters": size,
                       "why_not": why_not(ours, size, exact), "why_not_peft": _trained(peft),
                       "time": None, "time_vs_peft": None}  # fmt: skip
        rows.append(row)
        if any("error" in run for run in ours):
            continue
        timed = max(1, STEPS.get(tokens, 2) - 1)
        alone = [sum(run["alone_s"][:size]) for run in ours]
        # JSON has made the sizes text; an adapter by itself is its own cohort.
        together = [run["cohort_s"].get(str(size), run["alone_s"][0]) for run in ours]
        row["alone_s_per_step"] = statistics.median(alone) / timed
        row["cohort_s_per_step"] = statistics.median(together) / timed
        if row["why_not"]:
            continue
        shares = [a / b for a, b in zip(together, alone, strict=True)]
        row["time"], row["time_spread"] = statistics.median(shares), [min(shares), max(shares)]
        if row["why_not_peft"] is None:
            theirs = size * statistics.median(statistics.mean(run["alone_s"]) for run in peft)
            row["peft_s_per_step"] = theirs / timed
            row["time_vs_peft"] = statistics.median(together) / theirs
    return rows


def why_not(ours: Sequence[Result], size: int, exact: Result) -> str | None:
    """Why a cohort does not count, or None if it does."""
    if reason := _trained([*ours, exact]):
        return reason
    unrounded = np.max(list(exact["largest_loss_difference"].values()) or [0.0])
    if not unrounded <= AGREEMENT["float32"]:
        return f"in float32 an adapter's losses are up to {unrounded:.1e} from those of it alone"
    difference = np.max([run["largest_loss_difference"].get(str(size), 0.0) for run in ours])
    allowed = 2 * rounding(ours, exact)
    if not difference <= allowed:
        return (
            f"an adapter's losses are up to {difference:.1e} from those that it has alone, "
            f"over {allowed:.1e}"
        )
    return None


def rounding(ours: Sequence[Result], exact: Result) -> float:
    """How far rounded products take any adapter alone from its losses in float32, relatively."""
    return float(
        np.max([
            loss_difference(losses, exact["losses"][name])
            for run in ours
            for name, losses in run["losses"].items()
        ])
    )  # fmt: skip


def _trained(runs: Sequence[Result]) -> str | None:
    for run in runs:
        if "error" in run:
            return str(run["error"]).strip().splitlines()[-1]
        if run["idle"]:
            return "an adapter has not trained at all"
    return None


def ratios(table: Sequence[Result], memory: Mapping[int, Sequence[Result]]) -> Result:
    """What the issue's table asks for; null where a row does not count or was not measured."""
    figures: Result = {"memory_4": None}
    if all(memory.get(size) and _trained(memory[size]) is None for size in (1, 4)):
        one, four = (
            statistics.median(run["peak_bytes"] for run in memory[size]) for size in (1, 4)
        )
        figures["memory_4"] = four / one
    for base, prefix in (("bfloat16", ""), ("nf4", "nf4_")):
        for tokens in TOKENS:
            key = f"{prefix}time_8_at_{tokens}"
            row = next(
                (r for r in table
                 if (r["base"], r["tokens"], r["adapters"]) == (base, tokens, 8)), None
            )  # fmt: skip
            figures[key] = row and row["time"]
            figures[f"{key}_vs_peft"] = row and row["time_vs_peft"]
    return figures


def show(result: Mapping[str, Any]) -> None:
    """Print the table."""
    print("seconds per step: N runs one after another, one cohort of N, PEFT one after another")
    for row in result["table"]:
        line = f"{row['base']:9} {row['tokens']:4} tokens per adapter, N = {row['adapters']}: "
        if row["time"] is None:
            print(line + f"DOES NOT COUNT: {row['why_not']}")
            continue
        line += f"{row['alone_s_per_step']:7.3f} {row['cohort_s_per_step']:7.3f} "
        if row["time_vs_peft"] is None:
            print(f"{line} ratio {row['time']:.2f}, PEFT failed: {row['why_not_peft']}")
        else:
            print(f"{line}{row['peft_s_per_step']:7.3f}  ratio {row['time']:.2f}, "
                  f"against PEFT {row['time_vs_peft']:.2f}")  # fmt: skip


def main() -> None:
    """Parse, measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bases", nargs="+", choices=list(BASES), default=list(BASES))
    parser.add_argument("--tokens", nargs="+", type=int, choices=TOKENS, default=list(TOKENS))
    parser.add_argument("--largest", type=int, choices=SIZES, default=SIZES[-1])
    arguments = parser.parse_args()
    before = machine.before_start()
    result = measure(arguments)
    show(result)
    why = {
        "fewer than 3 repeats": arguments.repeats < 3,
        "parts were left out": len(result["table"]) < len(BASES) * len(TOKENS) * len(SIZES),
        "a row does not count": any(row["why_not"] for row in result["table"]),
    }
    name = f"cohort-{Path(arguments.model).name}-{arguments.device}"
    machine.store(name, {**vars(arguments), **result}, before, why)
    skip = ("table", "memory", "runs", "exact")
    print(json.dumps({key: value for key, value in result.items() if key not in skip}))


if __name__ == "__main__":
    main()
