"""Which token comes next: greedy, or drawn as the request says.

Dimensions: V words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lighten.generation.settings import Sampling

# Words that are looked at for those that make up `top_p`, before all are.
_LIKELIEST = (512, 8192)
# Of logits, whose log-probabilities are made at a time: few stay in a processor's cache.
_ROWS = 16


class Grammar(Protocol):
    """One answer's place in a grammar that it has to follow."""

    @property
    def complete(self) -> bool:
        """Whether nothing can follow any more."""

    def restrict(self, logits: Tensor) -> None:
        """Set the logits of all tokens that may not come next to -inf, in place: [V]."""

    def take(self, token: int) -> None:
        """Go on by the token that was chosen."""


def is_plain(sampling: Sampling) -> bool:
    """Whether the likeliest token is taken, with no word on how likely others were."""
    return (
        sampling.is_greedy
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
        rank: Its place among all by likelihood, 1 for the likeliest; 0 unless asked for.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 0


def likelihoods(logits: Tensor, tokens: Sequence[int], most: int) -> list[Chosen]:
    """How likely tokens were that came next.

    Args:
        logits: [n, V].
        tokens: n of them.
        most: Alternatives to tell of.
    """
    chosen = []
    ids = torch.tensor(tokens, dtype=torch.int64, device=logits.device)[:, None]
    for rows, came in zip(logits.split(_ROWS), ids.split(_ROWS), strict=True):
        logprobs = rows.float().log_softmax(-1)
        values = logprobs.gather(-1, came)
        # A sum of bytes is seven times as quick as one of truth values.
        likelier = (logprobs > values).view(torch.uint8)
        ranks = likelier.sum(-1, dtype=torch.int32) + 1
        top = logprobs.topk(most)
        chosen += [
            Chosen(token, value, tuple(zip(places, likely, strict=True)), rank)
            for token, value, places, likely, rank in zip(
                came[:, 0].tolist(), values[:, 0].tolist(), top.indices.tolist(),
                top.values.tolist(), ranks.tolist(), strict=True,
            )
        ]  # fmt: skip
    return chosen


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
        self._bias: tuple[Tensor, Tensor] | None = None
        if bias := sampling.logit_bias:
            added = torch.tensor(list(bias.values()), dtype=torch.float32)
            self._bias = torch.tensor(list(bias)), added
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed & (2**63 - 1))

    @property
    def ended(self) -> bool:
        """Whether the grammar lets nothing follow."""
        return self._grammar is not None and self._grammar.complete

    def choose(self, logits: Tensor, prompt: Sequence[int], answer: Sequence[int]) -> Chosen:
        """The next token.

        Args:
            logits: [V].
            prompt: Tokens before the answer.
            answer: Tokens of the answer so far.
        """
        settings = self.sampling
        logits = logits.float().cpu()
        adjusted = logits if is_plain(settings) else self._adjust(logits.clone(), prompt, answer)
        if self._grammar is not None:
            adjusted = adjusted.clone()
            self._grammar.restrict(adjusted)
        token = int(adjusted.argmax()) if settings.is_greedy else self._draw(adjusted)
        if self._grammar is not None:
            self._grammar.take(token)
        if self._top is None:
            return Chosen(token)
        return likelihoods(logits[None], [token], self._top)[0]

    def _adjust(self, logits: Tensor, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        """Logits after biases and penalties, in place."""
        settings = self.sampling
        if self._bias is not None:
            logits.index_add_(0, *self._bias)
        if settings.repetition_penalty != 1.0:
            # Source: https://arxiv.org/abs/1909.05858, section 4.1; prompt and answer count.
            token_ids = torch.tensor(sorted({*prompt, *answer}))
            values = logits[token_ids]
            factor = settings.repetition_penalty
            logits[token_ids] = torch.where(values > 0, values / factor, values * factor)
        if answer and (settings.presence_penalty or settings.frequency_penalty):
            token_ids, times = torch.tensor(answer).unique(return_counts=True)
            taken = settings.presence_penalty + settings.frequency_penalty * times.double()
            logits[token_ids] -= taken.float()
        return logits

    def _draw(self, logits: Tensor) -> int:
        settings = self.sampling
        values, ids = logits / settings.temperature, None
        if 0 < settings.top_k < len(values):
            values, ids = values.topk(settings.top_k)
        probabilities = values.softmax(-1)
        if settings.top_p < 1.0:
            probabilities, order = nucleus(probabilities, settings.top_p)
            ids = order if ids is None else ids[order]
        # In float64: in float32 the sum of a large vocabulary would round its rare words away.
        weights = probabilities.double()
        if settings.min_p > 0.0:
            weights[probabilities < settings.min_p * probabilities.max()] = 0.0
        place = self._place(weights)
        return place if ids is None else int(ids[place])

    def _place(self, weights: Tensor) -> int:
        """A place, each as likely as its weight says: [V] → a number below V."""
        ends = weights.cumsum(-1)
        drawn = torch.rand(1, generator=self._generator, dtype=torch.float64) * ends[-1]
        place = int(torch.searchsorted(ends, drawn, right=True))
        # Rounded up to the whole sum, it would lie behind the last of them.
        return place if place < len(weights) else int(weights.argmax())


def nucleus(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The likeliest whose predecessors do not yet make up top_p: theirs, and their places.

    Mostly the first few hundred are enough, and a whole vocabulary takes long to be sorted.
    """
    for count in (*_LIKELIEST, len(probabilities)):
        likeliest, places = probabilities.topk(min(count, len(probabilities)))
        ends = likeliest.double().cumsum(-1)
        if ends[-1] >= top_p:
            break
    inside = max(1, int((ends - likeliest < top_p).sum()))
    return likeliest[:inside], places[:inside]
