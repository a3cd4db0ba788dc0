"""`max_time`: as many steps as fit, said before they start, kept over a kill, the same for arms."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lighten
from lighten.engine.schedule import learning_rate_factor
from lighten.machine.devices import named
from lighten.planning import predict
from lighten.recipe import Recipe, RecipeError
from lighten.runs import Run
from lighten.training import checkpoints, time_budget
from lighten.training.time_budget import Pace, TimeBudget, steps_within
from tests.cut_runs import cut_short, losses, same_tensors, weights
from tests.processes import notes_of, runs_of_rank, start_ranks, wait_for


@pytest.fixture
def settings(tiny_folder: Path, chat_file: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(tiny_folder), "dataset": str(chat_file), "dtype": "float32",
        "output_dir": str(tmp_path / "run"), "lora_r": [2, 4], "lora_dropout": 0.1,
        "learning_rate": 1e-2, "per_device_train_batch_size": 4, "val_size": 0.2,
        "lr_scheduler_type": "cosine", "num_train_epochs": 1000, "max_time": "0.8s",
        "eval_steps": 5, "save_steps": 5, "save_total_limit": 1000,
    }  # fmt: skip


def train(settings: dict[str, Any], **changes: Any) -> Run:
    return lighten.train(progress=False, **{**settings, **changes})


def never_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others at work on the machine shall not cut the run short here."""
    monkeypatch.setattr(TimeBudget, "fewer_steps", lambda *_: None)


@pytest.mark.parametrize("every", [1, 3, 50])
def test_steps_within_are_the_most_whose_time_with_evaluations_is_there(every: int) -> None:
    pace = Pace(step_s=0.3, evaluation_s=1.1)
    for left_s in (-1.0, 0.0, 1.5, 7.77, 40.0, 1e6):
        enough = [1]
        for steps in range(1, 101):
            evaluations = len([s for s in range(1, steps + 1) if s % every == 0 or s == steps])
            if steps * 0.3 + evaluations * 1.1 <= left_s:
                enough.append(steps)
        assert steps_within(left_s, pace, 100, every) == max(enough)


@pytest.mark.parametrize("every", [0.05, 0.3, 0.5])
def test_steps_within_leave_time_for_evaluations_after_a_share_of_them(every: float) -> None:
    pace = Pace(step_s=0.3, evaluation_s=1.1)
    for left_s in (1.5, 7.77, 40.0):
        steps = steps_within(left_s, pace, 100, every)
        evaluations = len({*range(0, steps + 1, math.ceil(steps * every)), steps} - {0})
        assert steps == 100 or left_s - 3 * 1.1 < steps * 0.3 + evaluations * 1.1 <= left_s


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_with_a_time_is_the_run_with_its_number_of_steps(
    method: str,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Trying the speed leaves nothing behind: same losses, rates and weights, bit for bit."""
    never_late(monkeypatch)
    if method == "full":
        settings |= {"method": "full", "lora_r": 8, "lora_dropout": 0.0}
    timed = lighten.train(**settings)
    output = capfd.readouterr().err
    steps = timed.info()["training"]["steps"]
    # Of a busy machine one step may take longer.
    fitting = rf": {steps} steps? of 8,000, [\d.]+ of an epoch|is too short: one step is made"
    assert re.search(rf"max_time 0.8s ?({fitting}).*; a step takes", output)
    (choice,) = [entry for entry in timed.info()["choices"] if entry["what"] == "steps"]
    assert choice["value"] == str(steps)
    assert 1 <= steps < 8000
    by_steps = train(settings, max_time=None, max_steps=steps, output_dir=str(tmp_path / "counted"))
    assert losses(timed) == losses(by_steps)
    rates = [[m["learning_rate"] for m in run.metrics() if m["kind"] == "train"]
             for run in (timed, by_steps)]  # fmt: skip
    assert rates[0] == rates[1]
    if method == "lora":
        assert same_tensors(weights(timed), weights(by_steps))


def test_a_run_that_goes_on_keeps_its_number_of_steps(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never_late(monkeypatch)
    monkeypatch.setattr(TimeBudget, "steps", lambda *_: 12)
    uninterrupted = train(settings)
    assert uninterrupted.info()["training"]["steps"] == 12
    folder = cut_short(uninterrupted, tmp_path / "cut").folder
    assert checkpoints.read_state(folder / "checkpoints" / "checkpoint-5").elapsed_s > 0

    def measured_again(*_: Any) -> None:
        raise AssertionError("the speed was tried again")

    monkeypatch.setattr(TimeBudget, "measure", measured_again)
    known: list[float] = []
    made = TimeBudget.__init__

    def noted(self: TimeBudget, *arguments: Any) -> None:
        made(self, *arguments)
        known.append(self._evaluation_s)

    monkeypatch.setattr(TimeBudget, "__init__", noted)
    resumed = train(settings, resume=True, output_dir=str(folder))
    assert losses(resumed) == losses(uninterrupted)
    assert same_tensors(weights(resumed), weights(uninterrupted))
    measured = [m["seconds"] for m in uninterrupted.metrics()
                if (m["kind"], m["step"]) == ("eval", 5)]  # fmt: skip
    assert known == [pytest.approx(sum(measured))]  # of the adapters together
    choices = [[entry for entry in run.info()["choices"] if entry["what"] == "steps"]
               for run in (resumed, uninterrupted)]  # fmt: skip
    assert choices[0] == choices[1] != []


def test_steps_that_take_much_longer_than_those_tried_become_fewer(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TimeBudget, "steps", lambda *_: 30)
    monkeypatch.setattr(
        TimeBudget, "fewer_steps", lambda _self, step, _total, _s: 8 if step == 6 else None
    )
    run = lighten.train(**{**settings, "lora_r": 2})
    said = capfd.readouterr().err
    assert "8 in all instead of 30, so that max_time holds" in said
    assert "step 8/8 " in said
    lines = [m for m in run.metrics() if m["kind"] == "train"]
    assert [m["step"] for m in lines] == list(range(1, 9))
    # The rate ends its course where the run ends.
    factor = learning_rate_factor(7, 8, 1, "cosine")
    assert lines[-1]["learning_rate"] == pytest.approx(1e-2 * factor)
    assert [m["step"] for m in run.metrics() if m["kind"] == "eval"] == [5, 8]


def test_the_clock_counts_what_was_spent_before_and_bears_a_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time_budget.time, "monotonic", lambda: now[0])

    def after_five(step_s: float, spent_s: float = 0.0, evaluation_s: float = 0.0) -> int | None:
        now[0] = 1000.0
        clock = TimeBudget("100s", spent_s, every=1000, evaluation_s=evaluation_s)
        for step in range(1, 6):
            now[0] += step_s
            fewer = clock.fewer_steps(step, 50, step_s)
        return fewer

    assert after_five(2.0) is None  # as tried
    assert after_five(2.2) is None  # 110 s in all: near enough
    assert after_five(4.0) == 25
    assert after_five(2.0, spent_s=40.0) == 30
    assert after_five(2.0, evaluation_s=10.0) is None
    assert after_five(2.0, spent_s=60.0, evaluation_s=10.0) == 15
    assert after_five(200.0) == 6  # the time is over: one more, at the end of the rate's course


def test_time_for_all_steps_makes_all_of_them(
    settings: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    run = lighten.train(**{**settings, "num_train_epochs": 1, "max_time": "10m", "lora_r": 2})
    assert run.info()["training"]["steps"] == 8
    assert "max_time 10m is enough for all 8 steps, 1 of an epoch" in capfd.readouterr().err


def test_too_little_time_for_a_step_is_said(
    settings: dict[str, Any], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Whether or not it is the only one that is wanted."""
    for epochs in (0.1, 1):
        changes = {"num_train_epochs": epochs, "max_time": "0.001s", "lora_r": 2}
        run = lighten.train(**{**settings, **changes, "output_dir": str(tmp_path / str(epochs))})
        assert run.info()["training"]["steps"] == 1
        said = capfd.readouterr().err
        assert "max_time 0.001s is too short: one step is made all the same; a step takes" in said
        assert "enough" not in said


def test_two_ends_of_training_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="max_steps and max_time both say when training ends"):
        Recipe.from_values({**settings, "max_steps": 10})
    with pytest.raises(RecipeError, match=r"max_time: .*write a time such as 90s, 30m or 2h"):
        Recipe.from_values({**settings, "max_time": "soon"})
    with pytest.raises(RecipeError, match=r"sweep.max_time cannot be swept: .* max_steps"):
        Recipe.from_values({**settings, "sweep": {"max_time": ["1m", "2m"]}})


def test_a_plan_says_what_share_of_the_data_the_time_allows(settings: dict[str, Any]) -> None:
    recipe = Recipe.from_values({**settings, "num_train_epochs": 1000, "max_time": "30s"})
    plan = predict.plan(recipe, named("cpu"))
    assert plan.time is not None
    assert plan.steps is not None
    assert plan.run_seconds is not None
    if plan.steps < 8000:
        assert plan.run_seconds == pytest.approx(30, abs=2 * plan.time.seconds)
        pattern = f"max_time 30s: about {plan.steps:,} steps of 8,000, .* of an epoch"
        assert any(re.match(pattern, note) for note in plan.notes)
    short = Recipe.from_values({**settings, "num_train_epochs": 1, "max_time": "10h"})
    plan = predict.plan(short, named("cpu"))
    assert plan.steps == 8
    assert any("is enough for all 8 steps" in note for note in plan.notes)
    shortest = Recipe.from_values({**settings, "num_train_epochs": 0.1, "max_time": "0.000001s"})
    plan = predict.plan(shortest, named("cpu"))
    assert plan.steps == 1
    assert any("max_time 0.000001s is too short for a step, and" in note for note in plan.notes)


def test_the_time_of_a_run_counts_its_first_step_twice(settings: dict[str, Any]) -> None:
    """It checks the loss both ways and touches memory for the first time."""
    del settings["max_time"]
    one_step, nine_steps = (
        predict.plan(Recipe.from_values({**settings, "max_steps": n}), named("t4"))
        for n in (1, 9)
    )  # fmt: skip
    assert one_step.run_seconds is not None
    assert nine_steps.run_seconds is not None
    assert nine_steps.run_seconds / one_step.run_seconds == pytest.approx(10 / 2)


def test_every_arm_of_a_sweep_gets_the_steps_that_fit_its_time(settings: dict[str, Any]) -> None:
    """Two groups, one number of steps: arms that differ in steps say nothing about each other."""
    changes = {"lora_r": 4, "lora_dropout": 0.0, "max_time": "0.3s", "eval_steps": 4,
               "gradient_accumulation_steps": [1, 2], "metric": "loss",
               "reference": []}  # fmt: skip
    result = lighten.sweep(progress=False, **{**settings, **changes})
    plan = result.data["plan"]
    arms = [arm for arm in result.arms if not arm["reference"]]
    assert len(result.data["groups"]) == 2
    assert {arm["steps"] for arm in arms} == {plan["steps"]}
    assert plan["steps"] < plan["wanted_steps"]
    assert "per arm, 0.3s" in plan["note"]


def train_with_other_threads(ports: str, file: str) -> None:
    """In a rank: the second one has twice as many threads, and as many workers."""
    torch.set_num_threads(1 + int(os.environ["RANK"]))
    for run_settings, noted in runs_of_rank(ports, file):
        run = lighten.train(progress=False, planned=False, **run_settings)
        if os.environ["RANK"] == "0":
            noted["status"] = run.info()["status"]


def test_machines_with_other_numbers_of_cores_try_an_evaluation_of_the_same_rows(
    settings: dict[str, Any], chat_file: Path, tmp_path: Path
) -> None:
    del settings["val_size"]
    settings |= {
        "max_time": "10m", "num_train_epochs": 1, "per_device_train_batch_size": 26,
        "eval_dataset": str(chat_file), "per_device_eval_batch_size": 1, "max_train_samples": 13,
    }  # fmt: skip
    wait_for(start_ranks(train_with_other_threads, [settings], tmp_path / "runs.json"))
    assert notes_of(tmp_path / "runs.json", 0)[0]["status"] == "finished"
