"""A plan in words and in rows of a table."""

from __future__ import annotations

from lighten.plan.result import Change, Plan
from lighten.report.planned import verdict as sentence
from lighten.report.words import duration, gib, size

GIB = 2**30
BAR = 32  # characters of the longest bar


def verdict(plan: Plan) -> str:
    """Whether it fits, in a sentence."""
    return sentence(plan.to_dict())


def lines(plan: Plan) -> list[str]:
    """What a training run says of its plan: a line, and a second one where it is in doubt."""
    told = f"plan: {gib(plan.memory.expected)} at the peak"
    if plan.capacity is not None:
        told += f" of {gib(plan.capacity)}"
    largest = sorted(plan.memory.parts, key=lambda part: -part.bytes)[:2]
    told += f" ({', '.join(f'{part.name} {gib(part.bytes)}' for part in largest)})"
    if plan.time is not None:
        told += f", {seconds(plan.time.seconds)} per step"
        if plan.steps is not None:
            told += f", {duration(plan.time.seconds * plan.steps)} in all"
    found = [told]
    if plan.fits() is None and plan.capacity is not None:
        found.append(
            f"it might not fit: between {gib(plan.memory.low)} and {gib(plan.memory.high)}; "
            "lighten plan shows what would need less"
        )
    return found


def part_rows(plan: Plan) -> list[list[str]]:
    """A row per part: name, size and a bar; then the sum between its bounds."""
    most = max((part.bytes for part in plan.memory.parts), default=1) or 1
    rows = [
        [part.name, gib(part.bytes), "█" * max(1, round(BAR * part.bytes / most))]
        for part in plan.memory.parts
        if part.bytes
    ]
    memory = plan.memory
    rows.append(
        [f"peak ({memory.when})", gib(memory.expected),
         f"low {gib(memory.low)}, high {gib(memory.high)}"]
    )  # fmt: skip
    if memory.allocated is not None:
        rows.append(["of it allocated", gib(memory.allocated), "the rest is reserved around it"])
    return rows


def fact_rows(plan: Plan) -> list[list[str]]:
    """What else a plan says: shape, host memory, disk, download, time, choices."""
    shape, time = plan.shape, plan.time
    lanes = f", {shape.lanes} at a time" if shape.lanes > 1 else ""
    rows = [
        ["method", plan.method],
        ["micro-batch", f"{shape.rows} rows of {shape.tokens_per_row} tokens, "
                        f"{shape.micro_batches} per step{lanes}"],
        ["capacity", gib(plan.capacity)],
        ["main memory", gib(plan.host_bytes)],
        ["disk", size(plan.disk_bytes)],
        ["download", "not known" if plan.download_bytes is None else size(plan.download_bytes)],
    ]  # fmt: skip
    if time is None:
        rows.append(["time", f"not known: no rates of {plan.device} are"])
    else:
        rows.append(
            ["time per step", f"{seconds(time.seconds)} (low {seconds(time.low)}, high "
                              f"{seconds(time.high)}); {time.rates}"]
        )  # fmt: skip
        total = None if plan.steps is None else time.seconds * plan.steps
        told = "not known without data or max_steps"
        if total is not None:
            told = f"{duration(total)} for {plan.steps:,} steps"
        rows.append(["time of the run", told])
    return rows + [[what, choice] for what, choice in plan.choices.items()]


def change_rows(plan: Plan) -> list[list[str]]:
    """A row per change: what, what it saves, how much slower, whether it fits, what to set."""
    fits = {True: "yes", False: "no", None: "maybe"}
    return [
        [own.what, gib(own.saves_bytes), slower(own), fits[own.fits],
         " ".join(f"--{name} {_value(value)}" for name, value in own.settings.items())]
        for own in plan.changes
    ]  # fmt: skip


def change(own: Change) -> str:
    """A change as one line."""
    fits = {True: "it fits then", False: "not enough alone", None: "it might fit then"}[own.fits]
    return f"{own.what}: saves {gib(own.saves_bytes)}, {slower(own)}; {fits}"


def slower(own: Change) -> str:
    """The slowdown in words."""
    if own.slowdown is None:
        return "time not known"
    per_cent = round(100 * (own.slowdown - 1))
    if per_cent == 0:
        return "as fast"
    return f"{abs(per_cent)} % {'slower' if per_cent > 0 else 'faster'}"


def seconds(value: float) -> str:
    """A time that may be short."""
    if value >= 60:
        return duration(value)
    return f"{value:.2f} s" if value >= 0.1 else f"{1000 * value:.3g} ms"


def _value(value: object) -> str:
    return {None: "null", True: "true", False: "false"}.get(value, str(value))  # type: ignore[call-overload]
