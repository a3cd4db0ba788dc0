"""From runs to a table and ratios, and which of them count."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.contenders import (
    BEST,
    BEST_SAVING,
    DEFAULTS,
    FLOAT32,
    OURS,
    OURS_SAVING,
    OURS_SHUFFLED,
    REFERENCES,
    ROUNDED,
    Contender,
)
from benchmarks.steps import Steps, tokens_of

# Largest relative difference of a step's loss from one in float32, by the format of the weights
# or, with autocast, of the products: in a few steps rounding takes a loss this far.
AGREEMENT = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 1e-2}
# The same from TRL with products in the same format: a bfloat16 value is off by up to 2**-9, and so
# is the loss.
SAME_FORMAT = 2.0**-9
# TRL with rounded products is at most this much of the way from float32 to who never learns.
HALFWAY = 0.5

Run = dict[str, Any]
Table = dict[str, dict[str, Any]]


def speed(run: Run, steps: Steps, warmup: int) -> float:
    """Real tokens per second: the median over the steps after warm-up."""
    pairs = list(zip(tokens_of(steps), run["step_seconds"], strict=True))[warmup:]
    return statistics.median(tokens / seconds for tokens, seconds in pairs)


def loss_difference(losses: Sequence[float], reference: Sequence[float]) -> float:
    """Largest relative difference of a step's loss; the reference may go on longer.

    A loss that is no number makes the difference none either, which Python's `max` would hide.
    """
    values, expected = np.asarray(losses), np.asarray(reference[: len(losses)])
    return float(np.max(np.abs(values - expected) / np.abs(expected)))


def idle(run: Run) -> str | None:
    """Why a run did not train at all (trap 51), or None if it did."""
    if not run["moved"] > 0.0:
        return "no weight has changed"
    if not all(norm > 0.0 for norm in run["grad_norms"]):
        return "a step had no gradient"
    return None


def why_not(run: Run, reference: Run | None, allowed: float) -> str | None:
    """Why a run does not count, or None if it does.

    Args:
        run: Which.
        reference: Whose losses it has to follow.
        allowed: How far its own may be from them, relatively.
    """
    if "error" in run:
        return str(run["error"])
    if reason := idle(run):
        return reason
    if reference is None or "error" in reference:
        return "there is no reference for its losses"
    difference = loss_difference(run["losses"], reference["losses"])
    if not difference <= allowed:
        return f"its losses are up to {difference:.1e} from the reference's, over {allowed:.1e}"
    return None


def exact(contender: Contender, run: Run, results: Mapping[str, Sequence[Run]]) -> Run | None:
    """Float32 arithmetic on the weights of a contender's run; None if it was not measured."""
    weights = contender.rounded or run.get("dtype")
    return _first_run(results, REFERENCES.get((contender.data, str(weights))))


def reference_of(
    name: str,
    contender: Contender,
    run: Run,
    results: Mapping[str, Sequence[Run]],
    controls: Mapping[str, Run],
) -> tuple[Run | None, float]:
    """The run whose losses a row has to follow, None if there is none, and how closely.

    Rounded products follow TRL's own, and TRL's follow float32: rounding alone takes what Adam
    learns in its first steps, by signs of gradients, further from it than two engines are apart.

    Args:
        name: Of the row.
        contender: What the row is.
        run: One of its runs.
        results: All of them.
        controls: Who never learnt, by set of steps.
    """
    if follows_trl(name, contender, run):
        return _first_run(results, ROUNDED[contender.data]), SAME_FORMAT
    of_float32 = exact(contender, run, results)
    rounding = contender.rounding or run.get("dtype")
    if rounding == "float32":
        return of_float32, AGREEMENT["float32"]
    control = controls.get(contender.data)
    if of_float32 is None or control is None or "error" in of_float32 or "error" in control:
        return of_float32, AGREEMENT.get(str(rounding), 0.0)
    return of_float32, HALFWAY * loss_difference(control["losses"], of_float32["losses"])


def follows_trl(name: str, contender: Contender, run: Run) -> bool:
    """Whether a row is held to TRL's with rounded products, and so counts only if that one does."""
    rounding = contender.rounding or run.get("dtype")
    return rounding != "float32" and name != ROUNDED[contender.data]


def _first_run(results: Mapping[str, Sequence[Run]], name: str | None) -> Run | None:
    return next(iter(results.get(name or "", [])), None)


def unlearned(controls: Mapping[str, Run], results: Mapping[str, Sequence[Run]]) -> float | None:
    """How far who never learns is from TRL at least, with rounded products; None: not measured."""
    differences = []
    for data, control in controls.items():
        reference = _first_run(results, ROUNDED[data])
        if "error" in control or reference is None or "error" in reference:
            return None
        differences.append(loss_difference(control["losses"], reference["losses"]))
    return min(differences, default=None)


def tabulate(
    results: Mapping[str, Sequence[Run]],
    contenders: Mapping[str, Contender],
    steps: Mapping[str, Steps],
    warmup: int,
    controls: Mapping[str, Run],
) -> Table:
    """A row per contender: medians, spread, and whether every repeat counts.

    Args:
        results: Runs by contender.
        contenders: What they are.
        steps: The steps by name of the set; a run may have made only the first of them.
        warmup: First steps of a run that do not count.
        controls: Who never learnt, by set of steps.
    """
    table: Table = {}
    for name, runs in results.items():
        contender = contenders[name]
        reference, allowed = reference_of(name, contender, runs[0], results, controls)
        reasons = [why_not(run, reference, allowed) for run in runs]
        row: dict[str, Any] = {
            "valid": not any(reasons), "why_not": next(filter(None, reasons), None),
            "steps": contender.data, "repeats": len(runs),
        }  # fmt: skip
        table[name] = row
        if any("error" in run for run in runs):
            continue
        speeds = [speed(run, steps[contender.data][: len(run["losses"])], warmup) for run in runs]
        row |= {
            "largest_loss_difference": _largest(runs, reference), "tolerance": allowed,
            "largest_loss_difference_from_float32":
                _largest(runs, exact(contender, runs[0], results)),
            "tokens_per_s": statistics.median(speeds),
            "tokens_per_s_spread": [min(speeds), max(speeds)],
            "peak_bytes": statistics.median(run["peak_bytes"] for run in runs),
            "first_step_s": statistics.median(run["first_step_s"] for run in runs),
            "wall_s": statistics.median(run["wall_s"] for run in runs),
        }  # fmt: skip
    for name, row in table.items():
        trl_name = ROUNDED[contenders[name].data]
        if row["valid"] and follows_trl(name, contenders[name], results[name][0]):
            row["valid"] = table[trl_name]["valid"]
            row["why_not"] = (
                None if row["valid"] else f"{trl_name!r}, which it follows, does not count"
            )
    return table


def _largest(runs: Sequence[Run], reference: Run | None) -> float | None:
    if reference is None or "error" in reference:
        return None
    return float(np.max([loss_difference(run["losses"], reference["losses"]) for run in runs]))


def over(table: Table, figure: str, numerator: str, denominator: str) -> float | None:
    """A figure of one row over that of another; null where one is missing or does not count."""
    rows = [table.get(numerator), table.get(denominator)]
    if any(row is None or not row["valid"] for row in rows):
        return None
    return float(table[numerator][figure] / table[denominator][figure])


def wall_ratio(walls: Mapping[str, Sequence[Run]]) -> float | None:
    """Whole wall time of ours over TRL's best; null unless all trained, and to the same losses."""
    ours, theirs = walls.get(OURS, []), walls.get(BEST, [])
    if not ours or len(ours) != len(theirs):
        return None
    if any("error" in run or idle(run) for run in (*ours, *theirs)):
        return None
    difference = np.max(
        [loss_difference(a["losses"], b["losses"]) for a, b in zip(ours, theirs, strict=True)]
    )
    if not difference <= 2 * AGREEMENT["bfloat16"]:  # both are rounded
        return None
    our_seconds, their_seconds = ([run["wall_s"] for run in runs] for runs in (ours, theirs))
    return statistics.median(our_seconds) / statistics.median(their_seconds)


def ratios(
    table: Table,
    walls: Mapping[str, Sequence[Run]],
    wall_steps: int,
    trials: Mapping[str, Mapping[str, Any]],
) -> dict[str, float | None]:
    """Ours over theirs; null where a row does not count or was not measured.

    Args:
        table: Of `tabulate`.
        walls: The long runs.
        wall_steps: Their steps.
        trials: What the search for TRL's best found, by candidate.
    """
    our_row = table.get(OURS)

    def memory_over(accumulate: int) -> float | None:
        """Against the fastest candidate that cuts a step so: one short run."""
        candidates = [
            t for t in trials.values() if t["accumulate"] == accumulate and not t["why_not"]
        ]
        if our_row is None or not our_row["valid"] or not candidates:
            return None
        fastest = max(candidates, key=lambda t: float(t["tokens_per_s"]))
        return float(our_row["peak_bytes"] / fastest["peak_bytes"])

    cuts = {t["accumulate"] for t in trials.values()}
    return {
        "speed_vs_best": over(table, "tokens_per_s", OURS, BEST),
        "speed_vs_defaults": over(table, "tokens_per_s", OURS_SHUFFLED, DEFAULTS),
        "speed_vs_float32_defaults": over(table, "tokens_per_s", OURS_SHUFFLED, FLOAT32),
        "memory_vs_best": over(table, "peak_bytes", OURS, BEST),
        "memory_vs_checkpointed": over(table, "peak_bytes", OURS_SAVING, BEST_SAVING),
        "memory_vs_defaults": over(table, "peak_bytes", OURS_SHUFFLED, DEFAULTS),
        "memory_vs_fastest_of_whole_steps": memory_over(1),
        "memory_vs_fastest_of_small_microbatches": memory_over(max(cuts)) if len(cuts) > 1
        else None,
        "wall_60_steps_vs_best": wall_ratio(walls) if wall_steps == 60 else None,
    }  # fmt: skip


def show_settings(result: Mapping[str, Any]) -> None:
    """Print what stands above a table: TRL's settings, and whether the losses tell anything."""
    print(f"TRL's best settings here: {result['best_settings']}")
    print(f"loss difference of a control that never learns: "
          f"{result['control_loss_difference']}")  # fmt: skip


def show(result: Mapping[str, Any]) -> None:
    """Print the table."""
    show_settings(result)
    for name, row in result["table"].items():
        if "tokens_per_s" not in row:
            print(f"{name:26} failed: {str(row['why_not']).strip().splitlines()[-1]}")
            continue
        low, high = row["tokens_per_s_spread"]
        difference = row["largest_loss_difference"]
        print(
            f"{name:26} {row['tokens_per_s']:6.0f} ({low:.0f} to {high:.0f}) tokens/s  "
            f"{row['peak_bytes'] / 2**30:5.2f} GiB  first step after {row['first_step_s']:4.0f} s  "
            + (
                "no reference"
                if difference is None
                else f"loss within {difference:.1e} ({row['tolerance']:.1e})"
            )
            + ("" if row["valid"] else f"  DOES NOT COUNT: {row['why_not']}")
        )
    for name, reason in result["absent"].items():
        print(f"{name:26} {reason}")
    print(
        "TRL's defaults are bfloat16 autocast, gradient checkpointing, the loss in chunks and "
        "rows of any length; float32 is the same with bf16=False, measured once."
    )
