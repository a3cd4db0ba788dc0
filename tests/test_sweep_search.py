"""A search through Optuna: what it asks, what it remembers, and that a kill costs no trial."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lighten.errors import MissingExtra, UserError
from lighten.recipe import Recipe
from lighten.sweeps.arms import Arm, Group
from lighten.sweeps.search import JOURNAL, TOGETHER, Search, Trial

SPACE = {"lora_r": [2, 4, 8, 16], "learning_rate": {"min": 1e-5, "max": 1e-1, "log": True}}


def recipe(chat_file: Path, *, trials: int = 20, search: str = "tpe", **grid: Any) -> Recipe:
    return Recipe.from_values(
        {"model_name_or_path": "tiny", "dataset": str(chat_file), "lora_r": 4, "lora_alpha": 12,
         "sweep": {**(grid or SPACE), "search": search, "trials": trials}}
    )  # fmt: skip


def arms_of(groups: Sequence[Group]) -> list[Arm]:
    return [arm for group in groups for arm in group.arms]


def valley(groups: Sequence[Group]) -> dict[str, float | None]:
    """Lowest, 1, at rank 8 and a rate of 1e-3."""
    losses: dict[str, float | None] = {}
    for arm in arms_of(groups):
        options = arm.options
        away = math.log10(options.learning_rate / 1e-3) ** 2 + abs(math.log2(options.lora_r / 8))
        losses[arm.name] = 1.0 + away
    return losses


def run_search(
    search: Search, train: Callable[[Sequence[Group]], Mapping[str, float | None]]
) -> list[Trial]:
    """Ask, train and tell, as a sweep does, until every trial has been made; the best first."""
    while groups := search.ask():
        search.tell(train(groups))
    return completed(search)


def completed(search: Search) -> list[Trial]:
    """The settings that were trained to the end, best first."""
    done = [trial for trial in search._drawn_trials() if trial.loss is not None]
    return sorted(done, key=lambda trial: float(trial.loss or 0.0))


def test_without_optuna_the_command_is_named(
    chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(MissingExtra, match=r"optuna is not installed.*lighten\[search\]"):
        Search(recipe(chat_file), tmp_path)


def test_a_search_needs_something_to_draw_for_one_adapter(chat_file: Path, tmp_path: Path) -> None:
    plain = Recipe.from_values({"model_name_or_path": "m", "dataset": str(chat_file)})
    with pytest.raises(UserError, match="draws swept settings, and there are none"):
        Search(plain, tmp_path)
    two = recipe(chat_file).changed({"adapters": [{"name": "a"}, {"name": "b", "lora_r": 2}]})
    with pytest.raises(UserError, match="the recipe spells out 2"):
        Search(two, tmp_path)


@pytest.mark.parametrize("method", ["tpe", "random"])
def test_a_search_draws_what_the_recipe_allows(
    chat_file: Path, tmp_path: Path, method: str
) -> None:
    pytest.importorskip("optuna", reason="the extra search is not installed")
    trials = run_search(Search(recipe(chat_file, search=method), tmp_path), valley)
    assert (tmp_path / JOURNAL).is_file()
    assert 10 <= len(trials) <= 20
    losses = [trial.loss for trial in trials if trial.loss is not None]
    assert losses == sorted(losses)
    for trial in trials:
        options = trial.arm.options
        assert options.lora_r in SPACE["lora_r"]
        assert 1e-5 <= options.learning_rate <= 1e-1
        # The scale stays the recipe's, 3, whatever the rank (trap 25).
        assert options.lora_alpha == pytest.approx(3 * options.lora_r)
        assert trial.loss == valley([Group("alone", (trial.arm,))])[trial.arm.name]


def test_tpe_learns_from_what_it_is_told(chat_file: Path, tmp_path: Path) -> None:
    """After 40 trials it is nearer than chance: of 40 random draws the best is a seed's luck."""
    pytest.importorskip("optuna", reason="the extra search is not installed")
    search = Search(recipe(chat_file, trials=40), tmp_path)
    trials = run_search(search, valley)
    best = trials[0].arm.options
    assert best.lora_r == 8
    assert 3e-4 < best.learning_rate < 3e-3
    late = [trial for trial in trials if int(trial.arm.name.rpartition("-")[2]) >= 20]
    early = [trial for trial in trials if int(trial.arm.name.rpartition("-")[2]) < 10]
    mean = lambda trials: sum(trial.loss or 0.0 for trial in trials) / len(trials)  # noqa: E731
    assert mean(late) < 0.7 * mean(early)


def test_a_search_that_was_killed_goes_on_with_the_same_trials(
    chat_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("optuna", reason="the extra search is not installed")
    rounds: list[list[str]] = []

    def killed(groups: Sequence[Group]) -> Mapping[str, float | None]:
        rounds.append([group.name for group in groups] + [arm.name for arm in arms_of(groups)])
        if len(rounds) == 3:
            raise KeyboardInterrupt
        return valley(groups)

    with pytest.raises(KeyboardInterrupt):
        run_search(Search(recipe(chat_file), tmp_path), killed)
    before = {
        trial.arm.name: trial.loss for trial in completed(Search(recipe(chat_file), tmp_path))
    }
    assert 0 < len(before) <= 2 * TOGETHER
    resumed = Search(recipe(chat_file), tmp_path)
    waiting = resumed.ask()
    # The names of run folders among them, which hold the checkpoints to go on from.
    assert [group.name for group in waiting] + [arm.name for arm in arms_of(waiting)] == rounds[2]
    trials = run_search(resumed, valley)
    after = {trial.arm.name: trial.loss for trial in trials}
    assert before.items() <= after.items()
    assert {arm.name for arm in arms_of(waiting)} <= set(after)
    assert set(after) <= {arm.name for arm in arms_of(resumed.groups())}
    rates = [trial.arm.options.learning_rate for trial in trials]
    assert len(set(rates)) == len(rates)  # a sampler begun anew would draw the first ones again
    assert Search(recipe(chat_file), tmp_path).ask() == []


def test_a_setting_that_diverges_is_one_bad_trial(chat_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="the extra search is not installed")

    def diverging(groups: Sequence[Group]) -> Mapping[str, float | None]:
        losses = valley(groups)
        return {
            arm.name: (None if arm.options.lora_r == 2 else math.nan)
            if arm.options.learning_rate > 1e-2
            else losses[arm.name]
            for arm in arms_of(groups)
        }

    trials = run_search(Search(recipe(chat_file), tmp_path), diverging)
    assert trials
    assert all(trial.arm.options.learning_rate <= 1e-2 for trial in trials)


def test_a_small_space_is_not_trained_twice(chat_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="the extra search is not installed")
    trained: list[str] = []

    def count(groups: Sequence[Group]) -> Mapping[str, float | None]:
        trained.extend(arm.setting for arm in arms_of(groups))
        return valley(groups)

    small = {"lora_r": [2, 8], "lora_target_modules": [["q_proj"], "all-linear"]}
    search = Search(recipe(chat_file, **small), tmp_path)
    trials = run_search(search, count)
    assert len(trials) == 20, "one that was drawn twice at a time counts too"
    assert all(trial.state == "complete" for trial in search._drawn_trials())
    assert len(set(trained)) == len(trained) <= 4
    assert trials[0].arm.options.lora_r == 8
    assert trials[0].arm.options.lora_target_modules in (["q_proj"], "all-linear")


def test_what_came_to_nothing_is_not_trained_twice(chat_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="the extra search is not installed")
    trained: list[str] = []

    def diverging(groups: Sequence[Group]) -> Mapping[str, float | None]:
        trained.extend(arm.setting for arm in arms_of(groups))
        losses = valley(groups)
        return {
            arm.name: None if arm.options.learning_rate > 1 else losses[arm.name]
            for arm in arms_of(groups)
        }

    small: dict[str, Any] = {"lora_r": [2, 8], "learning_rate": [1e-3, 10.0]}
    search = Search(recipe(chat_file, search="random", **small), tmp_path)
    trials = run_search(search, diverging)
    assert len(set(trained)) == len(trained) == 4
    states = {trial.arm.name: trial.state for trial in search._drawn_trials()}
    assert len(states) == 20
    assert set(states.values()) == {"complete", "fail"}
    assert all(trial.arm.options.learning_rate < 1 for trial in trials)


def test_another_space_is_another_search(chat_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="the extra search is not installed")
    Search(recipe(chat_file), tmp_path)
    with pytest.raises(UserError, match="holds a search over other settings"):
        Search(recipe(chat_file, lora_r=[2, 4]), tmp_path)
