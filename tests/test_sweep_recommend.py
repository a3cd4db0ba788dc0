"""The recommendation on samples whose truth is known."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

from lighten.sweeps.recommend import Candidate, Recommendation, after_training, recommend, student

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
    found = []
    for name, worse in truth.items():
        per_seed = [
            (hard + worse + draw.normal(0, noise, examples) + draw.normal(0, seed_noise)) * tokens
            for _ in range(seeds)
        ]
        found.append(Candidate(name, np.stack(per_seed), int(name[1:]) * 10**6))
    return found, tokens


def said(found: Recommendation) -> str:
    return " ".join(found.reasons)


def test_the_smallest_that_is_as_good_as_the_best_is_taken() -> None:
    candidates, tokens = drawn({"r1": 0.3, "r2": 0.2, "r4": 0.0, "r8": 0.0, "r16": 0.0})
    found = recommend(candidates, tokens)
    assert found.name == "r4"
    assert found.verdict == "smallest as good as the best"
    assert [own.worse for own in found.comparisons] == [True, True, False, False, False]
    assert re.search(r"The next smaller, r2, costs 0\.(19|20)", said(found))
    assert "The next larger, r8," in said(found)
    assert "4 MB" in said(found)
    by_name = {own.name: own for own in found.comparisons}
    assert by_name["r1"].loss == pytest.approx(1.3, abs=0.02)
    # Hard and easy examples are paired away: the difference is known far better than the loss.
    assert by_name["r1"].difference - by_name["r1"].low < by_name["r1"].se


def test_the_order_in_which_candidates_are_given_does_not_matter() -> None:
    candidates, tokens = drawn({"r1": 0.3, "r4": 0.0, "r8": 0.001})
    assert recommend(candidates, tokens) == recommend(candidates[::-1], tokens)


def test_no_difference_found_is_said_and_the_smallest_taken() -> None:
    candidates, tokens = drawn(dict.fromkeys(("r8", "r32", "r128"), 0.0))
    found = recommend(candidates, tokens)
    assert (found.name, found.verdict) == ("r8", "no difference found")
    assert "No difference found between r8, r32 and r128; take r8, the smallest." in said(found)
    assert found.resolution is not None
    assert f"differences below about {found.resolution:.2g} nats" in said(found)


def test_a_smaller_one_that_is_better_is_taken_for_being_better() -> None:
    candidates, tokens = drawn({"r8": 0.0, "r32": 0.1, "r128": 0.2})
    found = recommend(candidates, tokens)
    assert (found.name, found.best) == ("r8", "r8")
    assert found.verdict == "smallest as good as the best"
    assert "Take r8: the lowest held-out loss" in said(found)


def test_of_one_size_the_lowest_loss_is_taken() -> None:
    candidates, tokens = drawn({"r8": 0.2, "r16": 0.0})
    candidates.append(Candidate("r16-slow", candidates[1].nll + 0.1 * tokens, 16 * 10**6))
    assert recommend(candidates, tokens).name == "r16"


def test_few_examples_give_no_verdict() -> None:
    candidates, tokens = drawn({"r1": 0.5, "r4": 0.0}, examples=19)
    found = recommend(candidates, tokens)
    assert (found.name, found.best, found.verdict) == (None, "r4", "too few examples")
    assert "19 held-out examples are too few" in said(found)
    assert recommend([], tokens).name is None


def test_what_is_no_better_than_the_base_is_not_recommended() -> None:
    candidates, tokens = drawn({"r1": 0.1, "r4": 0.0})
    base = candidates[1].nll[0] - 0.05 * tokens
    found = recommend(candidates, tokens, base=base)
    assert (found.name, found.verdict) == (None, "no better than the base")
    assert "take none of these" in said(found)
    better = recommend(candidates, tokens, base=base + 1.0 * tokens)
    assert better.name == "r4"
    assert "Against the untouched base: -0.9" in said(better)


def test_what_did_not_train_to_the_end_is_named() -> None:
    candidates, tokens = drawn({"r1": 0.1, "r4": 0.0})
    assert "r8 and r16 did not train to the end" in said(
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
    assert "one seed" not in said(recommend(candidates, tokens))
    assert "Trained with one seed" in said(recommend(*drawn({"r1": 0.2, "r4": 0.0})))


@pytest.mark.parametrize(
    ("level", "freedom", "wanted"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 30, 2.04227), (0.95, 3.5, 2.2224),
     (0.95, math.inf, 1.644854), (0.5, 7, 0.0)],
)  # fmt: skip
def test_students_quantiles(level: float, freedom: float, wanted: float) -> None:
    """Values of the usual tables (NIST/SEMATECH e-Handbook, 1.3.6.7.2); 3.5 from scipy.stats.t."""
    assert student(level, freedom) == pytest.approx(wanted, abs=2e-4)


def test_what_it_rests_on_is_said_and_next_to_nothing_recommends_nothing() -> None:
    found = recommend(*drawn({"r1": 0.3, "r4": 0.0}))
    enough = after_training(found, 0.5, 8)
    assert (enough.name, enough.verdict) == (found.name, found.verdict)
    assert enough.reasons == [*found.reasons, "The arms were trained for 8 steps, 0.5 of an epoch."]
    early = after_training(found, 0.005, 8)
    assert (early.name, early.verdict) == (None, "too little training")
    assert early.best == "r4"
    assert "Nothing is recommended after 8 steps, 0.005 of an epoch" in said(early)
    assert after_training(found, 0.005, 1000).name == found.name  # many steps over very large data
