"""lighten's training engine against TRL + PEFT: same model, rows, order, start and losses.

    python benchmarks/train_vs_peers.py --setup        # once: TRL into an environment of its own
    python benchmarks/train_vs_peers.py                # the table; the last line is JSON

Every contender runs in its own process on the very same optimiser steps (token ids and masks are
written to a file first), from the same adapter, with the same optimiser at a constant rate. There
are two sets of steps from the same text: rows of like length together, for all that are at their
best, and rows at random, as TRL's defaults take them. A row counts only if it has learnt at all and
its losses follow, step by step, those of TRL with products in the same format; TRL's own follow
float32. A ratio with a row that does not count is null. Speed counts real tokens, not padding: the
median over the steps after warm-up, then over repeats. A dozen of them count, since how fast a step
is depends on how long its rows are. TRL's best settings are found by trying.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import contenders as who
from benchmarks import machine
from benchmarks.arithmetic import step_flops
from benchmarks.comparison import (
    AGREEMENT,
    SAME_FORMAT,
    Run,
    ratios,
    show,
    speed,
    tabulate,
    unlearned,
    why_not,
)
from benchmarks.contenders import GROUPED, SHUFFLED, Contender
from benchmarks.engine import OPTIMISER, RANK
from benchmarks.steps import ROWS_PER_STEP, Steps, encoded, facts, largest_first, steps_of

PEERS = Path.home() / ".cache" / "lighten" / "bench-trl"
PARTS = ("best", "checkpointed", "defaults", "wall", "control")
# Steps of a run that is made for its memory, or to find TRL's best settings.
FEW = 4
KEYS = ("speed_vs_best", "speed_vs_defaults", "speed_vs_float32_defaults", "memory_vs_best",
        "memory_vs_checkpointed", "memory_vs_defaults", "memory_vs_fastest_of_whole_steps",
        "memory_vs_fastest_of_small_microbatches", "limit_share",
        "wall_60_steps_vs_best")  # fmt: skip


class Bench:
    """The runs of one benchmark, each in a process of its own.

    Args:
        arguments: Of the command line.
        scratch: A folder that is thrown away.
    """

    def __init__(self, arguments: argparse.Namespace, scratch: Path) -> None:
        self.arguments, self.scratch = arguments, scratch
        rows = encoded(arguments.model)
        self.long = largest_first(
            steps_of(rows, max(arguments.steps, arguments.wall_steps), grouped=True)
        )
        self.steps = {
            GROUPED: self.long[: arguments.steps],
            SHUFFLED: largest_first(steps_of(rows, arguments.steps, grouped=False)),
        }
        self.model, self.adapter_parameters = first_adapter(arguments.model, scratch)

    def run(self, label: str, contender: Contender, steps: Steps | None = None) -> Run:
        """One contender on a set's steps, or on those given."""
        steps = self.steps[contender.data] if steps is None else steps
        python = sys.executable
        if contender.engine != "lighten":
            python = str(self.arguments.peers_venv / "bin" / "python")
        job = contender.job(steps, self.model, str(self.scratch / "adapter"), self.arguments.device)
        result = machine.in_fresh_process(contender.script, job, self.scratch, python=python)
        if "error" in result:
            print(f"{label}: {result['error']}", flush=True)
            return result
        if contender.engine == "lighten":  # one adapter among several that there could be
            alone = ("losses", "grad_norms", "moved")
            result |= {key: result[key]["default"] for key in alone}
        warmup = min(self.arguments.warmup, len(steps) - 1)
        print(
            f"{label}: {speed(result, steps, warmup):.0f} tokens/s, "
            f"{result['peak_bytes'] / 2**30:.2f} GiB, {result['wall_s']:.0f} s", flush=True,
        )  # fmt: skip
        return result

    def search(self, reference: Run) -> dict[str, dict[str, Any]]:
        """Try TRL's settings for a few steps each: whole steps, then the two fastest in parts."""
        trials: dict[str, dict[str, Any]] = {}

        def attempt(name: str, contender: Contender) -> None:
            few = self.steps[GROUPED][:FEW]
            result = self.run(f"TRL's best? {name}", contender, few)
            trials[name] = {
                "accumulate": contender.accumulate,
                "why_not": why_not(result, reference, AGREEMENT["bfloat16"]),
                "tokens_per_s": None if "error" in result else speed(result, few, 1),
                "peak_bytes": result.get("peak_bytes"),
            }  # fmt: skip

        for name, contender in who.CANDIDATES.items():
            attempt(name, contender)
        for name in ranked(trials)[:2]:
            attempt(*who.split(name))
        return trials


def ranked(trials: dict[str, dict[str, Any]]) -> list[str]:
    """The candidates that count, fastest first."""
    valid = [name for name, outcome in trials.items() if outcome["why_not"] is None]
    return sorted(valid, key=lambda name: -float(trials[name]["tokens_per_s"]))


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
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(arguments, Path(temporary))
        parts: set[str] = arguments.only
        reference = bench.run(who.REFERENCE, who.CONTENDERS[who.REFERENCE])
        results: dict[str, list[Run]] = {who.REFERENCE: [reference]}
        trials: dict[str, dict[str, Any]] = {}
        best = arguments.best
        if best is None and parts & {"best", "checkpointed", "wall"}:
            trials = bench.search(reference)
            best = next(iter(ranked(trials)), None)
        contenders = dict(who.CONTENDERS)
        if best is not None:
            candidates = who.CANDIDATES | dict(map(who.split, who.CANDIDATES))
            contenders[who.BEST] = candidates[best]
            contenders[who.BEST_SAVING] = candidates[best].checkpointed()
        absent = {}
        for name, version in who.installed(arguments.peers_venv).items():
            if version is None:
                absent[name] = "not installed in the peers' environment"
            else:
                contenders[name] = who.OPTIONAL[name]
        for repeat in range(arguments.repeats):
            for name, contender in contenders.items():
                if (
                    contender.part not in parts
                    or name == who.REFERENCE
                    or (contender.once and repeat)
                ):
                    continue
                steps = bench.steps[contender.data][
                    : FEW if contender.part == "checkpointed" else None
                ]
                result = bench.run(f"repeat {repeat + 1}, {name}", contender, steps)
                results.setdefault(name, []).append(result)
        walls: dict[str, list[Run]] = {}
        if "wall" in parts and arguments.wall_steps and best is not None:
            long = bench.long[: arguments.wall_steps]
            # Ours decides here itself what pays in so short a run.
            by_itself = {who.OURS: Contender("lighten"), who.BEST: contenders[who.BEST]}
            for repeat in range(arguments.wall_repeats):
                for name, contender in by_itself.items():
                    label = f"{arguments.wall_steps} steps, repeat {repeat + 1}, {name}"
                    walls.setdefault(name, []).append(bench.run(label, contender, long))
        controls = {
            data: bench.run(f"control that does not learn, {data}", contender)
            for data, contender in who.CONTROLS.items() if "control" in parts
        }  # fmt: skip
    table = tabulate(results, contenders, bench.steps, arguments.warmup, controls)
    return {
        **ratios(table, walls, arguments.wall_steps, trials),
        **limit(bench, table, results),
        "table": table, "absent": absent,
        "control_loss_difference": unlearned(controls, results), "controls": controls,
        "best_settings": best, "best_tried": trials,
        "wall_runs": walls, "runs": results,
        "data": {name: facts(steps) for name, steps in bench.steps.items()},
    }  # fmt: skip


def limit(bench: Bench, table: dict[str, Any], results: dict[str, list[Run]]) -> dict[str, Any]:
    """Share of the machine's matrix-product rate that our steps after warm-up reach."""
    from lighten.models import describe

    rate = machine.matmul_rate(bench.arguments.device)
    warm = bench.arguments.warmup
    flops = step_flops(
        describe(bench.arguments.model), bench.adapter_parameters, bench.steps[GROUPED][warm:]
    )
    share = None
    if who.OURS in table and table[who.OURS]["valid"]:
        seconds = [sum(run["step_seconds"][warm:]) for run in results[who.OURS]]
        share = flops / statistics.median(seconds) / rate
    return {"limit_share": share, "matmul_flops_per_s": rate, "flops_after_warmup": flops}


def parse() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--warmup", type=int, default=2, help="first steps that do not count")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--wall-steps", type=int, default=60)
    parser.add_argument("--wall-repeats", type=int, default=1)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--best", help="TRL's best settings, instead of looking for them")
    parser.add_argument("--peers-venv", type=Path, default=PEERS)
    parser.add_argument("--setup", action="store_true", help="make the peers' environment")
    arguments = parser.parse_args()
    arguments.only = set(arguments.only.split(","))
    if unknown := arguments.only - set(PARTS):
        parser.error(f"--only: {sorted(unknown)[0]!r} is none of {', '.join(PARTS)}")
    valid_settings = [*who.CANDIDATES, *(who.split(name)[0] for name in who.CANDIDATES)]
    if arguments.best is not None and arguments.best not in valid_settings:
        parser.error(f"--best: {arguments.best!r} is none of {'; '.join(valid_settings)}")
    if arguments.setup:
        return arguments
    if min(arguments.steps, FEW) <= arguments.warmup:
        parser.error(f"--warmup has to be less than --steps, and than {FEW}")
    if not (arguments.peers_venv / "bin" / "python").exists():
        parser.error(f"no environment at {arguments.peers_venv}: run with --setup first")
    return arguments


def main() -> None:
    """Parse, measure, print, store."""
    arguments = parse()
    if arguments.setup:
        who.set_up(arguments.peers_venv)
        return
    before = machine.before_start()
    result = compare(arguments)
    show(result)
    unmoved = result["control_loss_difference"]
    why = {
        "parts were left out": arguments.only != set(PARTS) or not arguments.wall_steps,
        "fewer than 3 repeats": arguments.repeats < 3,
        "a row does not count": not all(row["valid"] for row in result["table"].values()),
        "the losses would not tell an adapter that never learns": unmoved is None
        or unmoved <= SAME_FORMAT,
    }
    settings = {key: value for key, value in vars(arguments).items()
             if key not in ("peers_venv", "setup", "only")}  # fmt: skip
    machine.store(
        f"train_vs_peers-{Path(arguments.model).name}-{arguments.device}",
        {
            **settings, "only": sorted(arguments.only), "optimiser": OPTIMISER, "lora_r": RANK,
            "rows_per_step": ROWS_PER_STEP, **result,
        },
        before,
        why,
    )  # fmt: skip
    print(json.dumps({key: result[key] for key in KEYS}))


if __name__ == "__main__":
    main()
