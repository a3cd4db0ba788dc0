"""Which token comes next: greedy, or drawn as the request says.

Dimensions: V words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lighten.generation.settings import Sampling


class Grammar(Protocol):
    """One answer's place in a grammar that it has to follow."""

    @property
    def whole(self) -> bool:
        """Whether nothing can follow any more."""

    def restrict(self, logits: Tensor) -> None:
        """Set the logits of all tokens that may not come next to -inf, in place: [V]."""

    def take(self, token: int) -> None:
        """Go on by the token that was chosen."""


def is_plain(sampling: Sampling) -> bool:
    """Whether the likeliest token is taken, with no word on how likely others were."""
    return (
        sampling.temperature == 0.0
        and sampling.repetition_penalty == 1.0
        and not sampling.frequency_penalty
        and not sampling.presence_penalty
        and not sampling.logit_bias
    )


@dataclass(frozen=True)
class Chosen:
    """A token, and how likely it and others were before any setting.

    Attributes:
        token: Its id.
        logprob: Natural logarithm of its probability; None unless asked for.
        top: The likeliest tokens with their logarithms.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses one request's tokens.

    Args:
        sampling: How.
        top_logprobs: How many alternatives to tell of; None: no log-probabilities at all.
        grammar: That the answer has to follow; it moves with each token that is chosen.
    """

    def __init__(
        self,
        sampling: Sampling,
        top_logprobs: int | None = None,
        grammar: Grammar | None = None,
    ) -> None:
        self.sampling, self._top, self._grammar = sampling, top_logprobs, grammar
        self.plain = is_plain(sampling) and top_logprobs is None and grammar is None
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed & (2**63 - 1))

    @property
    def ended(self) -> bool:
        """Whether the grammar lets nothing follow."""
        return self._grammar is not None and self._grammar.whole

    def choose(self, logits: Tensor, prompt: Sequence[int], written: Sequence[int]) -> Chosen:
        """The next token.

        Args:
            logits: [V].
            prompt: Tokens before the answer.
            written: Tokens of the answer so far.
        """
        how = self.sampling
        logits = logits.float().cpu()
        bent = logits if is_plain(how) else self._bent(logits.clone(), prompt, written)
        if self._grammar is not None:
            bent = bent.clone()
            self._grammar.restrict(bent)
        token = int(bent.argmax()) if how.temperature == 0.0 else self._draw(bent)
        if self._grammar is not None:
            self._grammar.take(token)
        if self._top is None:
            return Chosen(token)
        logprobs = logits.log_softmax(-1)
        values, ids = logprobs.topk(self._top)
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return Chosen(token, float(logprobs[token]), top)

    def _bent(self, logits: Tensor, prompt: Sequence[int], written: Sequence[int]) -> Tensor:
        """Logits after biases and penalties, in place."""
        how = self.sampling
        for token, bias in how.logit_bias.items():
            logits[token] += bias
        if how.repetition_penalty != 1.0:
            # Source: https://arxiv.org/abs/1909.05858, section 4.1; prompt and answer count.
            seen = torch.tensor(sorted({*prompt, *written}))
            values = logits[seen]
            factor = how.repetition_penalty
            logits[seen] = torch.where(values > 0, values / factor, values * factor)
        for token, times in Counter(written).items():
            logits[token] -= how.presence_penalty + how.frequency_penalty * times
        return logits

    def _draw(self, logits: Tensor) -> int:
        how = self.sampling
        values, ids = (logits / how.temperature).sort(descending=True, stable=True)
        if how.top_k:
            values, ids = values[: how.top_k], ids[: how.top_k]
        chances = values.softmax(-1)
        kept = torch.ones_like(chances, dtype=torch.bool)
        if how.top_p < 1.0:
            # Each whose predecessors do not yet make up top_p stays.
            kept &= chances.cumsum(-1) - chances < how.top_p
        if how.min_p > 0.0:
            kept &= chances >= how.min_p * chances[0]
        kept[0] = True
        place = torch.multinomial(chances * kept, 1, generator=self._generator)
        return int(ids[place])
