"""A frozen base in few bits, spread over ranks: `fsdp` and `zero3` of adapters on a packed base.

PyTorch's `fully_shard` cuts weights by rows and knows nothing of packed numbers and their scales.
Here a layer's bytes are cut, and come together in a slot (`streamed/over_ranks.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator

from lighten.adapters import Trained
from lighten.parallel import ranks
from lighten.parallel.strategies import InStep, refuse_more
from lighten.parallel.streamed.over_ranks import RankFeed

Result = TypeVar("Result")


class Gathered(InStep):
    """Adapters are whole on every rank, the base's layers are brought by a `RankFeed`.

    Args:
        name: `fsdp` or `zero3`.
        accelerator: The ranks.
        feed: What brings the layers.
    """

    def __init__(self, name: str, accelerator: Accelerator, feed: RankFeed) -> None:
        super().__init__(name, accelerator)
        self._feed = feed

    def spread(self, trained: Trained) -> None:
        """The base was spread as it was read; see to it that it is."""
        del trained  # adapters stay whole
        count = self._accelerator.num_processes
        share = sum(-(-layer.bytes // count) for layer in self._feed.layers)
        refuse_more(self.name, "packed weights", held=self._feed.held_bytes, share=share)

    def within(self, work: Callable[[], Result]) -> Result:
        """A rank that has ended is told where layers are gathered."""
        with ranks.lost_within(self._accelerator.process_index, self._accelerator.num_processes):
            return work()

    def end_pass(self) -> None:
        """All ranks gather as many layers in a pass, whether they need them or not."""
        self._feed.end()

    def describe(self) -> str:
        """In words for the user."""
        feed = self._feed
        return (
            f"{len(feed.layers)} packed layers spread over {self._accelerator.num_processes} ranks "
            f"({feed.held_bytes / 2**30:.2f} of {feed.base_bytes / 2**30:.2f} GiB on each), "
            f"gathered once per pass, {feed.slot_bytes / 2**30:.2f} GiB for two of them"
        )
