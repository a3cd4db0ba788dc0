"""A rank sweep as one cohort against its runs one after another: lighten's own, and TRL + PEFT's.

    python benchmarks/train_vs_peers.py --setup   # once: TRL into an environment of its own
    python benchmarks/sweep_vs_peers.py           # the table; the last line is JSON

Ranks 8, 128 and 256 at one scale, every arm on the very same optimiser steps (token ids and masks
from a file), from the same first adapter, AdamW at a constant rate. Each run has a process of its
own, and its time is the whole process: imports, loading, training. Memory is compared at the same
tokens per micro-batch. An arm counts only if it has learnt, and if its losses in the cohort are
those that it has alone, and TRL's, within the rounding of bfloat16; a ratio with an arm that does
not count is null.
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

from benchmarks import contenders as who
from benchmarks import machine
from benchmarks.comparison import AGREEMENT, Run, idle, loss_difference, show_settings
from benchmarks.contenders import Contender
from benchmarks.engine import OPTIMISER
from benchmarks.steps import ROWS_PER_STEP, Steps, encoded, facts, largest_first, steps_of
from benchmarks.train_vs_peers import PEERS

RANKS = (8, 128, 256)
# alpha / r, the same for all: rank is not confounded with step size.
SCALE = 2.0
TOKENS_PER_MICROBATCH = 1024
# Steps of a run that looks for TRL's best settings: the first meets new shapes, the second counts.
FEW = 2
# Fewer say little: loading would be most of the time.
ENOUGH_STEPS = 6
# Two roundings apart where both sides are rounded on their own way.
APART = {"alone": AGREEMENT["bfloat16"], "trl": 2 * AGREEMENT["bfloat16"]}
KEYS = ("peak_vs_largest_single", "wall_vs_three_trl_runs", "wall_vs_three_own_runs",
        "steps_vs_three_trl_runs", "largest_loss_difference_alone",
        "largest_loss_difference_trl")  # fmt: skip

Rows = dict[str, list[Run]]


def name_of(rank: int) -> str:
    """What an arm is called."""
    return f"r{rank}"


class Bench:
    """The runs of one benchmark.

    Args:
        arguments: Of the command line.
        steps: What every arm trains on.
        scratch: A folder that is thrown away.
    """

    def __init__(self, arguments: argparse.Namespace, steps: Steps, scratch: Path) -> None:
        self.arguments, self.steps, self.scratch = arguments, steps, scratch
        self.model, self.starts = starts(arguments.model, arguments.ranks, scratch)

    def ours(self, label: str, ranks: Sequence[int], *, learns: bool = True) -> Run:
        """Arms of these ranks in one pass of lighten's."""
        adapters = [
            {"name": name_of(rank), "lora_r": rank, "lora_alpha": SCALE * rank, "seed": place}
            for place, rank in enumerate(ranks)
        ]
        job = {
            "model": self.model, "device": self.arguments.device, "optimiser": OPTIMISER,
            "lessons": {name_of(rank): self.steps for rank in ranks},
            "start": {name_of(rank): self.starts[rank] for rank in ranks}, "learns": learns,
            "settings": {
                "adapters": adapters, "per_device_train_batch_size": ROWS_PER_STEP,
                "tokens_per_microbatch": TOKENS_PER_MICROBATCH,
            },
        }  # fmt: skip
        return self._print_result(label, machine.in_fresh_process("worker.py", job, self.scratch))

    def trl(self, label: str, contender: Contender, rank: int, steps: Steps | None = None) -> Run:
        """One rank in TRL + PEFT, whose losses are put under the arm's name as ours are."""
        job = contender.job(
            steps or self.steps, self.model, self.starts[rank], self.arguments.device
        )
        if steps is None:  # as TRL does by default, and as lighten does: the last state is saved
            job["options"] = {**job["options"], "save_strategy": "steps"}
        python = str(self.arguments.peers_venv / "bin" / "python")
        result = machine.in_fresh_process(contender.script, job, self.scratch, python=python)
        if "error" not in result:
            for key in ("losses", "grad_norms", "moved"):
                result[key] = {name_of(rank): result[key]}
        return self._print_result(label, result)

    def search(self) -> dict[str, dict[str, Any]]:
        """Try TRL's settings on the middle rank: whole steps, then the two fastest in parts."""
        rank = sorted(self.arguments.ranks)[len(self.arguments.ranks) // 2]
        trials: dict[str, dict[str, Any]] = {}

        def attempt(name: str, contender: Contender) -> None:
            result = self.trl(f"TRL's best? {name}", contender, rank, self.steps[:FEW])
            why = why_idle(result)
            trials[name] = {"why_not": why, "step_s": None if why else result["step_seconds"][-1]}

        for name, contender in who.CANDIDATES.items():
            attempt(name, contender)
        for name in fastest_first(trials)[:2]:
            attempt(*who.split(name))
        return trials

    @staticmethod
    def _print_result(label: str, result: Run) -> Run:
        if "error" in result:
            print(f"{label}: {result['error']}", flush=True)
        else:
            print(f"{label}: {result['wall_s']:.0f} s, {result['peak_bytes'] / 2**30:.2f} GiB",
                  flush=True)  # fmt: skip
        return result


def starts(model: str, ranks: Sequence[int], scratch: Path) -> tuple[str, dict[int, str]]:
    """The model's folder, and for each rank the folder of the adapter that all start from."""
    from lighten import adapters, models
    from lighten.adapters import AdapterSpec

    base = models.load(model)
    specs = [AdapterSpec(name_of(r), r=r, alpha=SCALE * r, seed=0) for r in ranks]
    cohort = adapters.attach(base.model, specs)
    folders = {}
    for rank in ranks:
        folder = scratch / "start" / name_of(rank)
        folder.mkdir(parents=True)
        for file, content in adapters.files.contents(cohort, name_of(rank)).items():
            (folder / file).write_bytes(content)
        folders[rank] = str(folder)
    return str(base.path), folders


def fastest_first(trials: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The settings that trained, by the time of their last step."""
    valid = [name for name, outcome in trials.items() if outcome["why_not"] is None]
    return sorted(valid, key=lambda name: float(trials[name]["step_s"]))


def why_idle(run: Run) -> str | None:
    """Why a run of any number of arms has not trained, or None if each has (trap 51)."""
    if "error" in run:
        return str(run["error"]).strip().splitlines()[-1]
    for name in run["losses"]:
        if reason := idle({key: run[key][name] for key in ("moved", "grad_norms")}):
            return f"{name}: {reason}"
    return None


def measure(bench: Bench) -> dict[str, Any]:
    """Every run, repeated, and the ratios."""
    arguments = bench.arguments
    trials: dict[str, dict[str, Any]] = {}
    best = arguments.best
    if best is None and arguments.trl:
        trials = bench.search()
        best = next(iter(fastest_first(trials)), None)
    candidates = who.CANDIDATES | dict(map(who.split, who.CANDIDATES))
    runs: Rows = {}
    for repeat in range(arguments.repeats):
        for rank in arguments.ranks:
            label = f"repeat {repeat + 1}, rank {rank}"
            if best is not None:
                result = bench.trl(f"{label}, trl", candidates[best], rank)
                runs.setdefault(f"trl, {name_of(rank)}", []).append(result)
            runs.setdefault(f"alone, {name_of(rank)}", []).append(
                bench.ours(f"{label}, lighten alone", [rank])
            )
        label = f"repeat {repeat + 1}, lighten's cohort"
        runs.setdefault("cohort", []).append(bench.ours(label, arguments.ranks))
    control = bench.ours("control that does not learn", arguments.ranks[:1], learns=False)
    names = [name_of(rank) for rank in arguments.ranks]
    return {
        **ratios(runs, names), "control_loss_difference": unlearned(control, runs, names[0]),
        "best_settings": best, "best_tried": trials, "table": tabulate(runs, names),
        "choices": runs["cohort"][0].get("choices"), "runs": runs,
    }  # fmt: skip


def unlearned(control: Run, runs: Rows, name: str) -> float | None:
    """How far an arm that never learns is from the same arm learning."""
    learnt = runs[f"alone, {name}"][0]
    if "error" in control or "error" in learnt:
        return None
    return loss_difference(control["losses"][name], learnt["losses"][name])


def largest_loss_difference(runs: Rows, names: Sequence[str], other: str) -> float | None:
    """Largest relative difference of an arm's loss in the cohort from `other`'s, at any step."""
    differences = []
    for name in names:
        for cohort, single in zip(runs["cohort"], runs.get(f"{other}, {name}", []), strict=False):
            if "error" in cohort or "error" in single:
                return None
            differences.append(loss_difference(cohort["losses"][name], single["losses"][name]))
    # `max` would hide a loss that is no number.
    return max(differences, key=lambda value: (value != value, value)) if differences else None


def ratios(runs: Rows, names: Sequence[str]) -> dict[str, float | None]:
    """The cohort over the runs one after another; null where an arm does not count.

    Args:
        runs: By contender: `cohort`, and `alone, NAME` and `trl, NAME` of each arm.
        names: The arms.
    """
    figures: dict[str, float | None] = dict.fromkeys(KEYS)
    for other in ("alone", "trl"):
        figures[f"largest_loss_difference_{other}"] = largest_loss_difference(runs, names, other)

    def counts(other: str) -> bool:
        rows = [runs["cohort"], *(runs.get(f"{other}, {name}", []) for name in names)]
        trained = all(rows) and not any(why_idle(run) for row in rows for run in row)
        distance = figures[f"largest_loss_difference_{other}"]
        return trained and distance is not None and distance <= APART[other]

    def total(other: str, figure: str) -> float:
        """Of all arms one after another, each the median of its repeats."""
        return sum(_median(runs[f"{other}, {name}"], figure) for name in names)

    if counts("alone"):
        largest = max(_median(runs[f"alone, {name}"], "peak_bytes") for name in names)
        figures["peak_vs_largest_single"] = _median(runs["cohort"], "peak_bytes") / largest
        cohort_wall = _median(runs["cohort"], "wall_s")
        figures["wall_vs_three_own_runs"] = cohort_wall / total("alone", "wall_s")
    if counts("trl"):
        cohort_wall = _median(runs["cohort"], "wall_s")
        figures["wall_vs_three_trl_runs"] = cohort_wall / total("trl", "wall_s")
        steady = _median(runs["cohort"], "steady_s") / total("trl", "steady_s")
        figures["steps_vs_three_trl_runs"] = steady
    return figures


def _median(runs: Sequence[Run], figure: str) -> float:
    """Over the repeats; `steady_s` is the time of all steps but the first."""
    if figure == "steady_s":
        return statistics.median(sum(run["step_seconds"][1:]) for run in runs)
    return float(statistics.median(run[figure] for run in runs))


def tabulate(runs: Rows, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A row per contender: medians, and why it does not count."""
    table: dict[str, dict[str, Any]] = {}
    for label, repeats in runs.items():
        row: dict[str, Any] = {
            "repeats": len(repeats),
            "why_not": next(filter(None, map(why_idle, repeats)), None),
        }
        table[label] = row
        if any("error" in run for run in repeats):
            continue
        for figure in ("wall_s", "peak_bytes", "steady_s"):
            row[figure] = _median(repeats, figure)
        row["wall_s_spread"] = [
            min(r["wall_s"] for r in repeats),
            max(r["wall_s"] for r in repeats),
        ]
        row["last_loss"] = {name: repeats[0]["losses"][name][-1] for name in names
                            if name in repeats[0]["losses"]}  # fmt: skip
    return table


def show(result: Mapping[str, Any]) -> None:
    """Print the table."""
    show_settings(result)
    for label, row in result["table"].items():
        if "wall_s" not in row:
            print(f"{label:14} failed: {row['why_not']}")
            continue
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in row["last_loss"].items())
        print(f"{label:14} {row['wall_s']:6.0f} s  {row['peak_bytes'] / 2**30:5.2f} GiB  "
              f"last loss {losses}"
              + (f"  DOES NOT COUNT: {row['why_not']}" if row["why_not"] else ""))  # fmt: skip


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--best", help="TRL's best settings, instead of looking for them")
    parser.add_argument("--no-trl", dest="trl", action="store_false", help="leave TRL out")
    parser.add_argument("--peers-venv", type=Path, default=PEERS)
    arguments = parser.parse_args(words)
    valid_settings = [*who.CANDIDATES, *(who.split(name)[0] for name in who.CANDIDATES)]
    if arguments.best is not None and arguments.best not in valid_settings:
        parser.error(f"--best: {arguments.best!r} is none of {'; '.join(valid_settings)}")
    if arguments.steps < FEW:
        parser.error(f"--steps has to be {FEW} at least")
    if not arguments.trl:
        arguments.best = None
    elif not (arguments.peers_venv / "bin" / "python").exists():
        parser.error(
            f"no environment at {arguments.peers_venv}: run train_vs_peers.py --setup first"
        )
    return arguments


def main(words: Sequence[str] | None = None, steps: Steps | None = None) -> None:
    """Parse, measure, print, store.

    Args:
        words: Of the command line.
        steps: Given, or cut from the documentation like those of `train_vs_peers.py`.
    """
    arguments = parse(words)
    before = machine.before_start()
    training_steps = steps or largest_first(
        steps_of(encoded(arguments.model), arguments.steps, grouped=True)
    )
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(Bench(arguments, training_steps, Path(temporary)))
    show(result)
    unmoved = result["control_loss_difference"]
    why = {
        "parts were left out": not arguments.trl or tuple(arguments.ranks) != RANKS,
        f"fewer than {ENOUGH_STEPS} steps": arguments.steps < ENOUGH_STEPS,
        "a run does not count": any(result[key] is None for key in KEYS),
        "the losses would not tell an adapter that never learns": unmoved is None
        or unmoved <= max(APART.values()),
    }
    settings = {key: value for key, value in vars(arguments).items() if key != "peers_venv"}
    machine.store(
        f"sweep_vs_peers-{Path(arguments.model).name}-{arguments.device}",
        {
            **settings, "optimiser": OPTIMISER, "scale": SCALE, "rows_per_step": ROWS_PER_STEP,
            "tokens_per_microbatch": TOKENS_PER_MICROBATCH, **result, "data": facts(training_steps),
        },
        before,
        why,
    )  # fmt: skip
    print(json.dumps({key: result[key] for key in KEYS}))


if __name__ == "__main__":
    main()
