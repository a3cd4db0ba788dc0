"""How the C library hands out memory while training on a processor.

glibc gives a block above its threshold (32 MiB at most) back to the system as soon as it is free,
and the top of its heap with it, so every micro-batch pays for its activations' pages anew. Blocks
kept in the heap are paid for once. Tensors have an arena beside that heap where a compiler can make
one: among small objects their blocks leave holes.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from lighten import cpu
from lighten.cpu.allocator import arena
from lighten.machine import heap
from lighten.machine.hardware import Choice, PeakMemory

# mallopt's parameters, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8
# Larger than any activation; before glibc 2.35 no threshold above half a heap is taken.
LARGE_BYTES, OLD_LARGE_BYTES = 2**30, 32 * 2**20
NEVER_BYTES = 2**31 - 1  # the largest int: the heap's top is not given back by itself
# The heap grows by this much at once, so that its top seldom has to move.
GROWTH_BYTES = 64 * 2**20
# While a base is quantised, blocks above glibc's first threshold are given back at once.
QUANTISING_BYTES = 256 * 2**10
# As high as glibc sets both by itself.
ADAPTED = ((M_MMAP_THRESHOLD, 32 * 2**20), (M_TRIM_THRESHOLD, 64 * 2**20))
OTHER_ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
# Products are kept by shape, 1024 of them by default, by oneDNN and once more for each thread by
# PyTorch's layer over it (ideep's `lru_cache`); training rarely sees a shape again after its
# micro-batch, in which every layer uses it. Each of the latter holds some 0.4 MiB: without a limit
# a run grew by 19 MiB per step (docs/lab-notes.md).
CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "32"}

# A process that holds this many times what a step needs has piled up holes.
PILED_UP = 1.25
# Steps until everything that stays (the optimiser's state) is there.
FIRST_STEPS = 2

_thresholds: list[tuple[int, int]] = []  # what `keep_pages` set, once it was called


def keep_pages(device: str) -> Choice:
    """Let freed activations stay with the process, to be written again without page faults.

    For the whole process, and without effect on any result. Call it before the model loads.

    Args:
        device: `cpu` or a CUDA device.

    Returns:
        `arena, pages kept`, `glibc, pages kept` with the reason, or `as it is` with the reason.
    """
    if device != "cpu":
        return Choice("as it is", "activations are on the GPU")
    if not cpu.enabled():
        return Choice("as it is", cpu.OFF)
    for name, capacity in CACHES.items():
        os.environ.setdefault(name, capacity)  # read at the first product
    libc = heap.glibc()
    if libc is None:
        return Choice("as it is", "the C library is not glibc")
    if (named := _chosen_by_user()) is not None:
        return Choice("as it is", f"{named} is set")
    large = LARGE_BYTES if libc.mallopt(M_MMAP_THRESHOLD, LARGE_BYTES) else OLD_LARGE_BYTES
    _thresholds[:] = [(M_MMAP_THRESHOLD, large), (M_TRIM_THRESHOLD, NEVER_BYTES)]
    accepted = all(libc.mallopt(parameter, size) for parameter, size in _thresholds)
    # Workers share the one heap whose top is kept: a thread's own arena gives its pages back, and
    # takes no block above 64 MiB.
    accepted = accepted and libc.mallopt(M_ARENA_MAX, 1)
    if not (accepted and libc.mallopt(M_TOP_PAD, GROWTH_BYTES)):
        return Choice("as it is", "glibc did not take the thresholds")
    why = "fresh pages for every micro-batch's activations cost time"
    if arena.opened():
        return Choice("arena, pages kept", f"{why}, holes between small objects memory")
    none = arena.obstacle() or "no address space could be reserved"
    return Choice("glibc, pages kept", f"{why}; no arena for tensors: {none}")


def has_arena() -> bool:
    """Whether tensors of a training here would be in the arena."""
    return heap.glibc() is not None and _chosen_by_user() is None and arena.obstacle() is None


def trim() -> bool:
    """Give free memory back to the system; say whether the heap had any (glibc only).

    What is written next pays for its pages again: for use between phases, not after each step.
    """
    arena.trim()
    return heap.trim()


def measure_peak(device: str) -> PeakMemory:
    """A measurement of the peak from here on, with all free memory given back first.

    What an earlier run, plan or evaluation of this process left free would be used again,
    uncounted.

    Args:
        device: `cpu` or a CUDA device.
    """
    gc.collect()
    trim()
    return PeakMemory(device)


class KeptPages:
    """Sees to it that the pages kept between steps do not pile up (glibc only).

    Steps differ in shape: their blocks leave holes that no later block fits, and what stays of a
    step (a kernel made for its shape) pins them apart. A run of a hundred steps came to hold twice
    what any of its steps needs (docs/lab-notes.md). So free pages are given back between phases,
    and between steps where they have grown by a quarter.

    Args:
        device: What is trained on: `cpu` or `cuda`.
    """

    def __init__(self, device: str) -> None:
        self._on = device == "cpu" and bool(_thresholds)
        self._needed, self._settling = 0, FIRST_STEPS

    def after_step(self) -> None:
        """Look at what is held, and give back what is too much."""
        if not self._on:
            return
        held = psutil.Process().memory_info().rss
        if self._settling:
            self._settling -= 1
            self._needed = max(self._needed, held)
        elif held > PILED_UP * self._needed:
            self.give_back()

    def give_back(self) -> None:
        """Another phase begins, whose blocks are of other sizes."""
        if self._on:
            trim()
            self._settling = max(self._settling, 1)


@contextmanager
def temporaries_given_back() -> Iterator[None]:
    """Quantising inside returns its temporaries to the system at once (glibc only).

    glibc keeps freed pieces of some megabytes and lays the small quantised weights between them,
    so that memory would grow to several times the model. Afterwards the thresholds are what
    `keep_pages` made them, or as high as glibc's own adaptation lets them become.
    """
    libc = heap.glibc()
    if libc is None or _chosen_by_user() is not None or not cpu.enabled():
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, QUANTISING_BYTES)
    arena.use(False)
    try:
        yield
    finally:
        arena.use(True)
        for parameter, size in _thresholds or ADAPTED:
            libc.mallopt(parameter, size)


def _chosen_by_user() -> str | None:
    """The environment variable by which someone has arranged the allocator already."""
    for name in SETTINGS:
        if name in os.environ:
            return name
    if "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return "GLIBC_TUNABLES"
    preloaded = os.environ.get("LD_PRELOAD", "")
    return "LD_PRELOAD" if any(name in preloaded for name in OTHER_ALLOCATORS) else None
