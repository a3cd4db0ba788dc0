"""LoRA in float32 against TRL + PEFT at its best settings, as a processor with AVX2 alone trains.

    python benchmarks/train_vs_peers.py --setup   # once: TRL into an environment of its own
    python benchmarks/float32.py                  # the last line is JSON

Where the processor has more than AVX2, libraries are told not to use it (`ONEDNN_MAX_CPU_ISA`,
`ATEN_CPU_CAPABILITY`). TRL's best settings are found by trying: its attentions, the step whole or
in parts. Both then make the same steps from the same adapter, by turns, each in a process of its
own; `lighten` decides everything itself, its format too, and counts only if that is float32 and its
losses are TRL's within 1e-4. `speed_vs_trl` is of the steps after warm-up, `speed_with_first_step`
of all of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import machine
from benchmarks.comparison import AGREEMENT, Run, loss_difference, speed, why_not
from benchmarks.contenders import GROUPED, SPLIT, Contender
from benchmarks.steps import ROWS_PER_STEP, Steps, facts, tokens_of
from benchmarks.train_vs_peers import FEW, PEERS, Bench

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
OURS, TRL = "lighten", "trl"
KEYS = ("speed_vs_trl", "speed_with_first_step", "memory_vs_trl", "largest_loss_difference")
SETTINGS = {"gradient_checkpointing": False, "bf16": False}
CANDIDATES = {
    f"{attention}, {ROWS_PER_STEP // parts} rows x {parts}": Contender(
        "trl", SETTINGS, dtype="float32", attention=attention, accumulate=parts
    )
    for attention, parts in itertools.product(("sdpa", "eager"), (1, SPLIT))
}


def fastest(bench: Bench) -> str:
    """The quickest of TRL's settings, by a few steps of each.

    Raises:
        SystemExit: None of them trains.
    """
    speeds = {}
    for name, contender in CANDIDATES.items():
        steps = bench.steps[GROUPED][:FEW]
        run = bench.run(f"TRL's best? {name}", contender, steps)
        if "error" not in run:
            speeds[name] = speed(run, steps, 1)
    if not speeds:
        raise SystemExit("TRL trained with none of its settings")
    return max(speeds, key=lambda name: speeds[name])


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run both by turns and form the ratios."""
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(arguments, Path(temporary))
        best = arguments.best or fastest(bench)
        contenders = {OURS: Contender("lighten"), TRL: CANDIDATES[best]}
        runs: dict[str, list[Run]] = {name: [] for name in contenders}
        for repeat in range(arguments.repeats):
            for name, contender in contenders.items():
                runs[name].append(bench.run(f"repeat {repeat + 1}, {name}", contender))
    steps = bench.steps[GROUPED]
    return {
        **ratios(runs, steps, arguments.warmup), "best_settings": best, "runs": runs,
        "data": facts(steps),
    }  # fmt: skip


def ratios(runs: Mapping[str, Sequence[Run]], steps: Steps, warmup: int) -> dict[str, Any]:
    """Ours over theirs, by medians over the repeats; null, and why, where a run does not count.

    Args:
        runs: Repeats by contender.
        steps: That they made.
        warmup: First steps that do not count.
    """
    pairs = list(zip(runs[OURS], runs[TRL], strict=True))
    reasons = [reason for pair in pairs if (reason := _why_not(*pair)) is not None]
    if reasons:
        return {**dict.fromkeys(KEYS), "why_not": reasons[0]}
    tokens = sum(tokens_of(steps))

    def ratio(figure: Callable[[Run], float]) -> float:
        ours, theirs = (statistics.median(map(figure, runs[name])) for name in (OURS, TRL))
        return ours / theirs

    return {
        "speed_vs_trl": ratio(lambda run: speed(run, steps, warmup)),
        "speed_with_first_step": ratio(lambda run: tokens / sum(run["step_seconds"])),
        "memory_vs_trl": ratio(lambda run: float(run["peak_bytes"])),
        "largest_loss_difference": max(
            loss_difference(ours["losses"], theirs["losses"]) for ours, theirs in pairs
        ),
        "why_not": None,
    }


def _why_not(ours: Run, theirs: Run) -> str | None:
    """Why two runs are not compared, or None."""
    if reason := why_not(theirs, theirs, 0.0) or why_not(ours, theirs, AGREEMENT["float32"]):
        return reason
    formats = sorted({run["dtype"] for run in (ours, theirs)})
    return None if formats == ["float32"] else f"not both are in float32: {', '.join(formats)}"


def main() -> None:
    """Parse, measure, print, store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2, help="first steps that do not count")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--best", choices=CANDIDATES, help="TRL's, instead of looking for them")
    parser.add_argument("--peers-venv", type=Path, default=PEERS)
    parser.set_defaults(device="cpu", wall_steps=0)
    arguments = parser.parse_args()
    os.environ.update(AVX2)
    before = machine.before_start()
    result = compare(arguments)
    machine.store(
        f"float32-{Path(arguments.model).name}", result, before,
        {
            "fewer than 3 repeats": arguments.repeats < 3,
            "a run does not count": result["why_not"] is not None,
        },
    )  # fmt: skip
    print(json.dumps({key: result[key] for key in KEYS}))


if __name__ == "__main__":
    main()
