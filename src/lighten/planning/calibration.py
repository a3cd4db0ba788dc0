"""What earlier runs on this machine measured, beside what was predicted for them.

One JSON file in the cache folder, a few hundred pairs at most, written whole. Later plans for this
machine are corrected by the median of the pairs that resemble them, and say so. The trace itself
knows nothing of it: `trace.plan_recipe`, which the accuracy table measures, is uncorrected.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lighten import runs
from lighten.machine.hardware import cache_folder
from lighten.planning.result import MemoryPart, Plan
from lighten.wording import counted

FILE = "calibration.json"
MOST_PAIRS = 400
# So few pairs could be accidents, and nothing is corrected by more than this: a prediction that is
# further off is wrong in a way that a factor does not mend.
FEWEST_PAIRS, MOST_CORRECTION = 3, 1.25
# A model is like another whose weights are at most so many times as large.
ALIKE = 1.5
# Predictions below this are mostly the process's own noise.
SMALLEST_BYTES, SHORTEST_S = 64 * 2**20, 0.02
OVERHEAD = "allocator overhead"


def path() -> Path:
    """Where the pairs are kept: `LIGHTEN_CALIBRATION`, else in the cache folder."""
    override = os.environ.get("LIGHTEN_CALIBRATION")
    return Path(override).expanduser() if override else cache_folder() / FILE


def pairs() -> list[dict[str, Any]]:
    """The pairs so far, oldest first; a file that cannot be read counts as none."""
    try:
        content = json.loads(path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    entries = content.get("pairs") if isinstance(content, dict) else None
    return [pair for pair in entries if isinstance(pair, dict)] if isinstance(entries, list) else []


def add(pair: Mapping[str, Any]) -> None:
    """Add a pair and let the oldest go where there are too many.

    Of runs that end at once one adds after the other, so that no pair is lost.

    Args:
        pair: `when`, `device` (which machine), `model`, `weights_bytes`, `method`, `memory` and
            `step_seconds`, the last two each a mapping of `predicted` and `measured`, or None.

    Raises:
        UserError: The file cannot be written.
    """
    with runs.alone_in(path().parent):
        runs.write_json(path(), {"version": 1, "pairs": [*pairs(), dict(pair)][-MOST_PAIRS:]})


def corrected(
    plan: Plan, machine: str, earlier_pairs: Sequence[Mapping[str, Any]] | None = None
) -> Plan:
    """The plan with what this machine's earlier runs say about it.

    Args:
        plan: As traced.
        machine: This machine and device, as in the pairs' `device`.
        earlier_pairs: The pairs; default those of the file.
    """
    matching = [
        pair
        for pair in (pairs() if earlier_pairs is None else earlier_pairs)
        if pair.get("device") == machine and comparable(pair, plan)
    ]
    memory, notes = plan.memory, list(plan.notes)
    factor, count = _factor(matching, "memory", SMALLEST_BYTES)
    if count and memory.expected >= SMALLEST_BYTES:
        expected = round(memory.expected * factor)
        memory = replace(
            memory,
            parts=_shifted(memory.parts, expected - memory.expected),
            low=min(memory.low, expected),
            expected=expected,
            high=max(round(memory.high * factor), expected),
        )
        notes.append(_note("peak memory", factor, count))
    time = plan.time
    factor, count = _factor(matching, "step_seconds", SHORTEST_S)
    if count and time is not None:
        time = replace(
            time, seconds=time.seconds * factor, low=time.low * min(factor, 1.0),
            high=time.high * max(factor, 1.0),
        )  # fmt: skip
        notes.append(_note("time per step", factor, count))
    if len(notes) == len(plan.notes):
        return plan
    traced = {"expected": float(plan.memory.expected + plan.memory.mapped)}
    if plan.time is not None:
        traced["seconds"] = plan.time.seconds
    return replace(plan, memory=memory, time=time, notes=tuple(notes), traced=traced)


def comparable(pair: Mapping[str, Any], plan: Plan) -> bool:
    """Whether what a run measured says anything about a plan: same method, a model like its own.

    A toy says nothing about a larger model: what a plan misses of it is mostly the process's own.
    """
    if pair.get("method") != plan.method:
        return False
    measured, planned = pair.get("weights_bytes"), weights_bytes(plan)
    if not measured or not planned:  # of an older run: its name is all that is known
        return bool(pair.get("model") == plan.model)
    return max(measured, planned) <= ALIKE * min(measured, planned)


def weights_bytes(plan: Plan) -> float | None:
    """Bytes of a planned model's weights with what learns; None where they are not known."""
    return None if plan.states is None else plan.states.frozen + plan.states.trained


def _factor(matching: Sequence[Mapping[str, Any]], key: str, least: float) -> tuple[float, int]:
    """The median of measured over predicted and of how many; (1, 0) where they are too few."""
    ratios = []
    for pair in matching:
        figures = pair.get(key) or {}
        predicted, measured = figures.get("predicted"), figures.get("measured")
        if predicted and measured and predicted >= least:
            ratios.append(measured / predicted)
    if len(ratios) < FEWEST_PAIRS:
        return 1.0, 0
    median = statistics.median(ratios[-50:])  # the newest: packages and drivers change
    return min(max(median, 1 / MOST_CORRECTION), MOST_CORRECTION), len(ratios)


def _shifted(parts: Sequence[MemoryPart], by: int) -> tuple[MemoryPart, ...]:
    """The parts with the difference in the allocator's, so that they still sum to the whole.

    What the allocator's part cannot give is taken from all parts alike.
    """
    room = next((part.bytes for part in parts if part.name == OVERHEAD), 0)
    if by >= -room:
        if not any(part.name == OVERHEAD for part in parts):
            return (*parts, MemoryPart(OVERHEAD, by))
        return tuple(
            replace(part, bytes=part.bytes + by) if part.name == OVERHEAD else part
            for part in parts
        )
    total = sum(part.bytes for part in parts)
    scaled = [replace(part, bytes=part.bytes * (total + by) // total) for part in parts]
    lost = total + by - sum(part.bytes for part in scaled)
    return (replace(scaled[0], bytes=scaled[0].bytes + lost), *scaled[1:])


def _note(what: str, factor: float, count: int) -> str:
    runs = counted(count, "run")
    return f"{what}: corrected by {100 * (factor - 1):+.1f} %, from {runs} on this machine"
