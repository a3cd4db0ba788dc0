"""Which arm to take: the smallest that cannot be told apart from the best, in words.

Dimensions: S seeds, E held-out examples, C candidates, B resamples.

Choosing the best of several and then comparing with it is itself a source of error: among equals
one is lowest by luck. So a candidate counts as worse than the best only beyond a bound that holds
for all pairs at once (multiple comparisons with the best: Hsu, Multiple Comparisons, 1996, chapter
4), with the joint distribution of the differences taken from a bootstrap over examples that is
paired over candidates. Among true equals the smallest is so left out in at most one of twenty
sweeps, however many candidates there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from lighten.data import FEWEST
from lighten.evaluation.bootstrap import LEVEL, Array, Resamples, student
from lighten.wording import counted, significant

# Arms that have seen less of the data than this, in fewer steps than this, have hardly warmed up:
# which of them is ahead says next to nothing of the end.
LEAST_SEEN, LEAST_STEPS = 0.01, 100
# Its one-sided normal quantile, against which Student's is compared.
_Z = 1.6448536269514722


@dataclass(frozen=True)
class Candidate:
    """One setting that was trained, perhaps with several seeds.

    Attributes:
        name: What to call it.
        nll: [S, E] summed negative log-likelihood of each example's supervised tokens, nats.
        size_bytes: What it adds to ship.
        extra_flops: What it adds to a token when served unmerged, as a share of the base's.
    """

    name: str
    nll: Array
    size_bytes: int
    extra_flops: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """A candidate beside the best one.

    Attributes:
        name: The candidate's.
        loss: Nats per token, mean over its seeds.
        se: Standard error of the loss, over examples and seeds; None of a single example.
        difference: Loss minus the best one's.
        low: Bound below the difference that holds for all candidates at once; None like `se`.
        high: The same above.
        worse: The bound is above zero: it can be told apart from the best.
    """

    name: str
    loss: float
    se: float | None
    difference: float
    low: float | None
    high: float | None
    worse: bool


@dataclass(frozen=True)
class Recommendation:
    """What to take and why.

    Attributes:
        name: The candidate to take; None where nothing can be recommended, and of too few examples.
        best: The candidate with the lowest loss.
        verdict: `smallest as good as the best`, `no difference found`, `too few examples`,
            `no better than the base`, or `too little training`.
        reasons: Sentences for people.
        comparisons: Every candidate beside the best, smallest first.
        resolution: The smallest difference, nats per token, that could have been told apart.
    """

    name: str | None
    best: str | None
    verdict: str
    reasons: list[str]
    comparisons: list[Comparison] = field(default_factory=list)
    resolution: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class _Losses:
    """Losses of all candidates on all examples and on the same resamples of them."""

    def __init__(self, candidates: Sequence[Candidate], tokens: Array, draws: Resamples) -> None:
        self.examples = len(tokens)
        self.seeds = [candidate.nll / tokens.sum() for candidate in candidates]
        mean = np.stack([candidate.nll.mean(0) for candidate in candidates], axis=1)  # [E, C]
        self.value = mean.sum(0) / tokens.sum()
        totals = draws.sums(np.concatenate([mean, tokens[:, None]], axis=1))
        self.drawn = totals[:, :-1] / totals[:, -1:]  # [B, C]

    def difference(self, a: int, b: int) -> tuple[float, float, float]:
        """Loss of a minus that of b, its standard error, and the error's degrees of freedom."""
        examples = float((self.drawn[:, a] - self.drawn[:, b]).std(ddof=1))
        ours, theirs = self.seeds[a].sum(1), self.seeds[b].sum(1)
        if len(ours) == len(theirs):  # the same seeds: the same order of examples
            parts = [_spread(ours - theirs)]
        else:
            parts = [_spread(ours), _spread(theirs)]
        return float(self.value[a] - self.value[b]), *_together(examples, parts)

    def error(self, a: int) -> float:
        """Standard error of one loss, over examples and seeds."""
        parts = [_spread(self.seeds[a].sum(1))]
        return _together(float(self.drawn[:, a].std(ddof=1)), parts)[0]

    def bound(self, a: int) -> float:
        """Standard errors by which a true best seems worse than any other, in one of twenty."""
        t = []
        for b in range(len(self.value)):
            drawn = self.drawn[:, a] - self.drawn[:, b]
            if b != a and drawn.std() > 0:
                t.append((drawn - drawn.mean()) / drawn.std(ddof=1))
        return float(np.quantile(np.max(t, axis=0), LEVEL)) if t else _Z


def _spread(values: Array) -> tuple[float, int]:
    """Variance of the mean over seeds, and its degrees of freedom."""
    count = len(values)
    return (float(values.var(ddof=1)) / count, count - 1) if count > 1 else (0.0, 0)


def _together(examples: float, seeds: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Standard error from both sources, and its degrees of freedom (Welch and Satterthwaite).

    All seeds are measured on the same examples, so what differs between seeds holds nothing of the
    examples' error and the variances add.
    """
    variance = examples**2 + sum(seed_variance for seed_variance, _ in seeds)
    lost = sum(seed_variance**2 / freedom for seed_variance, freedom in seeds if freedom)
    return math.sqrt(variance), variance**2 / lost if lost > 0 else math.inf


def recommend(
    candidates: Sequence[Candidate],
    tokens: Array,
    *,
    base: Array | None = None,
    left_out: Sequence[str] = (),
    broken: Sequence[str] = (),
    cut: tuple[int, int] | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> Recommendation:
    """The smallest candidate whose held-out loss cannot be told apart from the best.

    Args:
        candidates: What was trained to the end, or cut at one step; sizes decide what is small,
            losses between equals.
        tokens: [E] supervised tokens of each example, the same for all.
        base: [E] the untouched base's, like `Candidate.nll`.
        left_out: What was tried and not trained to the end.
        broken: What was trained to the end and has a loss that is not a number.
        cut: Steps that the candidates made and those they should have; None: they made them all.
        samples: Resamples.
        seed: Of the resampling.
    """
    if not candidates:
        reasons = _broken(broken) or ["Nothing was trained to the end."]
        return Recommendation(None, None, "too few examples", reasons)
    ordered = sorted(
        candidates, key=lambda candidate: (candidate.size_bytes, candidate.nll.mean(0).sum())
    )
    losses = _Losses(ordered, tokens, Resamples(len(tokens), samples, seed))
    best = int(np.argmin(losses.value))
    comparisons = [_compare(losses, ordered, place, best) for place in range(len(ordered))]
    bounds = [
        comparison.difference - comparison.low
        for comparison in comparisons
        if comparison.name != ordered[best].name and comparison.low is not None
    ]
    resolution = max(bounds) if bounds else None
    few = len(tokens) < FEWEST
    equals = [best] if few else [i for i, other in enumerate(comparisons) if not other.worse]
    against: str | None = None
    chosen, verdict = equals[0], _verdict(few, comparisons)
    if base is not None and not few:
        against_base = {i: _against_base(ordered[i], base, tokens, samples, seed) for i in equals}
        better = [i for i in equals if against_base[i][1]]
        chosen = better[0] if better else best
        against = against_base[chosen][0]
        if not better:  # nothing says which to take
            verdict = "no better than the base"
    passed_over = [ordered[i].name for i in equals if i < chosen and not few]
    reasons = _reasons(
        ordered, comparisons, chosen, best, verdict, len(tokens), resolution, cut, passed_over
    )
    reasons += [] if few else _neighbours(losses, ordered, chosen)
    if verdict == "no better than the base":
        reasons = [f"{against}: take none of these.", *reasons[1:]]
    elif against is not None:
        reasons.append(f"{against}.")
    if not few and all(len(candidate.nll) == 1 for candidate in ordered):
        reasons.append(
            "Trained with one seed: what another would change is not in these bounds; --seed 0,1,2 "
            "would say."
        )
    if left_out:
        reasons.append(
            f"{_listed(left_out)} did not train to the end, so nothing is said about "
            f"{'it' if len(left_out) == 1 else 'them'}."
        )
    reasons += _broken(broken)
    none = few or verdict == "no better than the base"
    name = None if none else ordered[chosen].name
    return Recommendation(name, ordered[best].name, verdict, reasons, comparisons, resolution)


def _broken(names: Sequence[str]) -> list[str]:
    """A sentence about arms whose numbers overflow."""
    if not names:
        return []
    return [
        f"The held-out loss of {_listed(names)} is not a number: what was trained there is of no "
        "use; lower the learning rate."
    ]


def after_training(recommendation: Recommendation, share: float, steps: int) -> Recommendation:
    """The recommendation with how much of the data it rests on; none after next to nothing.

    Args:
        recommendation: As the losses have it.
        share: Of an epoch that the compared settings trained on, the least of them.
        steps: That they made.
    """
    amount = f"{counted(steps, 'step')}, {significant(share, 2)} of an epoch"
    if share < LEAST_SEEN and steps < LEAST_STEPS:
        reason = (
            f"Nothing is recommended after {amount}: settings that are told apart so early often "
            "change places later; train longer."
        )
        return replace(recommendation, name=None, verdict="too little training", reasons=[reason])
    return replace(
        recommendation, reasons=[*recommendation.reasons, f"The arms were trained for {amount}."]
    )


def _compare(losses: _Losses, ordered: Sequence[Candidate], place: int, best: int) -> Comparison:
    value, error, freedom = losses.difference(place, best)
    if losses.examples < 2:
        name = ordered[place].name
        return Comparison(name, float(losses.value[place]), None, value, None, None, False)
    half = losses.bound(place) * student(LEVEL, freedom) / _Z * error if place != best else 0.0
    return Comparison(
        ordered[place].name, float(losses.value[place]), losses.error(place), value,
        value - half, value + half, place != best and value - half > 0,
    )  # fmt: skip


def _verdict(few: bool, comparisons: Sequence[Comparison]) -> str:
    if few:
        return "too few examples"
    if len(comparisons) > 1 and not any(comparison.worse for comparison in comparisons):
        return "no difference found"
    return "smallest as good as the best"


def _reasons(
    ordered: Sequence[Candidate],
    comparisons: Sequence[Comparison],
    chosen: int,
    best: int,
    verdict: str,
    examples: int,
    resolution: float | None,
    cut: tuple[int, int] | None,
    passed_over: Sequence[str],
) -> list[str]:
    """The choice itself, in words."""
    comparison, name = comparisons[chosen], ordered[chosen].name
    notes, of_which = [], ""
    if passed_over and verdict != "no better than the base":
        of_which = " that is better than the untouched base"
        smaller = f"{_listed(passed_over)} cannot be told apart from {name}, but"
        notes.append(f"{smaller} {_is(passed_over)} not found to be better than the base either.")
    if cut is not None:
        notes.append(
            f"The time was up after step {cut[0]} of {cut[1]}: nothing was trained to its end."
        )
    if resolution is not None:
        notes.append(
            f"With {examples} examples, differences below about {resolution:.2g} nats per token "
            "cannot be told apart."
        )
    if verdict == "too few examples":
        return [
            f"{counted(examples, 'held-out example')} {'is' if examples == 1 else 'are'} too few "
            f"to compare by, so nothing is recommended; {name} has the lowest loss, "
            f"{comparison.loss:.4f}. Give at least {FEWEST}."
        ]
    if len(ordered) == 1:
        all_of = "left of those tried" if cut else "all that was trained to the end"
        return [f"{name} is {all_of}: held-out loss {comparison.loss:.4f}.", *notes]
    if verdict == "no difference found":
        sizes = {candidate.size_bytes for candidate in ordered}
        least = "the smallest" if len(sizes) > 1 else "the one with the lowest loss"
        return [
            f"No difference found between {_listed([c.name for c in comparisons])}; take {name}, "
            f"{least}{of_which}.",
            *notes,
        ]
    if chosen == best:
        worse = [c.name for c in comparisons if c.worse]
        after = f"; {_listed(worse)} can be told apart from it and {_is(worse)} worse"
        same = [c.name for c in comparisons[chosen + 1 :] if not c.worse]
        beyond = f"; {_listed(same)} {_is(same)} no better" if same else ""
        return [
            f"Take {name}: the lowest held-out loss, {comparison.loss:.4f}"
            f"{after if worse else ''}{beyond}.",
            *notes,
        ]
    return [
        f"Take {name}: the smallest{of_which and f'{of_which} and'} whose held-out loss cannot be "
        f"told apart from the best, {ordered[best].name} (difference "
        f"{comparison.difference:+.4f} nats per token, bounds "
        f"{comparison.low:+.4f} to {comparison.high:+.4f}).",
        *notes,
    ]


def _neighbours(losses: _Losses, ordered: Sequence[Candidate], chosen: int) -> list[str]:
    """What the next smaller and the next larger one would cost or bring."""
    candidate = ordered[chosen]
    smaller = [i for i, c in enumerate(ordered) if c.size_bytes < candidate.size_bytes]
    larger = [i for i, c in enumerate(ordered) if c.size_bytes > candidate.size_bytes]
    sentences = []
    for what, places, pick in (("smaller", smaller, max), ("larger", larger, min)):
        if not places:
            continue
        size = pick(ordered[i].size_bytes for i in places)
        place = min((i for i in places if ordered[i].size_bytes == size),
                    key=lambda i: losses.value[i])  # fmt: skip
        value, error, freedom = losses.difference(place, chosen)
        half = student((1 + LEVEL) / 2, freedom) * error
        change = "costs" if value > 0 else "brings"
        noise = "" if abs(value) > half else ", which may be noise"
        other = ordered[place]
        sentences.append(
            f"The next {what}, {other.name}, {change} {abs(value):.4f} nats per token (95 % "
            f"interval of the difference {value - half:+.4f} to {value + half:+.4f}{noise}) and "
            f"has {significant(other.size_bytes / 1e6, 3)} MB instead of "
            f"{significant(candidate.size_bytes / 1e6, 3)} MB{_served(candidate, other)}."
        )
    return sentences


def _served(chosen: Candidate, other: Candidate) -> str:
    if chosen.extra_flops == other.extra_flops:
        return ""
    theirs, ours = (significant(100 * each.extra_flops, 2) for each in (other, chosen))
    return f"; served unmerged it adds {theirs} % to the arithmetic of a token instead of {ours} %"


def _against_base(
    candidate: Candidate, base: Array, tokens: Array, samples: int, seed: int
) -> tuple[str, bool]:
    """A candidate beside the untouched base, and whether it is better."""
    untouched = Candidate("base", base[None], 0)
    losses = _Losses([candidate, untouched], tokens, Resamples(len(tokens), samples, seed))
    value, error, freedom = losses.difference(0, 1)
    half = student((1 + LEVEL) / 2, freedom) * error
    interval = (
        f"{value:+.4f} nats per token, 95 % interval {value - half:+.4f} to {value + half:+.4f}"
    )
    if value + half < 0:
        return f"Against the untouched base: {interval}", True
    return f"{candidate.name} is no better than the untouched base ({interval})", False


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _listed(names: Sequence[str]) -> str:
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
