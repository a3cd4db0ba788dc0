"""Of a loss over many chunks of positions, three are traced: the others do what the second does.

A large batch has thousands of them, each a dozen operations that take and give back the same
memory; tracing all of them took most of a plan's time. Of micro-batches too some do for all.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from lighten.data.batches import MicroBatch
from lighten.engine.loss import Workspace
from lighten.planning.storage_tracker import Timeline

TRACED = 3


class FewChunks(Workspace):
    """The memory of a traced loss, which goes through a few chunks alone.

    Args:
        timeline: Where the work of the others is added.
    """

    def __init__(self, timeline: Timeline) -> None:
        super().__init__()
        self._timeline = timeline

    def chunks(self, positions: int, weight: Tensor, kernel: str | None) -> Iterator[slice]:
        """The first two, and the last, which may be shorter; the work of those between is counted.

        Args, as of `Workspace.chunks`.
        """
        every = list(super().chunks(positions, weight, kernel))
        if len(every) <= TRACED:
            yield from every
            return
        work = self._timeline.work
        yield every[0]
        before = len(work)
        yield every[1]
        work += work[before:] * (len(every) - TRACED)
        yield every[-1]


def with_new_adapters(batches: list[MicroBatch]) -> list[MicroBatch]:
    """Of micro-batches in their order those with an adapter that none before them has."""
    chosen: list[MicroBatch] = []
    adapters: set[str | None] = set()
    for batch in batches:
        adapters_of_batch = {item.adapter for item in batch.items}
        if not adapters_of_batch <= adapters:
            chosen.append(batch)
        adapters |= adapters_of_batch
    return chosen
