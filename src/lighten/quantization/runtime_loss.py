"""What a runtime adds to the loss of its format's rounding, told from chance.

Activations that are rounded to 8 bits fall to the other side of a step for the least difference, so
that two right computations of one rounding are some distance from each other, and what either loses
is a draw. A text's tokens share its fate: intervals are over texts.

Dimensions: T tokens of a text, V words.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lighten.data import FEWEST
from lighten.evaluation.bootstrap import Array, Estimate, Resamples

if TYPE_CHECKING:
    from lighten.quantization.verify import Answering

# What a runtime may lose more than the rounding of its format, as a share of that.
ALLOWED_SHARE = 0.25
# Nats a token that float32 itself may be away.
ROUNDOFF = 1e-4
# Texts are read until the interval reaches this far to either side: a runtime that loses nothing
# more is then three of it, six standard errors, below what is allowed.
HALF_WIDTH = ALLOWED_SHARE / 3
STEP = 4  # texts between two looks at it
# A program reads one token at a time: of a billion parameters some tokens a second.
MOST_SECONDS = 300.0
SAMPLES = 1000  # resamples behind the interval


@dataclass(frozen=True)
class RuntimeLoss:
    """What an artefact loses beside the same rounding in PyTorch, on the same tokens.

    Attributes:
        texts: How many were read.
        tokens: Of all of them.
        artefact_kl: Mean KL divergence from the source to the artefact, nats a token.
        rounding_kl: From the source to the same rounding in PyTorch.
        between_kl: From that to the artefact. It is told and not judged by.
        more: Share of `rounding_kl` that the artefact loses more.
        low: Lower end of its 95 % interval: a bootstrap over texts, paired.
        high: Upper end; None like `low` of one text.
    """

    texts: int
    tokens: int
    artefact_kl: float
    rounding_kl: float
    between_kl: float
    more: float
    low: float | None
    high: float | None

    @property
    def within(self) -> bool | None:
        """Whether it loses no more than it may; None: that cannot be told."""
        if math.isnan(self.artefact_kl):
            return False
        if self.texts < FEWEST or self.low is None or self.high is None:
            return None
        if self.high <= ALLOWED_SHARE:
            return True
        return False if self.low > ALLOWED_SHARE else None

    def sentence(self) -> str:
        """In words."""
        interval = ""
        if self.low is not None and self.high is not None:
            interval = f"95 % interval {_percent(self.low)} to {_percent(self.high)}, "
        doubt = ""
        if self.within is None:
            doubt = "; whether it is within that cannot be told from so few tokens"
        more = abs(100 * self.more)
        return (
            f"on {self.tokens} tokens of {self.texts} texts it loses {self.artefact_kl:.3g} where "
            f"the same rounding in PyTorch loses {self.rounding_kl:.3g}: {more:.0f} % "
            f"{'more' if self.more >= 0 else 'less'} ({interval}allowed "
            f"{_percent(ALLOWED_SHARE)} more){doubt}; the two are {self.between_kl:.2g} apart"
        )


def runtime_loss(
    source: Answering, rounded: Answering, artefact: Answering, texts: Iterable[str],
    longest: int, *, most_seconds: float = MOST_SECONDS,
) -> RuntimeLoss:  # fmt: skip
    """Read texts until what an artefact loses beside its rounding is known well enough.

    When to stop is chosen by the interval's width alone and never by where it lies, so that it
    stays an interval.

    Args:
        source: What the artefact was made from.
        rounded: The same rounding in PyTorch.
        artefact: In its runtime.
        texts: Each is read from its beginning.
        longest: Tokens of a text that are read.
        most_seconds: After which no more texts are begun, once there are enough for an interval.

    Raises:
        UserError: A runtime fails.
    """
    began, rows = time.monotonic(), []
    for text in texts:
        ids = source.tokenise(text)[:longest]
        if not ids:
            continue
        p, r, q = (model.log_probabilities(ids) for model in (source, rounded, artefact))
        rows.append((_divergence(p, q), _divergence(p, r), _divergence(r, q), float(len(ids))))
        if math.isnan(rows[-1][0]):
            break  # it is broken, and more texts say nothing else
        if len(rows) < FEWEST or (len(rows) - FEWEST) % STEP:
            continue
        share = _share(np.array(rows))
        assert share.low is not None
        assert share.high is not None
        narrow = max(share.high - share.value, share.value - share.low) <= HALF_WIDTH
        if narrow or time.monotonic() - began > most_seconds:
            break
    sums = np.array(rows)
    share, (lost, of_rounding, between, tokens) = _share(sums), sums.sum(0).tolist()
    return RuntimeLoss(
        len(rows), int(tokens), lost / tokens, of_rounding / tokens, between / tokens,
        share.value, share.low, share.high,
    )  # fmt: skip


def _share(rows: Array) -> Estimate:
    """What is lost more, as a share, of [texts, 4]: divergences' sums and tokens."""

    def share(sums: Array) -> Array:
        lost, of_rounding, tokens = sums[..., 0], sums[..., 1], sums[..., 3]
        ratio: Array = (lost - ROUNDOFF * tokens) / np.maximum(of_rounding, 1e-12) - 1
        return ratio

    return Resamples(len(rows), SAMPLES).estimate(rows, share)


def _divergence(p: Array, q: Array) -> float:
    """KL divergence from one to another, both [T, V], summed over tokens."""
    words = min(p.shape[1], q.shape[1])  # one of them may be padded
    p, q = p[:, :words], q[:, :words]
    # Summed in float64; in float32 an exponential takes a tenth of the time.
    divergence = float((np.exp(p) * (p - q)).sum(dtype=np.float64))
    return max(divergence, 0.0)  # in this order what is no number stays none


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
