"""The seconds of a traced step: its operations by their rates, shared out between workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from lighten.data.batches import even_shares
from lighten.planning import rates
from lighten.planning.operation_cost import Work
from lighten.planning.result import StepTime
from lighten.planning.steps import STEPS, Traced


class Timed(Protocol):
    """What the time of a step depends on of a device."""

    @property
    def name(self) -> str:
        """What to call it."""

    @property
    def label(self) -> str:
        """Its full name: what to call one that is here, whose name is `cuda`."""

    @property
    def kind(self) -> str:
        """`cpu` or `cuda`."""

    @property
    def is_here(self) -> bool:
        """Whether it is this machine's, and can be timed."""

    @property
    def bandwidth(self) -> float | None:
        """Of its memory, bytes per second; None: to be measured."""

    @property
    def flops(self) -> Mapping[str, float]:
        """Operations per second of matrix products by format; empty: to be measured."""


@dataclass(frozen=True)
class Part:
    """Operations that a step does one after the other.

    Attributes:
        work: Of one micro-batch, or of the optimiser.
        share: How many micro-batches like it the step has, by their tokens.
        times: How many of them a step waits for, where workers do some at the same time.
        alone: Whether nothing else is done at that time.
    """

    work: list[Work]
    share: float
    times: float
    alone: bool


def workers_of(traced: Traced) -> int:
    """How many micro-batches of the step are computed at the same time."""
    return min(traced.setup.workers, len(traced.batches))


def parts_of(traced: Traced) -> list[Part]:
    """The last traced step, micro-batch by micro-batch, and its optimiser's part."""
    work_by_place: dict[int, list[Work]] = {}
    for run, _, work in traced.timeline.work:
        pass_run = traced.timeline.runs[run]
        if pass_run.step == STEPS - 1:
            place = -1 if pass_run.phase == "optimiser step" else pass_run.micro_batch
            work_by_place.setdefault(place, []).append(work)
    parts, wait_share = [], _waits(traced) / workers_of(traced)
    for place, works in work_by_place.items():
        alone = place < 0
        share = 1.0 if alone else traced.share_of(place)
        parts.append(Part(works, share, share if alone else share * wait_share, alone))
    return parts


def _waits(traced: Traced) -> float:
    """How many times its even share of the tokens the fullest worker has."""
    workers = workers_of(traced)
    longest = total = 0
    for group in traced.setup.groups(traced.setup.adapters):
        names = {adapter.name for adapter in group}
        tokens = [traced.tokens(place) for place, part in enumerate(traced.batches)
                  if part[0].adapter in names]  # fmt: skip
        longest += max(sum(tokens[i] for i in share) for share in even_shares(tokens, workers))
        total += sum(tokens)
    return longest * workers / total


def time_of(traced: Traced, device: Timed) -> StepTime | None:
    """The time of a step; None: the device's rates are not known."""
    in_workers: rates.Rates
    alone_rates: rates.Rates
    if device.kind == "cpu" and device.is_here:
        workers = workers_of(traced)
        alone_rates = rates.Measured.cached()
        # Two of the same file would each write it without what the other has timed.
        in_workers = alone_rates if workers == 1 else rates.Measured.cached(workers)
    elif device.flops and device.bandwidth:
        name = device.label if device.is_here else device.name
        in_workers = alone_rates = rates.Datasheet(name, device.flops, device.bandwidth)
    else:
        return None
    seconds = flops = moved = 0.0
    for part in parts_of(traced):
        seconds += part.times * (alone_rates if part.alone else in_workers).seconds(part.work)
        flops += part.share * sum(work.flops for work in part.work)
        moved += part.share * sum(work.bytes for work in part.work)
    low, high = seconds / alone_rates.spread, seconds * alone_rates.spread
    return StepTime(seconds, low, high, flops, moved, alone_rates.source)
