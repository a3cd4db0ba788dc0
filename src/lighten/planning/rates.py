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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lighten import cpu, runs
from lighten.cpu import allocator
from lighten.machine.hardware import cache_folder, processor_name, versions
from lighten.planning.operation_cost import LINEAR_OF_ONEDNN, Shaped, Work, flops_of

# An operation larger than this, or one that would take longer, is timed with fewer rows. How fast
# products of a format are is first seen on one of so many operations: a format that the processor
# only emulates takes a hundred times as long as another.
MOST_FLOPS, MOST_BYTES, MOST_CALL_S = 2e10, 256 * 2**20, 0.15
FIRST_SIDE = 512
BUDGET_S, REPEATS = 0.02, 3
MOST_COPIED_BYTES = 32 * 2**20
# A plan takes more samples of what it knows least well until the sum is this sure (its standard
# error), at most for so many seconds. A single sample is taken to be so far off.
SURE, PATIENCE_S, UNSURE = 0.05, 2.0, 0.3
# What was never timed is timed for no longer than this in one plan, the largest part of the step
# first; the rest is taken to be as fast as what is most like it.
MOST_FIRST_S = 6.0
# Of how many samples a rate remembers; what is older than this counts as two of them.
MOST_SAMPLES, OLD_S, OF_OLD = 32, 300.0, 2
# What the interpreter, modules and autograd add to an operation of a step beside the operation's
# own dispatch, in calls of a function that does next to nothing: tiny models took 0.9 (full), 1.2
# to 1.6 (LoRA, QLoRA, cohorts) and 2.2 (gradient checkpointing).
CALLS_PER_OPERATION = 1.4
CALLS = 64  # of which one sample of it is made
FORMAT = 2  # of the file of rates
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
        times = [self._seconds_of(operation) for operation in work]
        return max(sum(times), LAUNCH_S * len(times))

    def _seconds_of(self, work: Work) -> float:
        rate = self.flops.get(str(work.dtype).removeprefix("torch."), min(self.flops.values()))
        return max(
            work.flops / (rate * REACHED_FLOPS), work.bytes / (self.bandwidth * REACHED_BANDWIDTH)
        )


@dataclass
class Rate:
    """Seconds per unit of one kind of operation: the mean of samples, of which the newest count.

    Attributes:
        mean: Of the samples.
        variance: Of single ones about it.
        count: How many they are, or count as.
        when: The newest, in seconds since the epoch.
    """

    mean: float = 0.0
    variance: float = 0.0
    count: int = 0
    when: float = 0.0

    def add(self, sample: float) -> None:
        """One more."""
        self.count = min(self.fresh() + 1, MOST_SAMPLES)
        off = sample - self.mean
        self.mean += off / self.count
        self.variance += (off * (sample - self.mean) - self.variance) / self.count
        self.when = time.time()

    def fresh(self) -> int:
        """How many samples it is worth now."""
        return self.count if time.time() - self.when < OLD_S else min(self.count, OF_OLD)

    def error(self) -> float:
        """The mean's standard error."""
        count = self.fresh()
        return math.sqrt((self.variance + (UNSURE * self.mean) ** 2 / count) / count)


class Measured:
    """This processor, each kind of operation timed when it is first met.

    As in training, freed pages stay with the process (`cpu/allocator`): without that, half of
    an operation's time is page faults. And as in training, workers work at the same time: each has
    its share of the cores, and all of them the same memory.

    Others may share the cores, or the machine below them: from one second to the next everything
    can take twice as long. The least time of each operation would then be a time that no step ever
    takes; the sum of mean times is the mean time of a step. So rates are means of samples, of which
    every plan takes more where those it has are few, old or far from each other.

    Args:
        path: Where rates are kept; None: nowhere.
        workers: Threads that do the operation side by side.
    """

    spread = 1.25

    def __init__(self, path: Path | None = None, workers: int = 1) -> None:
        self.path = path
        allocator.keep_pages("cpu")
        self.threads = torch.get_num_threads()
        threads = max(1, self.threads // workers)
        self._workers = [
            ThreadPoolExecutor(1, "worker", lambda: torch.set_num_threads(threads))
            for _ in range(workers)
        ]
        self.source = f"measured on this processor with {self.threads} thread(s)"
        self._stamp = [
            FORMAT, processor_name(), self.threads, workers, versions().get("torch"), cpu.enabled(),
        ]  # fmt: skip
        self._patience_s, self._first_s = PATIENCE_S, MOST_FIRST_S
        self._stand_ins: dict[str, Work] = {}
        self._flops: dict[torch.dtype, float] = {}
        self._rates = self._read()

    @classmethod
    def cached(cls, workers: int = 1) -> Measured:
        """With the rates of earlier plans."""
        return cls(cache_folder() / f"rates-{workers}.json", workers)

    def seconds(self, work: Iterable[Work]) -> float:
        """The sum of their times and of the interpreter's."""
        kinds = _kinds(work)
        missing = self._sample_missing(kinds)
        if self._until_sure(kinds) or missing:
            self._write()
        return sum(kind.amount * self._rate(key).mean for key, kind in kinds.items())

    def _sample_missing(self, kinds: Mapping[str, Kind]) -> bool:
        """Time what was never timed, the largest part first, while there is time for it."""
        missing = [key for key in kinds if key not in self._rates]
        missing.sort(key=lambda key: -kinds[key].expected_s)
        began = time.perf_counter()
        for key in missing:
            if time.perf_counter() - began < self._first_s or self._like(key) is None:
                self._sample(key, kinds[key].example)
        self._first_s -= time.perf_counter() - began
        return bool(missing)

    def _rate(self, key: str) -> Rate:
        """A kind's rate, or that of the one most like it, which is less sure."""
        like = key if key in self._rates else self._like(key)
        assert like is not None
        rate = self._rates[like]
        return rate if like == key else Rate(rate.mean, count=1, when=time.time())

    def _like(self, key: str) -> str | None:
        """The known kind of the same format and unit that is most like one."""
        kinds = [other for other in self._rates if _unit(other) == _unit(key)]
        name, size = key.partition("|")[0], _size(key)
        kinds.sort(key=lambda other: (other.partition("|")[0] != name, abs(_size(other) - size)))
        return kinds[0] if kinds else None

    def _most_flops(self, dtype: torch.dtype) -> float:
        """The largest product of a format that is timed."""
        if dtype not in self._flops:
            first = _product(dtype, FIRST_SIDE)
            self._flops[dtype] = first.flops / self._timed(first)
        return min(MOST_FLOPS, MOST_CALL_S * self._flops[dtype])

    def sample(self, work: Iterable[Work]) -> None:
        """Time each of their kinds once more."""
        for key, kind in _kinds(work).items():
            self._sample(key, kind.example)
        self._write()

    def _until_sure(self, kinds: Mapping[str, Kind]) -> bool:
        """Take samples of what adds most to the sum's error; whether there were any."""
        began, sampled = time.perf_counter(), False
        while kinds:
            rates = {key: self._rate(key) for key in kinds}
            total = sum(kind.amount * rates[key].mean for key, kind in kinds.items())
            errors = {key: kind.amount * rates[key].error() for key, kind in kinds.items()}
            late = time.perf_counter() - began > self._patience_s
            if late or math.hypot(*errors.values()) <= SURE * total:
                break
            worst = max(errors, key=lambda key: errors[key])
            self._sample(worst, kinds[worst].example)
            sampled = True
        self._patience_s -= time.perf_counter() - began
        return sampled

    def _sample(self, key: str, work: Work | None) -> None:
        """Time an operation once more; None: the interpreter."""
        rate = self._rates.setdefault(key, Rate())
        if work is None:
            rate.add(interpreted())
            return
        most = self._most_flops(work.dtype) if work.flops else MOST_FLOPS
        operation = self._stand_ins.get(key) or _smaller(work, most)
        try:
            seconds = self._timed(operation)
        except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError):
            # It does not work on numbers that mean nothing: taken to cost what its kind does.
            operation = self._stand_ins[key] = _product(work.dtype) if work.flops else _copy()
            seconds = self._timed(operation)
        rate.add(seconds / max(1, operation.flops or operation.bytes))

    def _timed(self, work: Work) -> float:
        futures = [worker.submit(timed, work) for worker in self._workers]
        return sum(future.result() for future in futures) / len(futures)

    def _read(self) -> dict[str, Rate]:
        if self.path is None:
            return {}
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
            if record["of"] != self._stamp:
                return {}
            return {key: Rate(**values) for key, values in record["rates"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _write(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rates = {key: asdict(rate) for key, rate in self._rates.items()}
            runs.write_json(self.path, {"of": self._stamp, "rates": rates})


@dataclass
class Kind:
    """Operations of one kind and class of size.

    Attributes:
        example: One of them; None: the interpreter's calls.
        amount: Of all, in the kind's units.
    """

    example: Work | None
    amount: float = 0.0

    @property
    def expected_s(self) -> float:
        """Roughly what they take, to begin with those that matter."""
        if self.example is None:
            return math.inf
        return self.amount / (1e11 if self.example.flops else 1e10)


def _kinds(work: Iterable[Work]) -> dict[str, Kind]:
    """Operations by kind and class of size, and the interpreter's calls for all of them."""
    kinds: dict[str, Kind] = {}
    for operation, times in Counter(work).items():
        kind = kinds.setdefault(_class_of(operation), Kind(operation))
        kind.amount += times * (operation.flops or operation.bytes)
        kinds.setdefault("interpreter", Kind(None)).amount += times * CALLS_PER_OPERATION
    return kinds


def key_of(work: Work) -> str:
    """The kind of an operation: what it is and in which format."""
    return f"{work.name}|{str(work.dtype).removeprefix('torch.')}"


def _class_of(work: Work) -> str:
    """Kind and size: a product's three sizes, another's bytes, in steps of √2 and 2; and layout."""
    turned = "".join("t" if x.turned() else "-" for x in work.operands)
    if work.flops:
        sizes = "x".join(
            str(round(2 * math.log2(max(1, n)))) for x in work.factors for n in x.shape
        )
        return f"{key_of(work)}|{sizes}|{turned}"
    return f"{key_of(work)}|{round(math.log2(max(1, work.bytes)))}|{turned}"


def _unit(key: str) -> tuple[str, ...]:
    """The format of a class and whether it counts operations or bytes; the interpreter's name."""
    parts = key.split("|")
    return (parts[1], "flops" if "x" in parts[2] else "bytes") if len(parts) > 1 else (key,)


def _size(key: str) -> int:
    """The size of a class, as a logarithm."""
    return sum(map(int, key.split("|")[2].split("x"))) if "|" in key else 0


def _copy() -> Work:
    flat = Shaped((MOST_BYTES // 8,), (1,), torch.uint8)
    clone = torch.ops.aten.clone.default
    return Work("aten::clone", 0, MOST_BYTES // 4, torch.uint8, clone, (flat,), {})


def _smaller(work: Work, most_flops: float | None = None) -> Work:
    """An operation as it is or, where that would take long, with fewer rows."""
    most_flops = most_flops or MOST_FLOPS
    if not work.flops:
        return _fewer_bytes(work)
    if work.flops <= most_flops:
        return work
    if [len(x.shape) for x in work.factors] == [2, 2]:
        a, b = work.factors
        rows = max(16, int(a.shape[0] * most_flops / work.flops))
        a = Shaped((rows, a.shape[1]), a.stride, a.dtype)
        flops = 2 * rows * math.prod(b.shape)
        if work.func is LINEAR_OF_ONEDNN:
            return replace(work, flops=flops, args=(a, *work.args[1:]))
        mm = torch.ops.aten.mm.default
        return replace(work, name="aten::mm", flops=flops, func=mm, args=(a, b), kwargs={})
    if len(work.operands[0].shape) == 4:
        return _shorter(work, most_flops)
    return _product(work.dtype)


def _fewer_bytes(work: Work) -> Work:
    """With fewer tensors where it takes lists of them, then with fewer rows; or a copy."""
    less = work
    while less.bytes > MOST_BYTES:
        share = MOST_BYTES / less.bytes
        longest = max((len(x) for x in less.args if _lists(x)), default=1)
        smaller = _fewer_tensors(less, longest, share) if longest > 1 else _fewer_rows(less, share)
        if smaller.bytes >= less.bytes:
            return _copy()
        less = smaller
    return less


def _lists(arg: Any) -> bool:
    return isinstance(arg, (list, tuple)) and any(isinstance(x, Shaped) for x in arg)


def _fewer_tensors(work: Work, length: int, share: float) -> Work:
    """The largest of each of the longest lists."""
    first = next(x for x in work.args if _lists(x) and len(x) == length)
    order = sorted(range(length), key=lambda place: -first[place].bytes)
    top = order[: max(1, int(length * share))]
    args = tuple([x[i] for i in top] if _lists(x) and len(x) == length else x for x in work.args)
    return _counted_anew(work, args, work.kwargs)


def _fewer_rows(work: Work, share: float) -> Work:
    """Of every tensor that is as long as the largest is along its first dimension."""
    largest = max(work.tensors, key=lambda x: math.prod(x.shape))
    axis = next((place for place, n in enumerate(largest.shape) if n > 1), 0)
    length = largest.shape[axis]
    rows = max(1, int(length * share))

    def cut(x: Shaped) -> Shaped:
        shape = list(x.shape)
        if len(shape) > axis and shape[axis] == length:
            shape[axis] = rows
        return Shaped(tuple(shape), x.stride, x.dtype)

    args, kwargs = tree_map_only(Shaped, cut, (work.args, dict(work.kwargs)))
    return _counted_anew(work, args, kwargs)


def _counted_anew(work: Work, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Work:
    """The operation on less; its results shrink as what it is given does."""
    changed = replace(work, args=args, kwargs=kwargs)
    before, now = (sum(x.bytes for x in each.tensors) for each in (work, changed))
    return replace(changed, bytes=work.bytes * now // max(1, before))


def _shorter(work: Work, most_flops: float) -> Work:
    """Attention over fewer tokens, in one row where several were packed."""
    rows, _, tokens, _ = work.operands[0].shape
    fewer = tokens

    def cut(x: Shaped) -> Shaped:
        shape = [
            (fewer if n == tokens else rows * fewer if n == rows * tokens else n) if place else n
            for place, n in enumerate(x.shape)
        ]
        return Shaped(tuple(shape), x.stride, x.dtype)

    smaller = work
    while smaller.flops > most_flops and fewer > 1:
        fewer //= 2
        args, kwargs = tree_map_only(Shaped, cut, (work.args, dict(work.kwargs)))
        args = tuple([] if isinstance(x, (list, tuple)) else x for x in args)
        smaller = replace(work, flops=flops_of(work.func, args, kwargs), args=args, kwargs=kwargs)
    return smaller


def _product(dtype: torch.dtype = torch.float32, side: int = 1024) -> Work:
    a = Shaped((side, side), (side, 1), dtype)
    return Work("aten::mm", 2 * side**3, 0, dtype, torch.ops.aten.mm.default, (a, a), {})


class _Called(torch.autograd.Function):
    """Next to nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The input plus one."""
        del ctx
        return x + 1.0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """The gradient plus one."""
        del ctx
        return grads[0] + 1.0


def interpreted() -> float:
    """Seconds of a call of autograd's through the interpreter, there or back."""
    with torch.enable_grad():
        x = start = torch.zeros(1, requires_grad=True)
        began = time.perf_counter()
        for _ in range(CALLS):
            x = _Called.apply(x)
        torch.autograd.grad(x, start)
    return (time.perf_counter() - began) / (2 * CALLS)


@torch.no_grad()
def timed(work: Work) -> float:
    """Seconds of an operation on real tensors: the mean of a few.

    Each time on other tensors: in a step, further operations have used the caches meanwhile.
    """
    sets = 1 + REPEATS if work.bytes <= MOST_COPIED_BYTES else 1
    copies = [
        tree_map_only(Shaped, Shaped.to_tensor, (work.args, dict(work.kwargs))) for _ in range(sets)
    ]
    args, kwargs = copies[0]
    result: Any = work.func(*args, **kwargs)  # the first call makes its kernel and its pages
    began, times = time.perf_counter(), 0
    while times < REPEATS and (not times or time.perf_counter() - began < BUDGET_S):
        times += 1
        args, kwargs = copies[times % sets]
        result = work.func(*args, **kwargs)
    seconds = (time.perf_counter() - began) / times
    del result
    return seconds
