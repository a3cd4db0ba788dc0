"""Intervals by resampling examples: percentile bootstrap, paired over models.

Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; for corpus
metrics of text, Koehn, Statistical Significance Tests for Machine Translation Evaluation (2004).
An example's tokens are not independent, so whole examples are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
# From summed statistics [..., K] to the metric [...].
FromSums = Callable[[Array], Array]
LEVEL = 0.95
BLOCK_BYTES = 2**25  # of the numbers that one matrix product reads


@dataclass(frozen=True)
class Estimate:
    """A metric with its uncertainty.

    Attributes:
        value: On all examples.
        se: Standard deviation over the resamples; None of one example, which has no spread.
        low: Lower end of the 95 % interval, None like `se`.
        high: Upper end.
    """

    value: float
    se: float | None
    low: float | None
    high: float | None

    def to_dict(self) -> dict[str, float | None]:
        """Plain values, for JSON."""
        return asdict(self)


class Resamples:
    """The same draws of examples for every model and metric, so that differences are paired.

    Args:
        examples: How many there are.
        samples: How many times they are drawn.
        seed: Seed of the draws.
    """

    def __init__(self, examples: int, samples: int, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        # How often each example was drawn: sums over draws become a matrix product. That is seldom
        # more than ten times, so a byte is enough but for draws that no test will ever see.
        self._times = np.empty((samples, examples), np.uint8)
        for place in range(samples):
            times = np.bincount(generator.integers(0, examples, examples), minlength=examples)
            if times.max() > np.iinfo(self._times.dtype).max:
                self._times = self._times.astype(np.int64)
            self._times[place] = times

    def sums(self, statistics: Array) -> Array:
        """Per-example statistics [examples, K] summed over each resample, [samples, K]."""
        samples, examples = self._times.shape
        summed = []
        rows = max(1, BLOCK_BYTES // (8 * examples))
        for start in range(0, samples, rows):
            times = self._times[start : start + rows]
            summed.append(times.astype(np.result_type(np.int64, statistics)) @ statistics)
        return np.concatenate(summed)

    def estimate(self, statistics: Array, metric: FromSums) -> Estimate:
        """A metric of summed per-example statistics [examples, K]."""
        return self._estimate(float(metric(statistics.sum(0))), metric(self.sums(statistics)))

    def difference(self, ours: Array, base: Array, metric: FromSums) -> Estimate:
        """The metric of `ours` minus that of `base`, on the same draws."""
        value = float(metric(ours.sum(0)) - metric(base.sum(0)))
        return self._estimate(value, metric(self.sums(ours)) - metric(self.sums(base)))

    def _estimate(self, value: float, values: Array) -> Estimate:
        if self._times.shape[1] < 2:
            return Estimate(value, None, None, None)
        low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Estimate(value, float(values.std(ddof=1)), float(low), float(high))


def student(level: float, freedom: float) -> float:
    """Quantile of Student's t distribution; the normal one for infinitely many degrees.

    Read off the distribution function, which is summed by Simpson's rule over the angle whose
    tangent is t / sqrt(freedom); degrees of freedom need not be whole.
    """
    if math.isinf(freedom) or freedom > 1e4:
        return NormalDist().inv_cdf(level)
    freedom = max(freedom, 1.0)
    # With t = sqrt(n) tan(a) the density becomes cos(a)^(n - 1), up to its normalisation.
    angles = np.linspace(0.0, math.pi / 2, 20001)
    heights = np.cos(angles) ** (freedom - 1)
    step = angles[1]
    pairs = (heights[:-2:2] + 4 * heights[1:-1:2] + heights[2::2]) * step / 3
    area = np.concatenate([[0.0], np.cumsum(pairs)])
    angle = float(np.interp((2 * level - 1) * area[-1], area, angles[::2]))
    return math.sqrt(freedom) * math.tan(angle)
