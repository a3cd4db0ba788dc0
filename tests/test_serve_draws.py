"""How our engine draws a token: as likely as the model says, and in little time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from lighten.generation.sampling import Chosen, Sampler, nucleus
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


LOGITS = torch.tensor([0.1, 2.0, 1.9, -4.0, 1.0])


def chosen(written: Sequence[int] = (), top: int | None = None, **how: Any) -> Chosen:
    return Sampler(Sampling(**how), top).choose(LOGITS, [], written)


def test_draws_follow_their_settings() -> None:
    drawn = [chosen(seed=n) for n in range(400)]
    share = sum(choice.token == 1 for choice in drawn) / 400
    assert abs(share - float(LOGITS.softmax(-1)[1])) < 0.08
    assert {chosen(top_k=2, seed=n).token for n in range(60)} == {1, 2}
    assert {chosen(top_p=0.3, seed=n).token for n in range(60)} == {1}
    assert {chosen(min_p=0.5, seed=n).token for n in range(60)} == {1, 2}
    samplers = [Sampler(Sampling(temperature=2.0, seed=9)) for _ in range(2)]
    runs = [[sampler.choose(LOGITS, [], []).token for _ in range(20)] for sampler in samplers]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 1


def test_penalties_and_biases_move_the_choice_and_not_what_is_told_of_it() -> None:
    assert chosen(temperature=0.0).token == 1
    assert chosen(temperature=0.0, logit_bias={3: 100.0}).token == 3
    assert chosen([1, 1], temperature=0.0, frequency_penalty=0.1).token == 2
    assert chosen([1], temperature=0.0, frequency_penalty=0.04).token == 1
    assert chosen([1], temperature=0.0, presence_penalty=0.2).token == 2
    assert chosen([1, 2], temperature=0.0, repetition_penalty=4.0).token == 4
    choice = chosen([1], top=2, temperature=0.0, presence_penalty=9.0)
    assert choice.token == 2
    assert choice.logprob == pytest.approx(float(LOGITS.log_softmax(-1)[2]))
    assert [token for token, _ in choice.top] == [1, 2]
