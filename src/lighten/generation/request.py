"""A request to the engine, and what the engine has of it while it is answered."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lighten.generation.adapter import LoadedAdapter
from lighten.generation.sampling import Chosen, Grammar, Sampler, likelihoods
from lighten.generation.settings import Sampling


@dataclass
class Request:
    """An answer that is wanted.

    Attributes:
        prompt: Its tokens.
        adapter: Name of the adapter; None: the base.
        max_tokens: Longest answer; 0: the prompt is read alone.
        stops: Tokens that end it.
        sampling: How tokens are chosen.
        top_logprobs: Alternatives to tell of for each token; None: no log-probabilities at all.
        on_token: Called with each token, in the engine's thread; the token that ends an answer is
            not among them.
        on_end: Called at the end with "stop" (a token ended it), "complete" (its grammar did),
            "length", "cancelled" or the error (a `UserError` where the request or its adapter is at
            fault).
        on_begin: Called before the first token with the prompt's tokens that were in the cache.
        grammar: That the answer has to follow; of this request alone.
        prompt_logprobs: As `top_logprobs`, for the tokens of the prompt, which is read whole then:
            what a cache holds of it has no logits.
        on_prompt: Called before the first token with those of the prompt but for its first.
        tells_end: Whether `on_token` is called with the token that ends the answer, too.
    """

    prompt: Sequence[int]
    adapter: str | None
    max_tokens: int
    stops: frozenset[int]
    sampling: Sampling
    top_logprobs: int | None
    on_token: Callable[[Chosen], None]
    on_end: Callable[[str | BaseException], None]
    on_begin: Callable[[int], None] = lambda _: None
    grammar: Grammar | None = None
    prompt_logprobs: int | None = None
    on_prompt: Callable[[Sequence[Chosen]], None] = lambda _: None
    tells_end: bool = False


@dataclass(eq=False)
class Taken:
    """A request that the engine has."""

    request: Request
    adapter: LoadedAdapter | None
    sampler: Sampler
    tokens: list[int]
    cached: int = 0  # tokens whose keys and values the slot holds
    slot: int = -1
    begun: bool = False
    cancelled: bool = False
    answer: list[int] = field(default_factory=list)
    prompt_told: list[Chosen] = field(default_factory=list)

    @property
    def waiting_tokens(self) -> int:
        """How many of its tokens no step has computed."""
        return len(self.tokens) - self.cached

    @property
    def decoding(self) -> bool:
        """Whether its prompt has been read."""
        return bool(self.answer)

    @property
    def is_finite(self) -> bool:
        """Whether all that is told of its prompt are numbers."""
        return not any(math.isnan(chosen.logprob or 0.0) for chosen in self.prompt_told)

    @property
    def reads_whole(self) -> bool:
        """Whether the log-probabilities of its prompt are told."""
        return self.request.prompt_logprobs is not None

    def rows_wanted(self, count: int) -> int:
        """How many of the last rows' logits are wanted of a step that computes so many tokens."""
        if self.reads_whole and not self.decoding:
            return count
        return int(count == self.waiting_tokens)

    def tell_prompt(self, logits: Tensor) -> None:
        """Keep how likely the tokens were that follow on those that were read last: [n, V]."""
        assert self.request.prompt_logprobs is not None
        following = self.tokens[self.cached - len(logits) + 1 : self.cached + 1]
        self.prompt_told += likelihoods(
            logits[: len(following)], following, self.request.prompt_logprobs
        )
