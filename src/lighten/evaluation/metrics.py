"""The metrics of an evaluation, each as per-example statistics that can be summed.

BLEU and chrF are sacrebleu's own: what it counts per sentence is summed, and its own formula
turns the sums into the corpus score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from lighten.evaluation.bootstrap import Array, FromSums


@dataclass(frozen=True)
class Metric:
    """How to read one metric.

    Attributes:
        name: As in `evaluation.json`.
        label: As people read it.
        lower_is_better: Whether less is more (trap 45).
    """

    name: str
    label: str
    lower_is_better: bool


METRICS = (
    Metric("loss", "held-out loss, nats per token", True),
    Metric("perplexity", "held-out perplexity", True),
    Metric("chrf", "chrF", False),
    Metric("bleu", "BLEU", False),
    Metric("exact_match", "exact match, %", False),
    Metric("general_loss", "loss on general text, nats per token", True),
)


def likelihood_statistics(nll: Sequence[float], tokens: Sequence[int]) -> Array:
    """[examples, 2]: summed negative log-likelihood and supervised tokens."""
    return np.stack([np.asarray(nll, float), np.asarray(tokens, float)], axis=1)


def mean_loss(sums: Array) -> Array:
    """Nats per token from summed statistics (trap 44: total over total)."""
    loss: Array = sums[..., 0] / sums[..., 1]
    return loss


def perplexity(sums: Array) -> Array:
    """The exponential of the mean loss."""
    value: Array = np.exp(mean_loss(sums))
    return value


class TextMetric:
    """A sacrebleu corpus metric from per-example counts.

    Args:
        metric: sacrebleu's metric object.
    """

    def __init__(self, metric: Any) -> None:
        self._metric = metric
        self._metric.num_refs = 1  # else there is no signature before a first score

    def statistics(self, answers: Sequence[str], references: Sequence[str]) -> Array:
        """[examples, K] counts."""
        counts = self._metric._extract_corpus_statistics(list(answers), [list(references)])
        return np.asarray(counts, dtype=float)

    def __call__(self, sums: Array) -> Array:
        """The corpus score, 0 to 100, from summed counts [..., K]."""
        rows = np.rint(sums).astype(np.int64).reshape(-1, sums.shape[-1]).tolist()
        scores = [self._metric._compute_score_from_stats(row).score for row in rows]
        return np.asarray(scores).reshape(sums.shape[:-1])

    @property
    def signature(self) -> str:
        """Version and settings of the metric, to compare with other people's scores."""
        return str(self._metric.get_signature())


def bleu() -> TextMetric:
    """Corpus BLEU."""
    return TextMetric(BLEU())


def chrf() -> TextMetric:
    """Corpus chrF (chrF2)."""
    return TextMetric(CHRF())


def exact_match_statistics(answers: Sequence[str], references: Sequence[str]) -> Array:
    """[examples, 2]: whether the answer is the reference but for outer white space, and 1."""
    matches = [a.strip() == r.strip() for a, r in zip(answers, references, strict=True)]
    return np.stack([np.asarray(matches, float), np.ones(len(matches))], axis=1)


def percent(sums: Array) -> Array:
    """100 × first over second."""
    value: Array = 100.0 * sums[..., 0] / sums[..., 1]
    return value


FROM_SUMS: dict[str, FromSums] = {
    "loss": mean_loss,
    "perplexity": perplexity,
    "general_loss": mean_loss,
}
