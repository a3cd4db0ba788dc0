"""Rows that stand behind each other in one, so that no layer computes padding.

Only the attention needs them under each other: rows of like length are gathered, attended to
together and put back.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# A packed row this much shorter than the longest of its group starts another group.
ALIKE = 0.8


@dataclass(frozen=True)
class Group:
    """Packed rows of like length, to be laid under each other.

    Attributes:
        rows: How many.
        tokens: Of the longest.
        index: [rows · tokens] where each token stands in the packed row; padding repeats a row's
            last token.
        real: [real tokens] which of them are no padding.
    """

    rows: int
    tokens: int
    index: Tensor
    real: Tensor

    def gathered(self, x: Tensor) -> Tensor:
        """[1, heads, N, D] → [heads, rows, tokens, D]."""
        return x[0].index_select(1, self.index).unflatten(1, (self.rows, self.tokens))

    def put_back(self, x: Tensor, out: Tensor) -> None:
        """[heads, rows, tokens, D] → its places in [1, heads, N, D]."""
        flat = x.flatten(1, 2)
        if len(self.real) < len(self.index):
            flat = flat.index_select(1, self.real)
        out[0].index_copy_(1, self.index[self.real], flat)

    def without_padding(self, x: Tensor) -> Tensor:
        """[heads, rows, tokens, D] with zeros where it is padding."""
        if len(self.real) == len(self.index):
            return x
        mask = x.new_zeros(self.rows * self.tokens, 1)
        mask[self.real] = 1.0
        return x * mask.view(self.rows, self.tokens, 1)


@functools.lru_cache(maxsize=16)
def groups_of(starts: tuple[int, ...], device: torch.device | str = "cpu") -> tuple[Group, ...]:
    """Groups of rows of like length.

    Args:
        starts: Where each packed row begins, and the end of the last.
        device: Where the indices go.
    """
    rows = sorted(pairwise(starts), key=lambda row: row[0] - row[1])
    groups: list[list[tuple[int, int]]] = []
    for row in rows:
        longest = groups[-1][0][1] - groups[-1][0][0] if groups else 0
        if row[1] - row[0] < ALIKE * longest or not groups:
            groups.append([])
        groups[-1].append(row)
    packed_groups = []
    for group in groups:
        tokens = group[0][1] - group[0][0]
        places = torch.arange(tokens)
        index = torch.stack([(places + a).clamp_max(b - 1) for a, b in group])
        real = torch.stack([places < b - a for a, b in group]).flatten().nonzero()[:, 0]
        index, real = index.flatten().to(device), real.to(device)
        packed_groups.append(Group(len(group), tokens, index, real))
    return tuple(packed_groups)


@dataclass(frozen=True)
class Packing:
    """Rows that stand behind each other.

    Attributes:
        longest: Tokens of the longest.
        starts: Where each begins, and the end of the last.
    """

    longest: int
    starts: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Of all of them."""
        return self.starts[-1]


_packed: ContextVar[Packing | None] = ContextVar("packed", default=None)


@contextmanager
def packed(starts: Sequence[int] | None) -> Iterator[None]:
    """What runs inside attends within rows that stand behind each other in one.

    Args:
        starts: Where each row begins, and the end of the last; None: rows are not packed.
    """
    longest = max((b - a for a, b in pairwise(starts or ())), default=0)
    before = _packed.set(Packing(longest, tuple(starts)) if starts else None)
    try:
        yield
    finally:
        _packed.reset(before)


def packing() -> Packing | None:
    """The rows that `packed` says; None: they are not packed."""
    return _packed.get()


def starts_within(query: Tensor) -> tuple[int, ...] | None:
    """Where the packed rows begin that these queries are; None where they are not packed."""
    rows = _packed.get()
    fits = rows is not None and (query.shape[0], query.shape[2]) == (1, rows.tokens)
    return rows.starts if rows and fits else None
