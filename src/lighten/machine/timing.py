"""How long something takes: warmed up, synchronised, repeated until the figure is known."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LEVEL = 0.95


@dataclass(frozen=True)
class Timing:
    """Times of one thing, measured again and again.

    Attributes:
        samples: Seconds of each repeat, in order; repeats that warmed up are not among them.
        warmup: Repeats before the first that counts.
        bound: Spread that was wanted.
    """

    samples: tuple[float, ...]
    warmup: int
    bound: float

    @property
    def median(self) -> float:
        """In seconds."""
        return statistics.median(self.samples)

    @property
    def interval(self) -> tuple[float, float]:
        """An interval of 95 % for the median, from order statistics; of few samples, all of them.

        Source: Conover, Practical Nonparametric Statistics (3rd edition, 1999), section 3.2.
        """
        ordered = sorted(self.samples)
        omitted = _rank(len(ordered))
        return ordered[omitted], ordered[len(ordered) - 1 - omitted]

    @property
    def spread(self) -> float:
        """Half of the interval's width as a share of the median."""
        low, high = self.interval
        return (high - low) / 2 / self.median if self.median else math.inf

    @property
    def settled(self) -> bool:
        """Whether the spread came below its bound."""
        return len(self.samples) > 1 and self.spread <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        low, high = self.interval
        return {
            "median": self.median, "low": low, "high": high, "spread": self.spread,
            "repeats": len(self.samples), "warmup": self.warmup, "settled": self.settled,
            "bound": self.bound, "samples": list(self.samples),
        }  # fmt: skip


def _rank(count: int) -> int:
    """Samples to leave out at each end, so that the rest spans the median in 95 % of all cases."""
    omitted, below = 0, 0.0
    for place in range(count // 2):
        below += math.comb(count, place) * 0.5**count
        if 2 * below > 1 - LEVEL:
            break
        omitted = place
    return omitted


def measure_step(
    step: Callable[[], object],
    *,
    device: str = "cpu",
    warmup: int = 1,
    least: int = 5,
    most: int = 50,
    bound: float = 0.05,
    budget_s: float = 20.0,
) -> Timing:
    """Time a step until its median is known within a bound, or time or repeats run out.

    Args:
        step: What is timed.
        device: `cpu` or a CUDA device, which is waited for before and after each repeat.
        warmup: Repeats before the first that counts.
        least: Repeats that count, at least.
        most: At most.
        bound: Spread that is good enough, as a share of the median.
        budget_s: Seconds after which no repeat begins, `least` kept.

    Returns:
        All times; `settled` says whether the spread came below its bound.
    """
    for _ in range(warmup):
        step()
    synchronize(device)
    samples: list[float] = []
    ends = time.perf_counter() + budget_s
    while True:
        began = time.perf_counter()
        step()
        synchronize(device)
        samples.append(time.perf_counter() - began)
        timing = Timing(tuple(samples), warmup, bound)
        if len(samples) >= least and timing.settled:
            return timing
        if len(samples) >= most or (len(samples) >= least and time.perf_counter() >= ends):
            return timing


def synchronize(device: str) -> None:
    """Wait for what the device has been given."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
    elif device != "cpu" and "torch" in sys.modules:
        sys.modules["torch"].accelerator.synchronize()
