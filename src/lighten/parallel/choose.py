"""Which strategy a recipe's `strategy` means for what learns and for so many ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator

from lighten.adapters import Trained
from lighten.parallel.gathered import Gathered
from lighten.parallel.offloaded.stores import Store
from lighten.parallel.sharded import Sharded
from lighten.parallel.strategies import SpreadState, Strategy
from lighten.parallel.streamed.over_ranks import RankFeed


def choose(
    strategy: str,
    accelerator: Accelerator,
    trained: Trained,
    weights_store: Callable[[], Store] | None = None,
    feed: Any = None,
) -> Strategy:
    """The strategy of a run, which goes with its number of ranks (`recipe.spread.require_ranks`).

    Args:
        strategy: `auto`, or a strategy by name.
        accelerator: The ranks.
        trained: What learns.
        weights_store: Makes what a rank's part of the weights waits in; None: they stay on its
            device.
        feed: What brings the base's layers, where they are not in memory.
    """
    if accelerator.num_processes == 1 and weights_store is None:
        return Strategy("single", accelerator)
    if strategy in ("auto", "ddp"):
        return Strategy("ddp", accelerator)
    if strategy == "zero1" or (strategy == "zero2" and not trained.learns_base):
        return SpreadState(strategy, accelerator)
    if isinstance(feed, RankFeed):
        return Gathered(strategy, accelerator, feed)
    return Sharded(strategy, accelerator, weights_store)
