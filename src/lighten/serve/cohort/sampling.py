"""Which token comes next: greedy, or drawn as the request says.

Dimensions: V words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen; the names and meanings of OpenAI's API.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: Least probability that the likeliest tokens, among which one is drawn, make up.
        top_k: How many of the likeliest are drawn among; 0: all.
        seed: Of the draws; None: another each time.
        frequency_penalty: Taken off a token's logit for each time it was written.
        presence_penalty: Taken off once if it was written.
        logit_bias: Added to tokens' logits.
        top_logprobs: How many alternatives to tell of; None: no log-probabilities at all.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is taken and nothing else is wanted."""
        return (
            self.temperature == 0.0
            and self.top_logprobs is None
            and not self.frequency_penalty
            and not self.presence_penalty
            and not self.logit_bias
        )


@dataclass(frozen=True)
class Chosen:
    """A token, and how likely it and others were before the temperature.

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
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed & (2**63 - 1))

    def choose(self, logits: Tensor, written: Sequence[int]) -> Chosen:
        """The next token.

        Args:
            logits: [V].
            written: Tokens of the answer so far.
        """
        how = self.sampling
        logits = logits.float().cpu()
        if how.logit_bias or how.frequency_penalty or how.presence_penalty:
            logits = self._penalised(logits.clone(), written)
        token = int(logits.argmax()) if how.temperature == 0.0 else self._draw(logits)
        if how.top_logprobs is None:
            return Chosen(token)
        logprobs = logits.log_softmax(-1)
        values, ids = logprobs.topk(how.top_logprobs)
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return Chosen(token, float(logprobs[token]), top)

    def _penalised(self, logits: Tensor, written: Sequence[int]) -> Tensor:
        how = self.sampling
        for token, bias in how.logit_bias.items():
            logits[token] += bias
        for token, times in Counter(written).items():
            logits[token] -= how.presence_penalty + how.frequency_penalty * times
        return logits

    def _draw(self, logits: Tensor) -> int:
        how = self.sampling
        values, ids = (logits / how.temperature).sort(descending=True, stable=True)
        if how.top_k:
            values, ids = values[: how.top_k], ids[: how.top_k]
        chances = values.softmax(-1)
        if how.top_p < 1.0:
            # The likeliest stays, and each whose predecessors do not yet make up top_p.
            kept = chances.cumsum(-1) - chances < how.top_p
            kept[0] = True
            chances = chances * kept
        place = torch.multinomial(chances, 1, generator=self._generator)
        return int(ids[place])
