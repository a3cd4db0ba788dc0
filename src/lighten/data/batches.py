"""From encoded rows to optimiser steps and micro-batches.

Dimensions: B rows, T tokens of the longest row, N tokens of a packed micro-batch, S supervised
positions. Which examples make a step is a pure function of the seed and the epoch, so a resumed run
needs no saved sampler. How a step is cut into micro-batches, padded or packed, changes memory and
speed, never the result: the loss is normalised over the whole step.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heapreplace
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

# Rows are sorted by length within this many steps' worth of shuffled rows: enough to pair rows
# of like length, few enough that the order stays random.
WINDOW_STEPS = 16
# What a micro-batch costs beside its tokens, in tokens: each product has to read its weight and to
# get going (docs/lab-notes.md).
START_TOKENS = 300


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

    adapter: str | None
    row: int
    key: int


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together, ordered by adapter.

    They stand under each other, right-padded, or behind each other, packed.

    Attributes:
        items: The rows, in the batch's order.
        input_ids: [B, T] int64; packed [1, N].
        lengths: Real tokens per row.
        positions: [S] where, in the flattened ids, a supervised token is predicted.
        labels: [S] the supervised tokens themselves.
        supervised_before: B + 1 numbers: supervised positions before each row, then all.
        starts: Packed: where each row begins, and where the last one ends.
        position_ids: Packed: [1, N], from 0 in every row.
    """

    items: tuple[Item, ...]
    input_ids: Tensor
    lengths: tuple[int, ...]
    positions: Tensor
    labels: Tensor
    supervised_before: tuple[int, ...]
    starts: tuple[int, ...] | None = None
    position_ids: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Real tokens, without padding."""
        return sum(self.lengths)

    def supervised_in(self, start: int, stop: int) -> int:
        """Supervised positions in the rows [start, stop)."""
        return self.supervised_before[stop] - self.supervised_before[start]

    def thinned(self, rows: int, most: int) -> MicroBatch:
        """The same batch with fewer supervised positions, spread evenly.

        Args:
            rows: Rows that keep any, at most.
            most: Positions that each of these keeps, at most.
        """
        kept_positions: list[int] = []
        before = [0]
        spans = list(pairwise(self.supervised_before))
        supervised_rows = [row for row, (start, stop) in enumerate(spans) if stop > start]
        supervised_rows = supervised_rows[:: -(-len(supervised_rows) // rows) or 1]
        for row, (start, stop) in enumerate(spans):
            count = min(most, stop - start) if row in supervised_rows else 0
            kept_positions += [start + i * (stop - start) // count for i in range(count)]
            before.append(len(kept_positions))
        chosen = torch.tensor(kept_positions, dtype=torch.long, device=self.positions.device)
        return replace(
            self, positions=self.positions[chosen], labels=self.labels[chosen],
            supervised_before=tuple(before),
        )  # fmt: skip

    def alone(self, row: int) -> MicroBatch:
        """One row by itself, without padding."""
        start = row * self.input_ids.shape[1] if self.starts is None else self.starts[row]
        length = self.lengths[row]
        span = slice(self.supervised_before[row], self.supervised_before[row + 1])
        return MicroBatch(
            items=self.items[row : row + 1],
            input_ids=self.input_ids.flatten()[start : start + length][None],
            lengths=(length,),
            positions=self.positions[span] - start,
            labels=self.labels[span],
            supervised_before=(0, span.stop - span.start),
        )

    def padded(self) -> MicroBatch:
        """The same rows under each other."""
        if self.starts is None:
            return self
        rows = len(self.lengths)
        width = max(self.lengths)
        ids = self.input_ids.new_zeros(rows, width)
        positions = self.positions.clone()
        for row, (start, length) in enumerate(zip(self.starts, self.lengths, strict=False)):
            ids[row, :length] = self.input_ids[0, start : start + length]
            span = slice(self.supervised_before[row], self.supervised_before[row + 1])
            positions[span] += row * width - start
        return replace(self, input_ids=ids, positions=positions, starts=None, position_ids=None)


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
    packed: bool = False,
    workers: int = 1,
) -> list[list[Item]]:
    """Cut a step's rows into micro-batches: padded ones of like length, packed ones of like size.

    Largest first, so that memory peaks in the first micro-batch and not at a later one.

    Args:
        items: The step's rows, of all adapters.
        lengths: Tokens of each row of the data.
        max_rows: Rows per micro-batch at most.
        max_tokens: Tokens per micro-batch at most, padding included; a longer row goes alone.
        packed: Rows will stand behind each other, without padding.
        workers: As many micro-batches will be trained side by side.
    """
    longest_first = sorted(items, key=lambda item: -lengths[item.row])
    if packed:
        return _even(longest_first, lengths, max_rows, max_tokens, workers)
    if workers > 1:
        return _side_by_side(longest_first, lengths, max_rows, max_tokens, workers)
    return _alike(longest_first, lengths, max_rows, max_tokens)


def even_shares(tokens: Sequence[int], workers: int) -> list[list[int]]:
    """Which micro-batches each worker has: every one goes where the least is to do.

    Args:
        tokens: Of each micro-batch, padding included.
        workers: How many there are; none stays without one while there are enough.
    """
    shares: list[list[int]] = [[] for _ in range(min(workers, len(tokens)))]
    filled = [0] * len(shares)
    for place in sorted(range(len(tokens)), key=lambda place: -tokens[place]):
        worker = min(range(len(shares)), key=lambda worker: filled[worker])
        shares[worker].append(place)
        filled[worker] += tokens[place] + START_TOKENS
    return shares


def _alike(
    longest_first: Sequence[Item], lengths: Sequence[int], max_rows: int, max_tokens: int | None
) -> list[list[Item]]:
    """As few micro-batches of neighbours as keep to the budgets."""
    batches: list[list[Item]] = []
    longest = 0
    for item in longest_first:
        rows = len(batches[-1]) + 1 if batches else 1
        over = max_tokens is not None and rows * longest > max_tokens
        if not batches or rows > max_rows or over:
            batches.append([])
            longest = lengths[item.row]
        batches[-1].append(item)
    return batches


def _side_by_side(
    longest_first: Sequence[Item],
    lengths: Sequence[int],
    max_rows: int,
    max_tokens: int | None,
    workers: int,
) -> list[list[Item]]:
    """Micro-batches of neighbours, cut so that the slowest worker ends first.

    Tried is, for each of a few counts, the cut whose largest micro-batch is smallest: rows of a
    real text take 1 % longer than with the best cut of all (docs/lab-notes.md).
    """

    def cut(room: int) -> list[list[Item]]:
        return _alike(longest_first, lengths, max_rows, room)

    def padded(part: Sequence[Item]) -> int:
        return len(part) * lengths[part[0].row]

    def slowest(parts: list[list[Item]]) -> int:
        tokens = [padded(part) for part in parts]
        shares = even_shares(tokens, workers)
        return max(sum(tokens[place] + START_TOKENS for place in share) for share in shares)

    if not longest_first:
        return []
    room = padded(longest_first) if max_tokens is None else max_tokens
    fewest = len(cut(room))
    cuts = [
        cut(bisect_left(range(room), -count, key=lambda size: -len(cut(size))))
        for count in range(fewest, fewest + 2 * workers)
    ]
    best = min(cuts, key=slowest)
    return sorted(best, key=lambda part: -padded(part))


def _even(
    longest_first: Sequence[Item],
    lengths: Sequence[int],
    max_rows: int,
    max_tokens: int | None,
    workers: int,
) -> list[list[Item]]:
    """As few micro-batches as hold the rows and fill the workers, each with about as many tokens.

    Each row goes where the fewest tokens are (the LPT rule of scheduling, Graham 1969).
    """
    total = sum(lengths[item.row] for item in longest_first)
    room = total if max_tokens is None else max_tokens
    count = max(1, -(-len(longest_first) // max_rows), -(-total // room))
    for number, item in enumerate(longest_first, 1):
        # Of rows that are all as long as this one or longer, a micro-batch holds no more.
        count = max(count, -(-number // max(1, room // max(1, lengths[item.row]))))
    while True:
        count += -count % workers
        parts: list[list[Item]] = [[] for _ in range(count)]
        emptiest = [(0, place) for place in range(count)]  # a heap
        fits = True
        for item in longest_first:
            filled, place = emptiest[0]
            part = parts[place]
            fits = not part or filled + lengths[item.row] <= room
            if not fits:
                break
            part.append(item)
            if len(part) < max_rows:
                heapreplace(emptiest, (filled + lengths[item.row], place))
            else:
                heappop(emptiest)
        if fits:
            tokens = [sum(lengths[item.row] for item in part) for part in parts]
            order = sorted(range(count), key=lambda place: -tokens[place])
            return [parts[place] for place in order if parts[place]]
        # One by one would take hours where there are very many.
        count += max(1, count // 100)


def collate(
    items: Sequence[Item],
    rows: Sequence[TokenRow],
    adapters: Sequence[str | None],
    *,
    packed: bool = False,
    device: torch.device | str = "cpu",
) -> MicroBatch:
    """Make a micro-batch; rows of one adapter stand together.

    Args:
        items: The rows and their adapters.
        rows: The encoded data that `Item.row` counts in.
        adapters: The adapters in their order.
        packed: Rows behind each other in place of under each other.
        device: Where the tensors go.
    """
    rank = {adapter: place for place, adapter in enumerate(adapters)}
    items = sorted(items, key=lambda item: rank[item.adapter])
    lengths = [len(rows[item.row].input_ids) for item in items]
    width = max(lengths)
    if packed:
        starts = [0, *np.cumsum(lengths).tolist()]
    else:
        starts = [place * width for place in range(len(items) + 1)]
    size = starts[-1]
    # What stands right of a row is never attended to and never supervised (trap 11).
    ids = np.zeros(size, dtype=np.int64)
    supervised = np.zeros(size, dtype=bool)
    supervised_before = [0]
    for item, start, length in zip(items, starts, lengths, strict=False):
        ids[start : start + length] = rows[item.row].input_ids
        # Nothing stands before a row's first token to predict it from (trap 22).
        supervised[start + 1 : start + length] = rows[item.row].supervised[1:]
        supervised_before.append(
            supervised_before[-1] + int(supervised[start : start + length].sum())
        )
    targets = np.flatnonzero(supervised)
    # Packed rows count from 0 each.
    position = np.arange(size) - np.repeat(starts[:-1], lengths) if packed else None
    shape = (1, size) if packed else (len(items), width)
    return MicroBatch(
        items=tuple(items),
        input_ids=torch.from_numpy(ids.reshape(shape)).to(device),
        lengths=tuple(lengths),
        positions=torch.from_numpy(targets - 1).to(device),
        labels=torch.from_numpy(ids[targets]).to(device),
        supervised_before=tuple(supervised_before),
        starts=tuple(starts) if packed else None,
        position_ids=None if position is None else torch.from_numpy(position[None]).to(device),
    )
