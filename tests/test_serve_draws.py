"""How our engine draws a token: as likely as the model says, and in little time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lighten.generation.sampling import Sampler, nucleus
from lighten.generation.settings import Sampling

VOCABULARY = 151_936  # Qwen's; most have a third of it or more


def logits_of(words: int, spread: float) -> torch.Tensor:
    return spread * torch.randn(words, generator=torch.Generator().manual_seed(words))


@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0], ids=["flat", "wide", "peaked"])
@pytest.mark.parametrize("words", [3, 700, 20_000])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.99])
def test_a_nucleus_is_that_of_the_whole_vocabulary_in_order(
    words: int, spread: float, top_p: float
) -> None:
    """However many of the likeliest were looked at."""
    probabilities = logits_of(words, spread).softmax(-1)
    ordered = probabilities.sort(descending=True).values.double()
    values, places = nucleus(probabilities, top_p)
    assert torch.equal(values.double(), ordered[ordered.cumsum(-1) - ordered < top_p])
    assert torch.equal(values, probabilities[places])  # of two alike either may be the last
    assert len(set(places.tolist())) == len(places)


@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.1},
     {"top_k": 5, "top_p": 0.8, "min_p": 0.1}],
    ids=str,
)  # fmt: skip
def test_each_word_is_drawn_as_often_as_it_is_likely(how: dict[str, Any]) -> None:
    logits = logits_of(12, 1.5)
    likely = (logits / how.get("temperature", 1.0)).softmax(-1)
    order = likely.argsort(descending=True)
    inside = order[: how.get("top_k", 12)]
    share = likely[inside] / likely[inside].sum()
    inside = inside[share.cumsum(-1) - share < how.get("top_p", 1.0)]
    inside = inside[likely[inside] >= how.get("min_p", 0.0) * likely[order[0]]]
    share = likely[inside] / likely[inside].sum()
    sampler, draws = Sampler(Sampling(seed=5, **how)), 4000
    drawn = Counter(sampler.choose(logits, [1], []).token for _ in range(draws))
    assert set(drawn) == set(inside.tolist())
    for word, expected in zip(inside.tolist(), share.tolist(), strict=True):
        error = (expected * (1 - expected) / draws) ** 0.5
        assert abs(drawn[word] / draws - expected) <= 5 * error


@pytest.mark.parametrize(
    "how",
    [{}, {"top_k": 40}, {"top_p": 0.9}, {"frequency_penalty": 0.1}, {"presence_penalty": 0.1},
     {"logit_bias": dict.fromkeys(range(1000), 1)}],
    ids=lambda how: next(iter(how), "none"),
)  # fmt: skip
def test_a_draw_takes_less_time_than_sorting_the_vocabulary(how: dict[str, Any]) -> None:
    """A step draws a token for each answer, long ones too; many leave the temperature at 1."""
    logits = logits_of(VOCABULARY, 6.0)
    sampler, answer = Sampler(Sampling(seed=5, **how)), [*range(4000)]

    def seconds(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(7):
            began = time.thread_time()
            work()
            times.append(time.thread_time() - began)
        return min(times)

    sorting = seconds(lambda: logits.sort(descending=True, stable=True))
    assert seconds(lambda: sampler.choose(logits, [1], answer)) < sorting / 2
