"""A deep model's timeline from that of a shallow one: layers that are alike are traced once.

Four units of layers are traced: the first, two in the middle, the last. What the second of the two
in the middle does to the blocks of the first, each further unit does to those of its neighbour; so
the timeline of N units follows exactly, births and deaths in their order. A unit is one layer, or
as many as it takes until the pattern repeats (local and global attention, every other layer
recomputed); what does not divide goes to the last unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import nn

from lighten.planning.storage_tracker import OUTSIDE, Block, Event, Timeline

TRACED = 4  # units


@dataclass(frozen=True)
class Repetition:
    """How the layers of a model repeat.

    Attributes:
        period: Layers of one unit.
        units: In the whole model; the last has `rest` layers more.
        rest: Layers beyond whole units.
    """

    period: int
    units: int
    rest: int = 0

    @property
    def traced(self) -> list[int]:
        """Which layers are traced."""
        layers = self.period * self.units + self.rest
        if self.units <= TRACED:
            return list(range(layers))
        front = self.period * (TRACED - 1)
        return [*range(front), *range(layers - self.period - self.rest, layers)]

    def unit(self, place: int) -> int:
        """Unit of the traced layer at that place among those kept."""
        return min(place // self.period, min(self.units, TRACED) - 1)


def repetition(kinds: Sequence[Any]) -> Repetition:
    """The shortest period after which all kinds repeat; the whole model where none is short.

    Args:
        kinds: What each layer is: equal for layers that do the same.
    """
    count = len(kinds)
    for period in range(1, count // (TRACED + 1) + 1):
        if all(kinds[i] == kinds[i + period] for i in range(count - period)):
            return Repetition(period, count // period, count % period)
    return Repetition(max(1, count), 1)


def kind_of(layer: nn.Module) -> tuple[Any, ...]:
    """What two layers must share to do the same: modules, shapes, formats, what learns of them."""
    kind: list[Any] = []
    for name, module in layer.named_modules():
        facts: list[Any] = [name, type(module).__name__, "forward" in vars(module)]
        for key in ("attention_type", "is_sliding", "sliding_window", "use_rope", "layer_type"):
            facts.append(str(getattr(module, key, None)))
        for factors in (getattr(module, "lora_A", None), getattr(module, "lora_B", None)):
            if factors is not None:
                facts += [
                    (key, tuple(getattr(value, "shape", ()))) for key, value in factors.items()
                ]
        facts += [
            (key, tuple(value.shape), value.dtype, value.requires_grad)
            for key, value in module.named_parameters(recurse=False)
        ]
        kind.append(tuple(map(str, facts)))
    return tuple(kind)


class NotAlike(Exception):
    """The two middle units did different things: the model has to be traced whole."""


def unrolled(timeline: Timeline, units: int, first_run: int) -> Timeline:
    """The timeline of a model of so many units.

    Args:
        timeline: Of a model of `TRACED` units.
        units: Wanted.
        first_run: The pass from which on layers are traced; before, all of them were there.

    Raises:
        NotAlike: The middle units' blocks differ.
    """
    _require_alike(timeline, first_run)
    names = _Names(units)
    deep = Timeline(runs=timeline.runs)
    grouped = groupby(timeline.events, key=lambda event: (event.run, event.layer))
    stretches = [(run, layer, list(events)) for (run, layer), events in grouped]
    for place, (run, layer, events) in enumerate(stretches):
        if run < first_run or layer in (OUTSIDE, 0):
            deep.events += [names.event(e, {}) for e in events]
            continue
        if layer == TRACED - 1:
            deep.events += [names.event(e, {layer: units - 1, 2: units - 2}) for e in events]
            continue
        if layer == 1:
            deep.events += [names.event(e, {}) for e in events]
            continue
        rising = timeline.runs[run].phase != "backward"
        other = events if rising else _stretch_of(stretches, place, run, 1)
        for unit, template, shift in _copies(units, rising):
            source = events if template == 2 else other
            deep.events += [names.event(e, shift) for e in source]
            del unit
    _require_born(deep)
    deep.work = _repeated_work(timeline, units, first_run)
    return deep


def _require_born(timeline: Timeline) -> None:
    """Every block is born once, and dies once at most, after that.

    Raises:
        NotAlike: One does not: what all layers share (a learnt prefix) repeats in another way.
    """
    alive: set[Block] = set()
    for event in timeline.events:
        if event.born == (event.block in alive):
            raise NotAlike("a block that is born twice, or dies where nothing made it")
        (alive.add if event.born else alive.remove)(event.block)


def _copies(units: int, rising: bool) -> Iterator[tuple[int, int, dict[int, int]]]:
    """(unit, which middle unit's stretch to follow, what its layers become), in their order."""
    last = units - 2
    if rising:
        for unit in range(2, last + 1):
            yield unit, 2, {2: unit, 1: unit - 1, TRACED - 1: units - 1}
        return
    yield last, 2, {2: last, 1: last - 1, TRACED - 1: units - 1}
    for unit in range(last - 1, 1, -1):
        yield unit, 1, {1: unit, 2: unit + 1, 0: unit - 1, TRACED - 1: units - 1}


def _stretch_of(
    stretches: Sequence[tuple[int, int, list[Event]]], place: int, run: int, layer: int
) -> list[Event]:
    """The next stretch of a layer in a pass."""
    for later_run, later_layer, events in stretches[place + 1 :]:
        if later_run == run and later_layer == layer:
            return events
    raise NotAlike("a backward pass that does not go through the layers one by one")


class _Names:
    """Blocks of the deep model by where they come from."""

    def __init__(self, units: int) -> None:
        self.units = units
        self._blocks: dict[tuple[int, int, int], Block] = {}

    def event(self, event: Event, shift: dict[int, int]) -> Event:
        """The same event, its layers moved."""
        block = event.block
        layer = self._moved(block.layer, shift)
        key = (block.run, layer, block.ordinal)
        repeated = self._blocks.get(key)
        if repeated is None:
            repeated = Block(block.bytes, block.part, layer, block.run, block.ordinal)
            self._blocks[key] = repeated
        return Event(repeated, event.born, event.run, self._moved(event.place, shift))

    def _moved(self, layer: int, shift: dict[int, int]) -> int:
        if layer in shift:
            return shift[layer]
        return self.units - 1 if layer == TRACED - 1 else layer


def _require_alike(timeline: Timeline, first_run: int) -> None:
    """The middle units' births and deaths, pass by pass.

    Raises:
        NotAlike: They differ.
    """
    events_of: dict[int, dict[int, list[tuple[bool, int, int, int]]]] = {1: {}, 2: {}}
    for event in timeline.events:
        if event.run >= first_run and event.layer in events_of:
            block = event.block
            if block.run < first_run:
                continue
            facts = (event.born, block.bytes, block.run, block.ordinal)
            if block.layer == event.layer:
                events_of[event.layer].setdefault(event.run, []).append(facts)
    if events_of[1] != events_of[2]:
        raise NotAlike("the layers in the middle differ")


def _repeated_work(timeline: Timeline, units: int, first_run: int) -> list[Any]:
    works = []
    for run, layer, work in timeline.work:
        times = units - TRACED + 1 if layer == 2 and run >= first_run else 1
        works += [(run, layer, work)] * times
    return works
