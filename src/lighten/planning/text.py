"""A plan in words and in rows of a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lighten.planning.distributed import Distributed
from lighten.planning.result import Change, DataCost, Plan
from lighten.planning.serving import Serving
from lighten.reporting.planned import enough
from lighten.reporting.planned import verdict as sentence
from lighten.reporting.text import duration, gib, size
from lighten.wording import counted, typed

if TYPE_CHECKING:
    from lighten.planning.probe import Probed
    from lighten.planning.search import Candidate, Sized
    from lighten.planning.serve import Quantizing

GIB = 2**30
BAR = 32  # characters of the longest bar
# Choices whose names would stand twice in the table.
CHOICES = {"micro-batch": "micro-batch filled by"}


def verdict(plan: Plan) -> str:
    """Whether it fits, in a sentence."""
    return sentence(plan.to_dict())


def lines(plan: Plan) -> list[str]:
    """What a training run says of its plan: a line, and a second one where it is in doubt."""
    headline = f"plan: {gib(plan.memory.expected)} at the peak"
    if plan.capacity is not None:
        headline += f" of {gib(plan.capacity)}"
    largest = sorted(plan.memory.parts, key=lambda part: -part.bytes)[:2]
    headline += f" ({', '.join(f'{part.name} {gib(part.bytes)}' for part in largest)})"
    if plan.time is not None:
        headline += f", {seconds(plan.time.seconds)} per step"
        if plan.run_seconds is not None:
            headline += f", {duration(plan.run_seconds)} in all"
    report = [headline]
    if plan.memory.mapped:
        report.append(
            f"while it is loaded {gib(plan.memory.expected + plan.memory.mapped)}, of which "
            f"{gib(plan.memory.mapped)} are mapped files that the system takes back where memory "
            "is short"
        )
    if plan.fits() is None and plan.capacity is not None:
        report.append(
            f"it might not fit: between {gib(plan.memory.low)} and {gib(plan.memory.high)}; "
            "lighten plan shows what would need less"
        )
    return report


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
    workers = f", {shape.workers} at a time" if shape.workers > 1 else ""
    rows = [
        ["micro-batch", f"{counted(shape.rows, 'row')} of "
                        f"{counted(shape.tokens_per_row, 'token')}, "
                        f"{shape.micro_batches} per step{workers}"],
        ["capacity", gib(plan.capacity)],
        ["main memory", gib(plan.host_bytes)],
        ["disk", size(plan.disk_bytes)],
        *_data_rows(plan.data),
        ["download", "not known" if plan.download_bytes is None else size(plan.download_bytes)],
    ]  # fmt: skip
    if time is None:
        rows.append(["time", f"not predicted: it is not known how fast {plan.device} computes"])
    else:
        rows.append(
            ["time of the largest step", f"{seconds(time.seconds)} (low {seconds(time.low)}, high "
                              f"{seconds(time.high)}); {time.rates}"]
        )  # fmt: skip
        duration_text = "not known without data or max_steps"
        if plan.run_seconds is not None:
            duration_text = f"{duration(plan.run_seconds)} for {counted(plan.steps or 0, 'step')}"
        rows.append(["time of the run", duration_text])
    return rows + [[CHOICES.get(what, what), choice] for what, choice in plan.choices.items()]


def _data_rows(data: DataCost | None) -> list[list[str]]:
    """What the data take, if they were read."""
    if data is None:
        return []
    description = f"{counted(data.rows, 'row')}, {counted(data.tokens, 'token')}: "
    description += f"{size(data.resident_bytes)}, mapped from disk"
    if data.encoding_bytes:
        description += (
            f"; {gib(data.encoding_bytes)} while they are encoded, before the model is loaded"
        )
    return [["data", description]]


def change_rows(plan: Plan) -> list[list[str]]:
    """A row per change: its number, what, what it saves, how much slower, whether it fits."""
    fits = {True: "yes", False: "no", None: "maybe"}
    return [
        [str(place), change.what, gib(change.saves_bytes), slower(change), fits[change.fits]]
        for place, change in enumerate(plan.changes, 1)
    ]


def change_flags(plan: Plan) -> list[str]:
    """A line per change with the flags that make it, by the numbers of `change_rows`."""
    return [f"{place}: {flags(change.differing)}" for place, change in enumerate(plan.changes, 1)]


def with_change(plan: Plan) -> str | None:
    """What makes it fit, where it does not as it is and a change was found that does."""
    return enough(plan.to_dict())


def change(change: Change) -> str:
    """A change as one line."""
    fits = {True: "it fits then", False: "not enough alone", None: "it might fit then"}[change.fits]
    return f"{change.what}: saves {gib(change.saves_bytes)}, {slower(change)}; {fits}"


def slower(change: Change) -> str:
    """The slowdown in words."""
    if change.slowdown is None:
        return "time not known"
    per_cent = round(100 * (change.slowdown - 1))
    if per_cent == 0:
        return "as fast"
    return f"{abs(per_cent)} % {'slower' if per_cent > 0 else 'faster'}"


def seconds(value: float) -> str:
    """A time that may be short."""
    if value >= 60:
        return duration(value)
    return f"{value:.2f} s" if value >= 0.1 else f"{1000 * value:.3g} ms"


def flags(settings: Mapping[str, Any]) -> str:
    """Settings as they are typed into a shell."""
    return " ".join(f"--{name} {typed(_value(value))}" for name, value in settings.items())


def _value(value: Any) -> str:
    """A value as YAML has it."""
    return (
        json.dumps(value) if isinstance(value, bool | list | dict) or value is None else str(value)
    )


def probe_rows(probed: Probed) -> list[list[str]]:
    """Predicted beside measured."""
    rows = [["peak memory", gib(probed.predicted_bytes), gib(probed.peak_bytes),
             _error(probed.predicted_bytes, probed.peak_bytes)]]  # fmt: skip
    if probed.predicted_seconds is not None and probed.step_seconds is not None:
        rows.append(
            ["time per step", seconds(probed.predicted_seconds), seconds(probed.step_seconds),
             _error(probed.predicted_seconds, probed.step_seconds)]
        )  # fmt: skip
    return rows


def _error(predicted: float, measured: float | None) -> str:
    return f"{100 * (predicted / measured - 1):+.1f} %" if measured else "–"


def candidate_row(candidate: Candidate, best: bool) -> list[str]:
    """A row of what a search looked at."""
    plan = candidate.plan
    if plan is None:
        return [candidate.what, "–", "–", "–", candidate.why]
    rate = candidate.tokens_per_s
    shape = plan.shape
    return [
        f"{'▶ ' if best else ''}{candidate.what}", f"{shape.rows} × {shape.micro_batches}",
        gib(plan.memory.expected), "–" if rate is None else f"{rate:,.0f}", candidate.why,
    ]  # fmt: skip


def best_of(candidate: Candidate) -> str:
    """What a search's answer is, by what is known of its time."""
    if candidate.tokens_per_s is None:
        return "the first that fits, as no time is predicted"
    return "the fastest that fits"


def sized_row(sized: Sized) -> list[str]:
    """A row of a list of models."""
    size = "–" if sized.parameters is None else f"{sized.parameters / 1e9:,.2f} B"
    if sized.best is None or sized.best.plan is None:
        return [sized.model, size, "–", "–", "–", sized.why]
    rate = sized.best.tokens_per_s
    return [sized.model, size, sized.best.what, gib(sized.best.plan.memory.expected),
            "–" if rate is None else f"{rate:,.0f}", sized.why]  # fmt: skip


def spread_verdict(spread: Distributed) -> str:
    """Whether each of many ranks fits, in a sentence."""
    end = {True: "fits", False: "does not fit", None: "might not fit"}[spread.fits()]
    where = f" on {counted(spread.nodes, 'node')}" if spread.kind != "cpu" else ""
    return (
        f"{spread.strategy} over {counted(spread.ranks, 'rank')}{where}: "
        f"{gib(spread.device_bytes)} per rank of {gib(spread.capacity)}, which {end}"
    )


def spread_rows(spread: Distributed) -> list[list[str]]:
    """What one rank needs."""
    volume, states = spread.volume, spread.states
    memory = f"{gib(spread.device_bytes)} (low {gib(spread.low)}, high {gib(spread.high)})"
    sent = [
        ["weights gathered per step", f"{size(volume.gather)} sent by each rank"],
        ["gradients reduced per step", f"{size(volume.reduce)} sent by each rank, of "
                                       f"{size(states.gradients)} of gradients"],
    ]  # fmt: skip
    if spread.kind == "cpu":
        rows = [["memory", memory], *sent]
        if spread.offload:
            what = "weights and state" if "param" in spread.offload else "optimiser's state"
            rows.append([f"{what} on a disk", f"{gib(spread.host_bytes)}, of which each step reads "
                         f"and writes {gib(spread.volume.host)}"])  # fmt: skip
        return rows
    rows = [
        ["GPU memory", memory],
        ["main memory and files" if spread.on_disk else "main memory", gib(spread.host_bytes)],
        *sent,
        ["of it between nodes alone", size(volume.across)],
        ["to main memory and back", size(volume.host)],
    ]
    if spread.communication_s is not None:
        rows.append(["links busy per step", seconds(spread.communication_s)])
    if spread.step_s is not None:
        hidden, plain = spread.step_s
        rows.append(["time per step", f"{seconds(hidden)} (all of it behind computing) to "
                                      f"{seconds(plain)} (none)"])  # fmt: skip
    return rows


def serving_verdict(serving: Serving) -> str:
    """Whether a server fits, in a sentence."""
    verdict = f"{serving.model} on {serving.device}: {gib(serving.total)}"
    if serving.capacity is None:
        return verdict
    verdict += f" of {gib(serving.capacity)}, which {'fits' if serving.fits() else 'does not fit'}"
    if serving.most_sequences is not None:
        verdict += (
            f"; {counted(serving.most_sequences, 'sequence')} of {serving.context:,} tokens would"
        )
    return verdict


def serving_rows(serving: Serving) -> list[list[str]]:
    """What fills a server's memory, and how fast it answers at best."""
    most = max(serving.parts.values()) or 1
    rows = [
        [name, gib(value), "█" * max(1, round(BAR * value / most))]
        for name, value in serving.parts.items()
        if value
    ]
    if serving.tokens_per_s is not None:
        rows.append(
            ["tokens per second at best", f"{serving.tokens_per_s:,.0f}", "by the bandwidth"]
        )
    return rows + [["left out", "–", what] for what in serving.left_out]


def quantizing_rows(quantizing: Quantizing) -> list[list[str]]:
    """What quantising needs."""
    return [
        ["main memory at the peak", f"{gib(quantizing.peak_bytes)} of {gib(quantizing.capacity)}"],
        ["result", gib(quantizing.result_bytes)],
        ["its files now", gib(quantizing.dense_bytes)],
        ["time, reading left out", seconds(quantizing.seconds)],
    ]
