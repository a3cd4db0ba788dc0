"""How long the traced operations take: by rates measured here, or by a device's datasheet.

Here, each kind of operation is timed once per format and class of size, with the very arguments
that the trace saw, and the rate is kept in the user's cache folder. A datasheet knows only two
rates; what is made of them is said where it is shown.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map_only

from lighten import allocator, runs
from lighten.hardware import cache_folder, processor_name, versions
from lighten.models import kernels
from lighten.plan.work import Shaped, Work

# An operation larger than this is not timed: its rate is that of the largest timed of its kind.
MOST_FLOPS, MOST_BYTES = 4e9, 64 * 2**20
BUDGET_S, MOST_REPEATS = 0.02, 5
# A moment is good in which products of these sides take at most so many times what they ever took
# here; a plan waits this long, in all, for better ones. A neighbour may slow one format alone.
PACE_SIDES = {torch.float32: 384, torch.bfloat16: 768}
GOOD, PATIENCE_S = 1.2, 2.0
# What the interpreter, modules and autograd add to an operation of a step, beside the operation's
# own dispatch, which is timed with it (benchmarks/plan_accuracy.py).
INTERPRETER_S = 6e-6
# Of a datasheet's rates, what training steps reached on an H100 (benchmarks/gpu_suite.py), and what
# the host took there to launch one operation. It launches ahead of the device: the slower of the
# two decides how long a step takes.
REACHED_FLOPS, REACHED_BANDWIDTH, LAUNCH_S = 0.6, 0.7, 26e-6


class Rates(Protocol):
    """Seconds of operations."""

    source: str
    spread: float

    def seconds(self, work: Iterable[Work]) -> float:
        """Of all of them, one after the other."""


class Datasheet:
    """A device by its listed rates.

    Args:
        name: Of the device.
        flops: By format.
        bandwidth: Bytes per second.
    """

    spread = 2.0

    def __init__(self, name: str, flops: Mapping[str, float], bandwidth: float) -> None:
        self.flops, self.bandwidth = flops, bandwidth
        self.source = (
            f"{name}'s datasheet, of which {REACHED_FLOPS:.0%} of the arithmetic and "
            f"{REACHED_BANDWIDTH:.0%} of the bandwidth are taken to be reached: not measured"
        )

    def seconds(self, work: Iterable[Work]) -> float:
        """Arithmetic or memory of each operation; launches where they take longer than all."""
        found = [self._one(own) for own in work]
        return max(sum(found), LAUNCH_S * len(found))

    def _one(self, own: Work) -> float:
        rate = self.flops.get(str(own.dtype).removeprefix("torch."), min(self.flops.values()))
        return max(
            own.flops / (rate * REACHED_FLOPS), own.bytes / (self.bandwidth * REACHED_BANDWIDTH)
        )


class Measured:
    """This processor, each kind of operation timed when it is first met.

    As in training, freed pages stay with the process (`allocator.py`): without that, half of
    an operation's time is page faults. And as in training, lanes work at the same time: each has
    its share of the cores, and all of them the same memory.

    Others may share the cores, or the machine below them: for seconds everything takes twice as
    long. So products whose best time is known are timed before and after each operation, which is
    timed again if they were slow. What was never timed in a good moment is kept, but timed once
    more by the next plan.

    Attributes:
        best: Seconds of those products in the best moment so far, as `pace` gives them.

    Args:
        path: Where rates are kept; None: nowhere.
        lanes: Threads that do the operation side by side.
    """

    spread = 1.25

    def __init__(self, path: Path | None = None, lanes: int = 1) -> None:
        self.path = path
        allocator.keep_pages("cpu")
        self.threads = torch.get_num_threads()
        own = max(1, self.threads // lanes)
        self._lanes = [
            ThreadPoolExecutor(1, "lane", lambda: torch.set_num_threads(own)) for _ in range(lanes)
        ]
        self.source = f"measured on this processor with {self.threads} thread(s)"
        self._stamp = [processor_name(), self.threads, lanes, versions().get("torch")]
        self._pace = _pace_products()
        self._patience_s = PATIENCE_S
        self._known: dict[str, float] = {}
        self._doubted: dict[str, float] = {}  # timed in bad moments only
        self.best = math.inf
        self._read()
        self._fresh = False

    @classmethod
    def cached(cls, lanes: int = 1) -> Measured:
        """With the rates of earlier plans."""
        return cls(cache_folder() / f"rates-{lanes}.json", lanes)

    def seconds(self, work: Iterable[Work]) -> float:
        """The sum of their times and of the interpreter's."""
        total = 0.0
        for own, times in Counter(work).items():
            total += times * (self._one(own) + INTERPRETER_S)
        if self._fresh and self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            runs.write_json(self.path, {
                "of": self._stamp, "rates": self._known, "doubted": sorted(self._doubted),
                "pace": self.best,
            })  # fmt: skip
            self._fresh = False
        return total

    def _one(self, own: Work) -> float:
        amount = own.flops or own.bytes
        key = _class_of(own)
        if key not in self._known:
            large = own.flops > MOST_FLOPS or own.bytes > MOST_BYTES
            found = self._largest(own) if large else None
            if found is None:
                found, good = self._rate(_smaller(own) if large else own)
                found = min(found, self._doubted.pop(key, math.inf))
                if not good:
                    self._doubted[key] = found
                self._fresh = True
            self._known[key] = found
        return self._known[key] * amount

    def _largest(self, own: Work) -> float | None:
        """Seconds per unit of the largest timed of the same kind."""
        kind = key_of(own)
        alike = [key for key in self._known if key.startswith(f"{kind}|")]
        return None if not alike or own.flops else self._known[max(alike, key=_size_in)]

    def _rate(self, own: Work) -> tuple[float, bool]:
        """Seconds of one lane per operation, or per byte where there are none; and if it is so."""
        try:
            found, good = self._in_a_good_moment(own)
        except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError):
            # It does not work on numbers that mean nothing: taken to cost what its kind does.
            own = _product(own.dtype) if own.flops else _copy()
            found, good = self._in_a_good_moment(own)
        return found / max(1, own.flops or own.bytes), good

    def _in_a_good_moment(self, own: Work) -> tuple[float, bool]:
        """The least time of an operation, and whether nothing slowed it down."""
        least = math.inf
        while True:
            began = time.perf_counter()
            before = self._paced()
            least = min(least, self._timed(own))
            after = self._paced()
            self.best = min(self.best, before, after)
            if max(before, after) <= GOOD * self.best:
                return least, True
            self._patience_s -= time.perf_counter() - began
            if self._patience_s < 0.0:
                return least, False

    def _paced(self) -> float:
        return sum(self._timed(own) for own in self._pace)

    def _timed(self, own: Work) -> float:
        found = [lane.submit(timed, own) for lane in self._lanes]
        return sum(each.result() for each in found) / len(found)

    def _read(self) -> None:
        if self.path is None:
            return
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if found["of"] != self._stamp:
                return
            kept, doubted, self.best = found["rates"], set(found["doubted"]), found["pace"]
        except (OSError, ValueError, KeyError, TypeError):
            return
        now = self._paced()
        if now * GOOD < self.best:  # whatever is known was timed in a moment not as good
            doubted = set(kept)
        self._doubted = {key: rate for key, rate in kept.items() if key in doubted}
        self._known = {key: rate for key, rate in kept.items() if key not in doubted}


def key_of(own: Work) -> str:
    """The kind of an operation: what it is and in which format."""
    return f"{own.name}|{str(own.dtype).removeprefix('torch.')}"


def _class_of(own: Work) -> str:
    """Kind and size: a product's three sizes, another's bytes, in steps of √2 and 2."""
    if own.flops:
        sizes = "x".join(
            str(round(2 * math.log2(max(1, n)))) for shape in own.sizes[-2:] for n in shape
        )
        return f"{key_of(own)}|{sizes}"
    return f"{key_of(own)}|{round(math.log2(max(1, own.bytes)))}"


def _size_in(key: str) -> int:
    return int(key.rpartition("|")[2])


def _copy() -> Work:
    flat = Shaped((MOST_BYTES // 2,), (1,), torch.uint8)
    clone = torch.ops.aten.clone.default
    return Work("aten::clone", 0, MOST_BYTES, torch.uint8, clone, (flat,), {})


def _smaller(own: Work) -> Work:
    """A large operation with fewer rows: of a product its m, of any other a copy of its size."""
    sizes = own.sizes[-2:]
    aten = torch.ops.aten
    if own.flops and len(sizes) == 2 and all(len(shape) == 2 for shape in sizes):
        (m, k), n = sizes[0], sizes[1][1]
        rows = max(16, int(m * MOST_FLOPS / own.flops))
        a = Shaped((rows, k), (k, 1), own.dtype)
        b = Shaped((k, n), (n, 1), own.dtype)
        return Work("aten::mm", 2 * rows * k * n, 0, own.dtype, aten.mm.default, (a, b), {})
    return _product(own.dtype) if own.flops else _copy()


def _product(dtype: torch.dtype = torch.float32, side: int = 1024) -> Work:
    a = Shaped((side, side), (side, 1), dtype)
    return Work("aten::mm", 2 * side**3, 0, dtype, torch.ops.aten.mm.default, (a, a), {})


def _pace_products() -> list[Work]:
    """One for each format that the processor multiplies."""
    half = kernels.NEEDED in kernels.processor_flags()
    sides = {dtype: side for dtype, side in PACE_SIDES.items() if half or dtype == torch.float32}
    return [_product(dtype, side) for dtype, side in sides.items()]


def pace() -> float:
    """Seconds of the products by which moments of one machine are told apart."""
    return sum(timed(own) for own in _pace_products())


@torch.no_grad()
def timed(own: Work) -> float:
    """Seconds of an operation on real tensors: the least of a few.

    Whatever else the machine does at that moment only makes one longer.
    """
    args, kwargs = tree_map_only(Shaped, Shaped.made, (own.args, dict(own.kwargs)))
    found: list[float] = []
    began = time.perf_counter()
    result: Any = own.func(*args, **kwargs)  # the first call makes its kernel and its pages
    while len(found) < MOST_REPEATS and (not found or time.perf_counter() - began < BUDGET_S):
        start = time.perf_counter()
        result = own.func(*args, **kwargs)
        found.append(time.perf_counter() - start)
    del result
    return min(found)
