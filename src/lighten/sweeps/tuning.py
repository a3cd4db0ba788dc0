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
    """The rates to try."""
    if RATE in grid:
        return list(grid[RATE])
    own = recipe.learning_rate
    middle = own[0] if isinstance(own, list) else own
    return [float(f"{middle * factor:.3g}") for factor in FACTORS]


def steps_of(wanted: int) -> int:
    """Steps of a tuning run."""
    return max(1, round(wanted * SHARE))


def tuning_arms(
    recipe: Recipe, grid: Mapping[str, Sequence[Any]], rates: Sequence[float]
) -> list[Arm]:
    """Every setting at every rate, with its first seed, in short runs."""
    short: dict[str, Any] = {"eval_steps": None, "early_stopping_patience": None,
                             "load_best_model_at_end": False}  # fmt: skip
    if recipe.max_steps is not None:
        short["max_steps"] = steps_of(recipe.max_steps)
    else:
        short["num_train_epochs"] = recipe.num_train_epochs * SHARE
    once = {key: list(values)[:1] if key == "seed" else values for key, values in grid.items()}
    return expand(recipe.changed(short), {**once, RATE: list(rates)})


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
    found = {}
    for setting, own in losses.items():
        known = {rate: loss for rate, loss in own.items() if loss is not None}
        best = min(known, key=lambda rate: known[rate]) if known else min(own, key=float)
        ordered = sorted(own, key=float)
        edge = len(ordered) > 1 and best in (ordered[0], ordered[-1])
        found[setting] = {"losses": dict(own), "best": float(best), "at_the_edge": edge}
    return found


def with_best_rates(
    recipe: Recipe, grid: Mapping[str, Sequence[Any]], tuned: Mapping[str, Any]
) -> list[Arm]:
    """The arms to compare, each at its own rate."""
    arms = expand(recipe, {key: values for key, values in grid.items() if key != RATE})
    made = []
    for arm in arms:
        rate = tuned[untuned(arm)]["best"]
        made.append(Arm(arm.name, {**arm.sets, RATE: rate}, arm.recipe.changed({RATE: rate})))
    return made


def told(tuned: Mapping[str, Any]) -> list[str]:
    """What was found, in words."""
    sentences = []
    for setting, own in tuned.items():
        edge = ", at the edge of those tried: more may be had beyond" if own["at_the_edge"] else ""
        what = ", ".join(f"{key} {value}" for key, value in json.loads(setting).items())
        sentences.append(f"{what}: best learning rate {own['best']:g}{edge}")
    return sentences
