"""What an allocator takes from the system for a timeline of blocks.

`CachingAllocator` is PyTorch's for CUDA devices. On a processor tensors are in an `Arena`
(`allocator/arena.cpp`) and the rest in the C library's heap; without a compiler all of it is there.
The first two are fed births and deaths in order; what they hold at most is what the device must
offer, and what of it no block uses is the allocator's overhead. Of the heap blocks are counted:
where its free pieces lie depends on small objects that no timeline has (docs/lab-notes.md).

Sources: pytorch/c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

from lighten.cpu.allocator.arena import LINE_BYTES

MIB = 2**20

# CUDACachingAllocator: every size is a multiple of 512 bytes; blocks up to 1 MiB come out of
# segments of 2 MiB, larger ones up to 10 MiB out of segments of 20 MiB, others out of their own,
# rounded to 2 MiB. What remains of a segment is split off if it is 512 bytes at least (small) or
# more than 1 MiB (large).
MIN_BLOCK, SMALL_SIZE = 512, MIB
SMALL_SEGMENT, LARGE_SEGMENT = 2 * MIB, 20 * MIB
MIN_LARGE, ROUND_LARGE = 10 * MIB, 2 * MIB


class Allocator(Protocol):
    """What hands out memory."""

    allocated: int
    held: int
    highest: int

    def take(self, size: int) -> object:
        """A block of so many bytes; the answer is what `give` wants back."""

    def give(self, block: object) -> None:
        """The block is free."""


@dataclass(eq=False)
class _Piece:
    """A stretch of a segment."""

    start: int
    size: int
    segment: int
    small: bool
    used: bool = False
    before: _Piece | None = None
    after: _Piece | None = None


class CachingAllocator:
    """PyTorch's allocator of CUDA memory, for one stream.

    Attributes:
        allocated: Bytes of blocks in use, rounded.
        held: Bytes of all segments.
        highest: The most that `held` was.
        most_allocated: The most that `allocated` was.
    """

    def __init__(self) -> None:
        self.allocated = self.held = self.highest = self.most_allocated = 0
        self._free: dict[bool, list[tuple[int, int, int, _Piece]]] = {True: [], False: []}
        self._segments = 0

    def take(self, size: int) -> _Piece | None:
        """The smallest free piece that holds the size, or one of a new segment."""
        if size == 0:
            return None
        size = rounded(size)
        small = size <= SMALL_SIZE
        free = self._free[small]
        place = bisect.bisect_left(free, (size,))
        if place < len(free):
            piece = free.pop(place)[-1]
        else:
            segment_bytes = segment_size(size)
            piece = _Piece(0, segment_bytes, self._segments, small)
            self._segments += 1
            self.held += segment_bytes
            self.highest = max(self.highest, self.held)
        unused = piece.size - size
        if unused >= MIN_BLOCK if small else unused > SMALL_SIZE:
            rest = _Piece(
                piece.start + size, unused, piece.segment, small, False, piece, piece.after
            )
            if piece.after is not None:
                piece.after.before = rest
            piece.after, piece.size = rest, size
            self._put(rest)
        piece.used = True
        self.allocated += piece.size
        self.most_allocated = max(self.most_allocated, self.allocated)
        return piece

    def give(self, block: object) -> None:
        """Free a piece and join it with free neighbours."""
        if block is None:
            return
        assert isinstance(block, _Piece)
        self.allocated -= block.size
        block.used = False
        for other, first in ((block.before, True), (block.after, False)):
            if other is None or other.used:
                continue
            self._drop(other)
            block.size += other.size
            if first:
                block.start, block.before = other.start, other.before
                if block.before is not None:
                    block.before.after = block
            else:
                block.after = other.after
                if block.after is not None:
                    block.after.before = block
        self._put(block)

    def _put(self, piece: _Piece) -> None:
        bisect.insort(self._free[piece.small], (piece.size, piece.segment, piece.start, piece))

    def _drop(self, piece: _Piece) -> None:
        free = self._free[piece.small]
        del free[bisect.bisect_left(free, (piece.size, piece.segment, piece.start))]


def rounded(size: int) -> int:
    """Bytes of the block that PyTorch makes of a request on a CUDA device."""
    return max(MIN_BLOCK, -(-size // MIN_BLOCK) * MIN_BLOCK)


def segment_size(size: int) -> int:
    """Bytes that PyTorch asks CUDA for where a block of a rounded size finds no room."""
    if size <= SMALL_SIZE:
        return SMALL_SEGMENT
    if size < MIN_LARGE:
        return LARGE_SEGMENT
    return -(-size // ROUND_LARGE) * ROUND_LARGE


PAGE = 4096


@dataclass
class Arena:
    """The arena of tensors' large blocks: best fit, free neighbours joined at once.

    A block takes whole lines of a cache and one more. A page counts from the first block that
    covers it, until it is given back.

    Attributes:
        allocated: Bytes of blocks in use.
        held: Bytes resident now.
        highest: The most that `held` was.
    """

    allocated: int = 0
    held: int = 0
    highest: int = 0
    _top: int = 0  # where what was never in use begins
    _touched: int = 0  # up to where pages were written
    _sizes: list[tuple[int, int]] = field(default_factory=list)
    _starts: dict[int, int] = field(default_factory=dict)
    _ends: dict[int, int] = field(default_factory=dict)
    _dry: list[tuple[int, int]] = field(default_factory=list)  # (start, end) without pages, sorted
    _dry_bytes: int = 0

    def take(self, size: int) -> tuple[int, int, int]:
        """(start, its own bytes, size) of a block."""
        needed = -(-size // LINE_BYTES) * LINE_BYTES + LINE_BYTES
        start, free_size = self._find_chunk(needed)
        if free_size > needed:
            self._put(start + needed, free_size - needed)
        if self._dry:
            self._write(start, start + needed)
        self.allocated += size
        self._count()
        return start, needed, size

    def give(self, block: object) -> None:
        """Free a block."""
        assert isinstance(block, tuple)
        start, needed, size = block
        self.allocated -= size
        self._put(start, needed)
        self._count()

    def trim(self) -> None:
        """Give the pages of all free chunks back."""
        self._touched = -(-self._top // PAGE) * PAGE
        pages = [(-(-start // PAGE) * PAGE, (start + size) // PAGE * PAGE)
                 for start, size in self._starts.items()]  # fmt: skip
        self._dry = sorted((start, end) for start, end in pages if start < end)
        self._dry_bytes = sum(end - start for start, end in self._dry)
        self._count()

    def _write(self, start: int, end: int) -> None:
        """Pages that were given back are there again."""
        first = max(0, bisect.bisect_left(self._dry, (start,)) - 1)
        last = bisect.bisect_left(self._dry, (end,))
        still_dry: list[tuple[int, int]] = []
        for low, high in self._dry[first:last]:
            wet = max(0, min(high, end) - max(low, start))
            self._dry_bytes -= wet
            if not wet:
                still_dry.append((low, high))
                continue
            still_dry += [
                (a, b) for a, b in ((low, min(high, start)), (max(low, end), high)) if a < b
            ]
        self._dry[first:last] = still_dry

    def _find_chunk(self, needed: int) -> tuple[int, int]:
        """The smallest free chunk that holds so much, or a piece of the top."""
        place = bisect.bisect_left(self._sizes, (needed,))
        if place < len(self._sizes):
            free_size, start = self._sizes[place]
            self._drop(start, free_size)
            return start, free_size
        start = self._top
        self._top += needed
        self._touched = max(self._touched, self._top)
        return start, needed

    def _count(self) -> None:
        self.held = self._touched - self._dry_bytes
        self.highest = max(self.highest, self.held)

    def _put(self, start: int, size: int) -> None:
        """A free chunk, joined with free neighbours and with the top."""
        if (before := self._ends.get(start)) is not None:
            neighbour_size = self._starts[before]
            self._drop(before, neighbour_size)
            start, size = before, size + neighbour_size
        if (neighbour_size := self._starts.get(start + size, 0)) > 0:
            self._drop(start + size, neighbour_size)
            size += neighbour_size
        if start + size == self._top:
            self._top = start
            return
        self._starts[start], self._ends[start + size] = size, start
        bisect.insort(self._sizes, (size, start))

    def _drop(self, start: int, size: int) -> None:
        del self._starts[start], self._ends[start + size]
        del self._sizes[bisect.bisect_left(self._sizes, (size, start))]


@dataclass(frozen=True)
class Held:
    """What an allocator held at most in a stretch of a timeline.

    Attributes:
        peak: The most that it had of the system.
        at: Index of the event where the most was in use; what it has it mostly keeps.
        allocated: Bytes in use then.
    """

    peak: int
    at: int
    allocated: int


@dataclass(frozen=True)
class Course:
    """What an allocator held after each event of a timeline.

    Attributes:
        held: Bytes taken from the system.
        allocated: Bytes in use.
    """

    held: list[int]
    allocated: list[int]

    def __add__(self, other: Course) -> Course:
        """Of two allocators that share a timeline's blocks."""
        return Course(
            [a + b for a, b in zip(self.held, other.held, strict=True)],
            [a + b for a, b in zip(self.allocated, other.allocated, strict=True)],
        )

    def most(self, start: int = 0, end: int | None = None) -> Held:
        """Between two events; of no event all is 0."""
        places = range(start, len(self.held) if end is None else end)
        if not places:
            return Held(0, 0, 0)
        at = max(places, key=self.allocated.__getitem__)
        return Held(max(self.held[start:end]), at, self.allocated[at])


def replay(
    allocator: Allocator,
    events: Iterable[tuple[int, bool, int]],
    trimmed: Collection[int] = (),
) -> Course:
    """Feed an allocator births and deaths.

    Args:
        allocator: New, or after what came before.
        events: (number of the block, whether it is born, bytes), in order; of no bytes: another
            allocator's.
        trimmed: Indices of events before which an arena's free pages are given back.
    """
    blocks: dict[int, object] = {}
    course = Course([], [])
    for place, (number, born, size) in enumerate(events):
        if place in trimmed and isinstance(allocator, Arena):
            allocator.trim()
        if not size:
            pass
        elif born:
            blocks[number] = allocator.take(size)
        else:
            allocator.give(blocks.pop(number))
        course.held.append(allocator.held)
        course.allocated.append(allocator.allocated)
    return course


def counted(events: Iterable[tuple[int, bool, int]], share: float = 0.0) -> Course:
    """What a heap holds whose free pieces nobody follows.

    Args:
        events: As of `replay`.
        share: What it holds beside its blocks, as a share of them.
    """
    allocated = list(accumulate(size if born else -size for _, born, size in events))
    return Course([int(size * (1 + share)) for size in allocated], allocated)
