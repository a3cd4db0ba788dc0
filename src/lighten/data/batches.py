"""From encoded rows to optimiser steps and micro-batches.

Dimensions: B rows, T tokens of the longest row, S supervised positions. Which examples make a
step is a pure function of the seed and the epoch, so a resumed run needs no saved sampler. How a
step is cut into micro-batches changes memory and speed, never the result: the loss is normalised
over the whole step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

# Rows are sorted by length within this many steps' worth of shuffled rows: enough to pair rows
# of like length, few enough that the order stays random.
WINDOW_STEPS = 16


class TokenRow(Protocol):
    """What batching needs of an encoded row."""

    @property
    def input_ids(self) -> Sequence[int]:
        """Token ids, [T]."""

    @property
    def supervised(self) -> Sequence[bool]:
        """Whether each token is a target, [T]; the first never is."""


class Item(NamedTuple):
    """One row of one step: which adapter trains on it, and a number naming row and step."""

    member: str | None
    row: int
    key: int


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together, right-padded, ordered by adapter.

    Attributes:
        items: The rows, in the batch's order.
        input_ids: [B, T] int64.
        lengths: Real tokens per row.
        positions: [S] where, in the flattened [B · T], a supervised token is predicted.
        labels: [S] the supervised tokens themselves.
        supervised_before: B + 1 numbers: supervised positions before each row, then all.
    """

    items: tuple[Item, ...]
    input_ids: Tensor
    lengths: tuple[int, ...]
    positions: Tensor
    labels: Tensor
    supervised_before: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Real tokens, without padding."""
        return sum(self.lengths)

    def supervised_in(self, start: int, stop: int) -> int:
        """Supervised positions in the rows [start, stop)."""
        return self.supervised_before[stop] - self.supervised_before[start]


def steps_of_epoch(
    lengths: Sequence[int],
    examples_per_step: int,
    *,
    seed: int,
    epoch: int,
    group_by_length: bool = True,
) -> list[list[int]]:
    """Which rows make each optimiser step of an epoch; the last step may be smaller.

    Args:
        lengths: Tokens of each row.
        examples_per_step: Rows per optimiser step, over all ranks.
        seed: Seed of the order.
        epoch: Which pass over the data, from 0.
        group_by_length: Bring rows of like length together, within windows of the shuffled rows.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths)).tolist()
    if not group_by_length:
        return [order[i : i + examples_per_step] for i in range(0, len(order), examples_per_step)]
    window = WINDOW_STEPS * examples_per_step
    steps: list[list[int]] = []
    for start in range(0, len(order), window):
        rows = sorted(order[start : start + window], key=lambda row: (lengths[row], row))
        cut = [rows[i : i + examples_per_step] for i in range(0, len(rows), examples_per_step)]
        steps += [cut[i] for i in generator.permutation(len(cut))]
    # A partial step stays last, as users of any other trainer expect.
    return sorted(steps, key=lambda step: len(step) < examples_per_step)


def layout(
    items: Sequence[Item],
    lengths: Sequence[int],
    *,
    max_rows: int,
    max_tokens: int | None = None,
) -> list[list[Item]]:
    """Cut a step's rows into micro-batches of like length, longest first.

    Longest first, so that memory peaks in the first micro-batch and not at a later one.

    Args:
        items: The step's rows, of all adapters.
        lengths: Tokens of each row of the data.
        max_rows: Rows per micro-batch at most.
        max_tokens: Padded tokens per micro-batch at most; a longer row goes alone.
    """
    batches: list[list[Item]] = []
    longest = 0
    for item in sorted(items, key=lambda item: -lengths[item.row]):
        rows = len(batches[-1]) + 1 if batches else 1
        over = max_tokens is not None and rows * longest > max_tokens
        if not batches or rows > max_rows or over:
            batches.append([])
            longest = lengths[item.row]
        batches[-1].append(item)
    return batches


def collate(
    items: Sequence[Item],
    rows: Sequence[TokenRow],
    members: Sequence[str | None],
    *,
    pad_id: int = 0,
    device: torch.device | str = "cpu",
) -> MicroBatch:
    """Pad a micro-batch to its longest row; rows of one adapter stand together.

    Args:
        items: The rows and their adapters.
        rows: The encoded data that `Item.row` counts in.
        members: The adapters in their order.
        pad_id: What stands right of a row; it is never attended to and never supervised.
        device: Where the tensors go.
    """
    rank = {member: place for place, member in enumerate(members)}
    items = sorted(items, key=lambda item: rank[item.member])
    lengths = [len(rows[item.row].input_ids) for item in items]
    width = max(lengths)
    ids = np.full((len(items), width), pad_id, dtype=np.int64)
    wanted = np.zeros((len(items), width), dtype=bool)
    for place, (item, length) in enumerate(zip(items, lengths, strict=True)):
        ids[place, :length] = rows[item.row].input_ids
        wanted[place, :length] = rows[item.row].supervised
    wanted[:, 0] = False  # nothing stands before the first token to predict it from
    where = np.flatnonzero(wanted)
    return MicroBatch(
        items=tuple(items),
        input_ids=torch.from_numpy(ids).to(device),
        lengths=tuple(lengths),
        positions=torch.from_numpy(where - 1).to(device),
        labels=torch.from_numpy(ids.reshape(-1)[where]).to(device),
        supervised_before=(0, *np.cumsum(wanted.sum(1)).tolist()),
    )
