"""The recommendation on samples whose truth is known."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

from lighten.evaluation.bootstrap import student
from lighten.sweeps.recommend import Candidate, Recommendation, after_training, recommend

EXAMPLES = 160


def drawn(
    truth: dict[str, float],
    *,
    seeds: int = 1,
    examples: int = EXAMPLES,
    seed: int = 0,
    noise: float = 0.05,
    seed_noise: float = 0.0,
) -> tuple[list[Candidate], np.ndarray[Any, Any]]:
    """Candidates `r<rank>` whose true losses are 1 + what is given; examples differ in hardness."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(5, 30, examples).astype(float)
    hard = draw.gamma(2.0, 0.5, examples)
    hard += 1 - (hard * tokens).sum() / tokens.sum()
    candidates = []
    for name, worse in truth.items():
        per_seed = [
            (hard + worse + draw.normal(0, noise, examples) + draw.normal(0, seed_noise)) * tokens
            for _ in range(seeds)
        ]
        candidates.append(Candidate(name, np.stack(per_seed), int(name[1:]) * 10**6))
    return candidates, tokens


def reasons(advice: Recommendation) -> str:
    return " ".join(advice.reasons)


def test_the_smallest_that_is_as_good_as_the_best_is_taken() -> None:
    candidates, tokens = drawn({"r1": 0.3, "r2": 0.2, "r4": 0.0, "r8": 0.0, "r16": 0.0})
    advice = recommend(candidates, tokens)
    assert advice.name == "r4"
    assert advice.verdict == "smallest as good as the best"
    assert [comparison.worse for comparison in advice.comparisons] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert re.search(r"The next smaller, r2, costs 0\.(19|20)", reasons(advice))
    assert "The next larger, r8," in reasons(advice)
    assert "4 MB" in reasons(advice)
    by_name = {comparison.name: comparison for comparison in advice.comparisons}
    assert by_name["r1"].loss == pytest.approx(1.3, abs=0.02)
    # Hard and easy examples are paired away: the difference is known far better than the loss.
    assert by_name["r1"].difference - by_name["r1"].low < by_name["r1"].se


def test_the_order_in_which_candidates_are_given_does_not_matter() -> None:
    candidates, tokens = drawn({"r1": 0.3, "r4": 0.0, "r8": 0.001})
    assert recommend(candidates, tokens) == recommend(candidates[::-1], tokens)


def test_no_difference_found_is_said_and_the_smallest_taken() -> None:
    candidates, tokens = drawn(dict.fromkeys(("r8", "r32", "r128"), 0.0))
    advice = recommend(candidates, tokens)
    assert (advice.name, advice.verdict) == ("r8", "no difference found")
    assert "No difference found between r8, r32 and r128; take r8, the smallest." in reasons(advice)
    assert advice.resolution is not None
    assert f"differences below about {advice.resolution:.2g} nats" in reasons(advice)


def test_a_smaller_one_that_is_better_is_taken_for_being_better() -> None:
    candidates, tokens = drawn({"r8": 0.0, "r32": 0.1, "r128": 0.2})
    advice = recommend(candidates, tokens)
    assert (advice.name, advice.best) == ("r8", "r8")
    assert advice.verdict == "smallest as good as the best"
    assert "Take r8: the lowest held-out loss" in reasons(advice)


def test_of_one_size_the_lowest_loss_is_taken() -> None:
    candidates, tokens = drawn({"r8": 0.2, "r16": 0.0})
    candidates.append(Candidate("r16-slow", candidates[1].nll + 0.1 * tokens, 16 * 10**6))
    assert recommend(candidates, tokens).name == "r16"


def test_few_examples_give_no_verdict() -> None:
    candidates, tokens = drawn({"r1": 0.5, "r4": 0.0}, examples=19)
    advice = recommend(candidates, tokens)
    assert (advice.name, advice.best, advice.verdict) == (None, "r4", "too few examples")
    assert "19 held-out examples are too few" in reasons(advice)
    assert recommend([], tokens).name is None


def test_what_is_no_better_than_the_base_is_not_recommended() -> None:
    candidates, tokens = drawn({"r1": 0.1, "r4": 0.0})
    base = candidates[1].nll[0] - 0.05 * tokens
    advice = recommend(candidates, tokens, base=base)
    assert (advice.name, advice.verdict) == (None, "no better than the base")
    assert "r4 is no better than the untouched base" in advice.reasons[0]
    assert "Take r4" not in reasons(advice)
    better = recommend(candidates, tokens, base=base + 1.0 * tokens)
    assert better.name == "r4"
    assert "Against the untouched base: -0.9" in reasons(better)


def test_of_those_as_good_as_the_best_one_that_is_better_than_the_base_is_taken() -> None:
    """The smallest cannot be told apart from the best, nor from the base; the best is better."""
    tokens = np.full(EXAMPLES, 10.0)
    draw = np.random.default_rng(1)
    hard = draw.gamma(2.0, 0.5, EXAMPLES)
    noise, small_noise = (draw.normal(0, scale, EXAMPLES) for scale in (0.3, 0.01))
    noise, small_noise = noise - noise.mean(), small_noise - small_noise.mean()
    losses = {"r4": hard + noise - 0.02, "r32": hard - 0.05, "r64": hard + small_noise - 0.051}
    candidates = [
        Candidate(name, (loss * tokens)[None], int(name[1:])) for name, loss in losses.items()
    ]
    base = hard * tokens
    steady = np.tile([0.05, -0.05], EXAMPLES // 2) * tokens
    advice = recommend(candidates, tokens, base=base + steady)
    assert recommend(candidates, tokens).name == "r4"
    assert (advice.name, advice.best) == ("r32", "r64")
    assert "that is better than the untouched base" in advice.reasons[0]
    assert "r4 cannot be told apart from r32, but is not found to be better than the base" in (
        reasons(advice)
    )
    assert "Against the untouched base: -0.0" in reasons(advice)
    assert "take none" not in reasons(advice)
    # The best alone is better; or not even it is.
    assert recommend(candidates[:2], tokens, base=base + steady).name == "r32"
    none = recommend(candidates, tokens, base=base - 0.04 * tokens + 20 * steady)
    assert (none.name, none.verdict) == (None, "no better than the base")
    assert none.reasons[0].startswith("r64 is no better than the untouched base")


def test_what_did_not_train_to_the_end_is_named() -> None:
    candidates, tokens = drawn({"r1": 0.1, "r4": 0.0})
    assert "r8 and r16 did not train to the end" in reasons(
        recommend(candidates, tokens, left_out=["r8", "r16"])
    )


def test_among_true_equals_the_smallest_is_left_out_in_one_of_twenty_at_most() -> None:
    """The best of five is lowest by luck: a plain 95 % interval would leave out more."""
    left_out = 0
    for seed in range(300):
        candidates, tokens = drawn(dict.fromkeys(("r1", "r2", "r4", "r8", "r16"), 0.0), seed=seed)
        left_out += recommend(candidates, tokens, samples=300).name != "r1"
    # Two standard errors of a binomial share of 5 % over 300 draws are 2.5 %.
    assert left_out / 300 <= 0.075


def test_seeds_that_scatter_widen_the_bounds() -> None:
    """With three seeds whose spread is larger than the examples', their mean decides little."""
    wrong = {0.0: 0, 0.05: 0}
    for seed_noise in wrong:
        for seed in range(150):
            candidates, tokens = drawn(
                dict.fromkeys(("r1", "r4"), 0.0), seeds=3, seed=seed, seed_noise=seed_noise
            )
            wrong[seed_noise] += recommend(candidates, tokens, samples=300).name != "r1"
    assert all(count / 150 <= 0.085 for count in wrong.values()), wrong
    # Ignoring the seeds, most of these pairs would look different.
    candidates, tokens = drawn(dict.fromkeys(("r1", "r4"), 0.0), seeds=3, seed_noise=0.05)
    merged = [Candidate(c.name, c.nll.mean(0, keepdims=True), c.size_bytes) for c in candidates]
    assert recommend(merged, tokens).resolution < recommend(candidates, tokens).resolution / 3  # type: ignore[operator]


def test_a_difference_that_is_there_is_found_over_seeds() -> None:
    candidates, tokens = drawn({"r1": 0.2, "r4": 0.0}, seeds=3, seed_noise=0.01)
    assert recommend(candidates, tokens).name == "r4"
    assert "one seed" not in reasons(recommend(candidates, tokens))
    assert "Trained with one seed" in reasons(recommend(*drawn({"r1": 0.2, "r4": 0.0})))


@pytest.mark.parametrize(
    ("level", "freedom", "quantile"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 30, 2.04227), (0.95, 3.5, 2.2224),
     (0.95, math.inf, 1.644854), (0.5, 7, 0.0)],
)  # fmt: skip
def test_students_quantiles(level: float, freedom: float, quantile: float) -> None:
    """Values of the usual tables (NIST/SEMATECH e-Handbook, 1.3.6.7.2); 3.5 from scipy.stats.t."""
    assert student(level, freedom) == pytest.approx(quantile, abs=2e-4)


def test_what_it_rests_on_is_said_and_next_to_nothing_recommends_nothing() -> None:
    advice = recommend(*drawn({"r1": 0.3, "r4": 0.0}))
    enough = after_training(advice, 0.5, 8)
    assert (enough.name, enough.verdict) == (advice.name, advice.verdict)
    assert enough.reasons == [
        *advice.reasons,
        "The arms were trained for 8 steps, 0.5 of an epoch.",
    ]
    early = after_training(advice, 0.005, 8)
    assert (early.name, early.verdict) == (None, "too little training")
    assert early.best == "r4"
    assert "Nothing is recommended after 8 steps, 0.005 of an epoch" in reasons(early)
    # Many steps over very large data.
    assert after_training(advice, 0.005, 1000).name == advice.name
