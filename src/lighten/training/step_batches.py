"""The micro-batches of each step: which rows of the epoch's order a rank trains on, laid out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lighten.data import lengths_of
from lighten.data.batches import Item, MicroBatch, collate, layout, steps_of_epoch
from lighten.engine.adapter_optimizer import AdapterOptimizer
from lighten.training.setup import Setup


class StepBatches:
    """Micro-batches of a run by step.

    Attributes:
        lengths: Tokens of each row.

    Args:
        setup: The run.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.lengths = lengths_of(setup.rows.train.rows)
        self._epochs: dict[tuple[int, int], list[list[int]]] = {}

    def of(
        self, step: int, adapters: Sequence[AdapterOptimizer], rank: int | None = None
    ) -> Iterator[MicroBatch]:
        """A rank's micro-batches of a step (None: this one's), each adapter in its own order."""
        setup, accelerator = self._setup, self._setup.accelerator
        rank = accelerator.process_index if rank is None else rank
        epoch, place = divmod(step, setup.steps_per_epoch)
        items = []
        for adapter in adapters:
            rows = self.steps(adapter.settings.seed, epoch)[place]
            of_rank = rows[rank :: accelerator.num_processes]
            items += [Item(adapter.name, row, step * len(self.lengths) + row) for row in of_rank]
        names = [adapter.name for adapter in adapters]
        packed = setup.objective.packs
        for part in layout(
            items,
            self.lengths,
            max_rows=setup.rows_per_microbatch,
            max_tokens=setup.tokens_per_microbatch,
            packed=packed,
            workers=setup.workers,
        ):
            yield collate(
                part, setup.rows.train.rows, names, packed=packed, device=accelerator.device
            )

    def idle(self, batches: Sequence[MicroBatch], adapter: AdapterOptimizer) -> list[MicroBatch]:
        """Micro-batches for the passes that this rank makes for the sake of others alone.

        Args:
            batches: This rank's own.
            adapter: Whose adapter is run through, with nothing to learn.
        """
        setup = self._setup
        missing = setup.strategy.passes(len(batches)) - len(batches)
        if not missing:
            return []
        row = min(range(len(self.lengths)), key=self.lengths.__getitem__)
        shortest = collate(
            [Item(adapter.name, row, 0)], setup.rows.train.rows, [adapter.name],
            packed=setup.objective.packs, device=setup.accelerator.device,
        )  # fmt: skip
        return [shortest] * missing

    def steps(self, seed: int, epoch: int) -> list[list[int]]:
        """The rows of each step of an epoch, over all ranks, in the order of a seed."""
        if (seed, epoch) not in self._epochs:
            self._epochs = {key: value for key, value in self._epochs.items() if key[1] == epoch}
            self._epochs[seed, epoch] = steps_of_epoch(
                self.lengths,
                self._setup.examples_per_step,
                seed=seed,
                epoch=epoch,
                group_by_length=self._setup.recipe.group_by_length,
            )
        return self._epochs[seed, epoch]
