"""Which strategy a recipe's `strategy` means for what learns and for so many ranks."""

from __future__ import annotations

from accelerate import Accelerator

from lighten.adapters import Trained
from lighten.errors import UserError
from lighten.parallel.sharded import Sharded
from lighten.parallel.strategies import SpreadState, Strategy


def choose(strategy: str, accelerator: Accelerator, trained: Trained) -> Strategy:
    """The strategy of a run.

    Args:
        strategy: `auto`, or a strategy by name.
        accelerator: The ranks.
        trained: What learns.

    Raises:
        UserError: One process is wanted and there are more.
    """
    count = accelerator.num_processes
    if strategy == "single" and count > 1:
        raise UserError(
            f"strategy: single trains in one process, but {count} ranks were started; leave it "
            "out, or start one"
        )
    if count == 1:
        return Strategy("single", accelerator)
    if strategy in ("auto", "ddp"):
        return Strategy("ddp", accelerator)
    if strategy == "zero1" or (strategy == "zero2" and not trained.learns_base):
        return SpreadState(strategy, accelerator)
    return Sharded(strategy, accelerator)
