"""How much of its rank a trained adapter needs: its truncations measured on held-out rows.

No training: the adapter of the largest rank is cut to each lower one (`adapters.resize`) and its
held-out loss is taken on the examples that settings are chosen on. This is not what an adapter
trained at the lower rank would reach, which is free to use its few directions otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils import logging as transformers_logging

from lighten import adapters, data
from lighten.adapters import files, resize, spectrum
from lighten.adapters.resize import Resized
from lighten.adapters.spectrum import SavedAdapter
from lighten.engine.batching import choose_packing
from lighten.engine.validation_loss import ValidationLoss
from lighten.errors import UserError
from lighten.evaluation import metrics
from lighten.evaluation.bootstrap import Estimate, Resamples
from lighten.evaluation.evaluation import held_out_examples
from lighten.evaluation.likelihood import measure_loss
from lighten.evaluation.verdicts import verdict
from lighten.machine import hardware
from lighten.models import Base, limits_of
from lighten.recipe import Recipe
from lighten.runs import Run
from lighten.training.base import load_base
from lighten.training.held_out_data import encoded

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Point:
    """One rank of the curve.

    Attributes:
        rank: The highest of any layer.
        losses: Per held-out row.
        difference: Of the loss from that of the whole adapter, paired over rows.
        verdict: In words: worse, better, or no difference found.
        energy_kept: Share of the update's squared norm.
        parameters: Trained numbers that are left.
    """

    rank: int
    losses: ValidationLoss
    difference: Estimate
    verdict: str
    energy_kept: float
    parameters: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, without the rows' own losses."""
        return {
            "rank": self.rank,
            "loss": self.losses.loss,
            "loss_se": self.losses.standard_error,
            "difference": self.difference.to_dict(),
            "verdict": self.verdict,
            "energy_kept": self.energy_kept,
            "parameters": self.parameters,
        }


@dataclass(frozen=True)
class TruncatedCurve:
    """Held-out loss over rank, of one trained adapter.

    Attributes:
        adapter: Its name in the run.
        trained_rank: The rank it was trained at.
        base: The untouched base on the same rows.
        points: By falling rank; the first is the adapter as it was trained.
    """

    adapter: str
    trained_rank: int
    base: ValidationLoss
    points: tuple[Point, ...]

    @property
    def enough(self) -> int | None:
        """The smallest rank whose loss, like every larger one's, is not found to be worse.

        None where there are too few examples to find that by.
        """
        rank = self.trained_rank
        for point in self.points:
            if point.verdict == "too few examples":
                return None
            if point.verdict in ("worse", "not a number"):
                break
            rank = point.rank
        return rank

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "adapter": self.adapter,
            "trained_rank": self.trained_rank,
            "base_loss": self.base.loss,
            "enough": self.enough,
            "points": [point.to_dict() for point in self.points],
        }


def truncated_curve(
    run: Run,
    ranks: Sequence[int],
    *,
    adapter: str | None = None,
    progress: Progress | None = None,
) -> TruncatedCurve:
    """The held-out loss of a run's adapter cut to lower ranks, without any training.

    Args:
        run: A finished run.
        ranks: Ranks below the trained one; others are passed over, the trained one is always there.
        adapter: Which adapter; None takes the one of the largest rank.
        progress: Log what is being done, how far it is, and of how much.

    Raises:
        UserError: No LoRA adapter, no held-out rows, or no rank below the trained one.
    """
    name, saved = _largest(run, adapter)
    lower = sorted({rank for rank in ranks if rank < saved.largest_rank}, reverse=True)
    if not lower:
        raise UserError(
            f"--truncate: adapter {name} has rank {saved.largest_rank}, and none of the ranks "
            f"{', '.join(map(str, ranks)) or '(none)'} is below it; give lower ones"
        )
    recipe = run.recipe()
    transformers_logging.disable_progress_bar()
    # Those that a sweep's arms are chosen on, so that both curves stand on the same examples.
    raw_data = held_out_examples(recipe, run.info().get("data", {}).get("sha256"), test=False)
    base = load_base(recipe, hardware.choose_device().value)
    data.choose_template(base.tokenizer, recipe.chat_template)
    encoded_data = encoded(
        recipe, raw_data, base.tokenizer, limits_of(base.model), recipe.evaluate.max_examples
    )
    assert encoded_data.rows is not None
    rows = encoded_data.rows.rows
    cuts = [resize.at_rank(saved, rank) for rank in (saved.largest_rank, *lower)]
    measured: list[ValidationLoss] = []
    for place, cut in enumerate([None, *cuts]):
        if progress is not None:
            label = "base" if cut is None else f"rank {cut.config['r']}"
            progress(f"{name}: {label}", place, len(cuts) + 1)
        measured.append(_loss(base, recipe, cut, rows))
    untouched, full, *_ = measured
    draws = Resamples(len(full.nll), recipe.evaluate.bootstrap_samples, recipe.evaluate.seed)
    points = [
        _point(rank, cut, losses, full, draws)
        for rank, cut, losses in zip((saved.largest_rank, *lower), cuts, measured[1:], strict=True)
    ]
    return TruncatedCurve(name, saved.largest_rank, untouched, tuple(points))


def _largest(run: Run, adapter: str | None) -> tuple[str, SavedAdapter]:
    """The named adapter of a run, or the one of the largest rank."""
    folders = run.adapters()
    if not folders:
        raise UserError(f"{run.folder} has no adapter to truncate; train one first")
    if adapter is not None and adapter not in folders:
        raise UserError(f"{run.folder} has no adapter {adapter!r}; it has {', '.join(folders)}")
    saved = {name: spectrum.read(folders[name]) for name in ([adapter] if adapter else folders)}
    name = max(saved, key=lambda candidate: saved[candidate].largest_rank)
    return name, saved[name]


def _loss(base: Base, recipe: Recipe, cut: Resized | None, rows: Sequence[Any]) -> ValidationLoss:
    """Held-out loss of one truncation (None: the base), which is taken off again."""
    cohort = adapters.attach(base.model, [])
    adapter = None
    if cut is not None:
        adapter = "cut"
        cohort.add(files.spec_from_peft(adapter, cut.config, "a truncation"))
        files.restore(cohort, adapter, cut.weights, where="a truncation")
    packs = choose_packing(recipe.packing, base.model, cohort.no_packing).value == "on"
    try:
        return measure_loss(base, cohort, rows, adapter, recipe, packs=packs)
    finally:
        cohort.detach()


def _point(
    rank: int, cut: Resized, losses: ValidationLoss, full: ValidationLoss, draws: Resamples
) -> Point:
    ours, theirs = (
        metrics.likelihood_statistics(measured.nll, measured.tokens) for measured in (losses, full)
    )
    difference = draws.difference(ours, theirs, metrics.mean_loss)
    outcome = verdict(difference, len(losses.nll), lower_is_better=True)
    return Point(rank, losses, difference, outcome, cut.energy_kept, cut.parameters)
