"""A loss on held-out rows, with its standard error; it needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ValidationLoss:
    """Losses of one adapter on held-out rows.

    Attributes:
        nll: Summed negative log-likelihood of each row's supervised tokens, in nats.
        tokens: Supervised tokens of each row.
    """

    nll: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def loss(self) -> float:
        """Total loss over total tokens (trap 44), nats per token."""
        return sum(self.nll) / sum(self.tokens)

    @property
    def standard_error(self) -> float | None:
        """Of the loss as a ratio of two sums over rows: a row's tokens are not independent.

        None of one row, which has no spread.

        Linearised ratio estimator (Cochran, Sampling Techniques, 1977, section 6.4).
        """
        rows, total, loss = len(self.nll), sum(self.tokens), self.loss
        if rows < 2:
            return None
        residual = sum((n - loss * t) ** 2 for n, t in zip(self.nll, self.tokens, strict=True))
        return math.sqrt(rows / (rows - 1) * residual) / total
