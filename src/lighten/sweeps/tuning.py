"""Each setting's own best learning rate, found in short runs before settings are compared.

A rank that learns at another's best rate is compared unfairly. The runs that find the rates are a
quarter as long as the comparison: short runs favour somewhat higher rates, for all ranks alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lighten.recipe import Recipe
from lighten.sweeps.arms import Arm, expand

# Around the recipe's own rate, where the sweep names none.
FACTORS = (1 / 3, 1.0, 3.0)
SHARE = 0.25
RATE = "learning_rate"


def rates_of(recipe: Recipe, grid: Mapping[str, Sequence[Any]]) -> list[float]:
    """The rates to try: those swept, those that the recipe lists, or three around its own."""
    if RATE in grid:
        return list(grid[RATE])
    if isinstance(recipe.learning_rate, list):
        return list(dict.fromkeys(recipe.learning_rate))
    return [float(f"{recipe.learning_rate * factor:.3g}") for factor in FACTORS]


def untuned_arms(recipe: Recipe, grid: Mapping[str, Sequence[Any]]) -> list[Arm]:
    """The arms to compare, before each has its own rate."""
    settings = {key: values for key, values in grid.items() if key != RATE}
    return expand(_of_one_rate(recipe), settings)


def _of_one_rate(recipe: Recipe) -> Recipe:
    """The recipe without its list of rates, which are tried and make no arms."""
    rate = recipe.learning_rate
    return recipe.changed({RATE: rate[0]}) if isinstance(rate, list) else recipe


def steps_of(total_steps: int) -> int:
    """Steps of a tuning run."""
    return max(1, round(total_steps * SHARE))


def shorter_warmup(recipe: Recipe, share: float) -> dict[str, Any]:
    """The change that leaves the warm-up of a shortened run the part of it that it was to have.

    Args:
        recipe: Of the run at its whole length.
        share: Of its steps that are made.
    """
    warmup = recipe.warmup_steps
    if warmup is None or warmup < 1 or share >= 1:  # none, or a share of the steps already
        return {}
    return {"warmup_steps": max(1, round(warmup * share))}


def describe_warmup(warmup: Mapping[str, Any], recipe: Recipe) -> str:
    """A changed warm-up in words; nothing where it is as it was."""
    if not warmup:
        return ""
    return f", warm-up {warmup['warmup_steps']} of {recipe.warmup_steps:g} steps"


def tuning_arms(
    recipe: Recipe, grid: Mapping[str, Sequence[Any]], rates: Sequence[float]
) -> list[Arm]:
    """Every setting at every rate, with its first seed, in short runs."""
    short: dict[str, Any] = {"eval_steps": None, "early_stopping_patience": None,
                             "load_best_model_at_end": False}  # fmt: skip
    short |= shorter_warmup(recipe, SHARE)
    if recipe.max_steps is not None:
        short["max_steps"] = steps_of(recipe.max_steps)
    else:
        short["num_train_epochs"] = recipe.num_train_epochs * SHARE
    once = {key: list(values)[:1] if key == "seed" else values for key, values in grid.items()}
    return expand(_of_one_rate(recipe).changed(short), {**once, RATE: list(rates)})


def untuned(arm: Arm) -> str:
    """What an arm tries but for its rate and seed."""
    return json.dumps(
        {k: v for k, v in arm.sets.items() if k not in (RATE, "seed")}, sort_keys=True
    )


def chosen(losses: Mapping[str, Mapping[str, float | None]]) -> dict[str, Any]:
    """The rate of the lowest held-out loss for each setting.

    Args:
        losses: By setting, by rate; None where it diverged.
    """
    best_rates = {}
    for setting, by_rate in losses.items():
        converged = {rate: loss for rate, loss in by_rate.items() if loss is not None}
        best = (
            min(converged, key=lambda rate: converged[rate])
            if converged
            else min(by_rate, key=float)
        )
        ordered = sorted(by_rate, key=float)
        edge = len(ordered) > 1 and best in (ordered[0], ordered[-1])
        best_rates[setting] = {"losses": dict(by_rate), "best": float(best), "at_the_edge": edge}
    return best_rates


def with_best_rates(
    recipe: Recipe, grid: Mapping[str, Sequence[Any]], tuned: Mapping[str, Any]
) -> list[Arm]:
    """The arms to compare, each at its own rate."""
    tuned_arms = []
    for arm in untuned_arms(recipe, grid):
        rate = tuned[untuned(arm)]["best"]
        tuned_arms.append(Arm(arm.name, {**arm.sets, RATE: rate}, arm.recipe.changed({RATE: rate})))
    return tuned_arms


def describe(tuned: Mapping[str, Any]) -> list[str]:
    """What was found, in words."""
    sentences = []
    for setting, outcome in tuned.items():
        edge = (
            ", at the edge of those tried: more may be had beyond" if outcome["at_the_edge"] else ""
        )
        what = ", ".join(f"{key} {value}" for key, value in json.loads(setting).items())
        sentences.append(f"{what}: best learning rate {outcome['best']:g}{edge}")
    return sentences
