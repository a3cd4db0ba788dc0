"""How far differences of runs' losses may be off: intervals that hold for all pairs at once."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from lighten.evaluation.bootstrap import LEVEL, Array, Resamples
from lighten.evaluation.metrics import mean_loss

# An interval for many comparisons at once looks at the far tails, which take more resamples.
SAMPLES = 4000


def reach(
    losses: Sequence[list[list[float]] | None], intervals: Sequence[tuple[float, float]]
) -> Array:
    """How far each difference of two losses may be off, [runs, runs]: 95 %, all at once.

    Every pair counts, for which loss is the lowest is a matter of chance too (Tukey's bounds); how
    they vary together is taken from a bootstrap that is paired over the examples. Where the losses
    of the examples are not known (`evaluation.json` before 0.1) standard errors have to do, which
    takes the runs for independent and so finds less. What is not known is not a number.

    Args:
        losses: Of each run, negative log-likelihood and tokens of each held-out example, if known.
        intervals: Of each run's loss; not numbers where there is none.
    """
    if all(losses):
        statistics = np.asarray(losses, float)
        if statistics.shape[1] < 2:  # a single example has no interval
            return np.full((len(losses),) * 2, np.nan)
        resamples = Resamples(statistics.shape[1], SAMPLES)
        return _reach_of(np.stack([mean_loss(resamples.sums(counts)) for counts in statistics]))
    quantile = NormalDist().inv_cdf((1 + LEVEL) / 2)
    errors = np.asarray([(high - low) / 2 / quantile for low, high in intervals])
    tail = (1 - LEVEL) / (len(losses) * (len(losses) - 1))  # of each pair, to either side
    independent: Array = NormalDist().inv_cdf(1 - tail) * np.hypot.outer(errors, errors)
    return independent


def _reach_of(drawn: Array) -> Array:
    """The same of losses on resamples, [runs, resamples]."""
    centred = drawn - drawn.mean(1, keepdims=True)
    spread = np.stack([(centred - ours).std(1, ddof=1) for ours in centred])
    largest = np.zeros(drawn.shape[1])
    for ours, deviations in zip(centred, spread, strict=True):
        others = deviations > 0
        if others.any():
            distances = np.abs(centred - ours)[others] / deviations[others, None]
            largest = np.maximum(largest, distances.max(0))
    paired: Array = np.quantile(largest, LEVEL) * spread
    return paired
