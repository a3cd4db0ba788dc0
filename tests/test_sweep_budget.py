"""A sweep within a time: what is planned, who leaves, and what is said of what was cut."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lighten
from lighten.engine.validation_loss import ValidationLoss
from lighten.runs import Run
from lighten.sweeps import time_plan
from lighten.sweeps.budget import TIME_UP, Halving, Speed, Work, keep, longest
from lighten.sweeps.measure import Measurement
from lighten.sweeps.result import SweepResult, _add_differences, _comparable, _recommended


@pytest.fixture
def settings(tiny_folder: Path, chat_file: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(tiny_folder), "dataset": str(chat_file), "dtype": "float32",
        "output_dir": str(tmp_path / "sweep"), "learning_rate": 1e-2, "val_size": 24,
        "per_device_train_batch_size": 4, "evaluate.max_new_tokens": 4,
    }  # fmt: skip


def sweep(settings: dict[str, Any], **changes: Any) -> SweepResult:
    return lighten.sweep(progress=False, **{**settings, **changes})


SPEED = Speed(step_s=1.0, evaluation_s=1.0, measuring_s=5.0)


def test_halving_keeps_all_that_fit_and_drops_no_more_than_it_must() -> None:
    # One arm to the end: 100 steps, 10 evaluations, 5 s to measure.
    assert keep(8, 8 * 115, 100, 10, SPEED) == 8
    assert keep(8, 8 * 115 - 1, 100, 10, SPEED) == 8  # halved at the next rung
    assert keep(8, 120, 100, 10, SPEED) == 1
    assert keep(8, 0, 100, 10, SPEED) == 1
    arm_counts = [keep(8, float(budget), 100, 10, SPEED) for budget in range(0, 1000, 20)]
    assert arm_counts == sorted(arm_counts)
    assert set(arm_counts) >= {1, 2, 4, 8}
    # Eight arms for a rung, four for one, two for one, one for the rest, and all are measured.
    assert keep(8, 14 * 11 + 70 + 7 + 8 * 5, 100, 10, SPEED) == 8


def test_an_arm_whose_loss_is_not_a_number_leaves_first(tmp_path: Path) -> None:
    losses = {name: ValidationLoss((value,), (1,))
              for name, value in (("broken", math.nan), ("worse", 2.0), ("good", 1.0))}  # fmt: skip
    pruner = Halving(tmp_path, 100, 10, lambda: 60.0, SPEED)  # for one arm of the three
    assert set(pruner.leaving(50, losses, list(losses))) == {"broken", "worse"}


def test_the_longest_run_that_fits_is_planned() -> None:
    def rung(steps: int) -> int:
        return max(1, steps // 8)

    work = [Work(3, SPEED)]
    assert longest(work, 1e9, 100, rung) == 100
    assert longest(work, 0.0, 100, rung) == 1
    planned = [longest(work, float(budget), 100, rung) for budget in range(0, 400, 20)]
    assert planned == sorted(planned)
    assert 1 < planned[8] < 100


def test_arms_alone_in_their_runs_are_planned_to_come_to_their_end() -> None:
    """None of them can be dropped, so each needs the whole of its time; slow ones need more."""
    slow = replace(SPEED, step_s=3.0, starting_s=2.0)
    one = Work(1, SPEED)
    for work in ([one] * 4, [one, Work(1, slow)], [Work(5, SPEED), Work(1, slow)]):
        steps = longest(work, 600.0, 10_000, lambda _: 10)
        needs_s = [each.needs_s(steps, 10) for each in work]
        shares_s = [600.0 * need_s / sum(needs_s) for need_s in needs_s]
        for each, need_s, share_s in zip(work, needs_s, shares_s, strict=True):
            assert each.arms > 1 or need_s < share_s
        assert steps > 50
    # Together, half of them may be dropped: more steps.
    assert longest([Work(4, SPEED)], 600.0, 10_000, lambda _: 10) > longest(
        [Work(1, SPEED)] * 4, 600.0, 10_000, lambda _: 10
    )


@pytest.mark.slow
def test_a_budget_is_kept_and_leaves_a_valid_result(settings: dict[str, Any]) -> None:
    began = time.monotonic()
    result = sweep(
        {**settings, "max_steps": 20000},
        lora_r=[1, 2, 4, 8], budget="20s", metric="chrf",
    )  # fmt: skip
    took = time.monotonic() - began
    plan = result.data["plan"]
    assert plan["steps"] < plan["wanted_steps"] == 20000
    # A shared machine's speed changes under way; what is promised is that the end comes near.
    assert took < 40
    assert result.data["status"] == "finished"
    arms = [arm for arm in result.arms if not arm["reference"]]
    assert all("loss" in arm for arm in arms)
    assert max(arm["steps"] for arm in arms) > 0
    assert result.data["recommendation"]["reasons"]
    unfinished = [arm for arm in arms if arm["status"] == "left"]
    assert all(arm["why"] for arm in unfinished)


@pytest.mark.slow
def test_arms_in_separate_runs_share_a_budget(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time_plan, "LOOK_SHARE", 1.0)
    result = sweep(
        {**settings, "max_steps": 20000},
        use_dora=[True, False], budget="25s", metric="loss", reference=["base", "full"],
        warmup_steps=10000,
    )  # fmt: skip
    speeds = result.data["plan"]["speeds"]
    assert set(speeds) == {"dora", "no-dora", "full"}
    assert len({speed["step_s"] for speed in speeds.values()}) == 3
    arms = [arm for arm in result.arms if arm["name"] in speeds]
    for arm in arms:  # half of all steps, however few of them there is time for
        trained = Run(result.folder / arm["group"]).recipe()
        assert trained.warmup_steps == pytest.approx(result.data["plan"]["steps"] / 2, abs=1)
    assert "of 10000 steps" in result.data["plan"]["note"]
    assert all(arm["of_steps"] == result.data["plan"]["steps"] for arm in arms)
    # A machine that others slow down may cut some; what was cut is never said to have ended.
    ended = [arm for arm in arms[:2] if arm["status"] != "left"]
    assert all(arm["steps"] == result.data["plan"]["steps"] for arm in ended)
    if "all that was trained to the end" in result.data["recommendation"]["reasons"][0]:
        assert len(ended) == 1


@pytest.mark.parametrize(
    ("steps", "verdict", "says"),
    [
        ((91, 92), "not comparable", "after 91 to 92 steps of 158"),
        ((92, 92), "no difference found", "The time was up after step 92 of 158"),
        ((92,), "smallest as good as the best", "r1 is left of those tried"),
    ],
)
def test_arms_that_the_time_cut_are_compared_at_one_step_alone(
    settings: dict[str, Any], steps: tuple[int, ...], verdict: str, says: str
) -> None:
    """And none of them is said to have been trained to its end."""
    flat = {key: value for key, value in settings.items() if "." not in key}
    recipe = lighten.Recipe.from_values({**flat, "sweep": {"use_dora": [True, False]}})
    rows = [
        {"name": f"r{place}", "sets": {}, "setting": f"r{place}", "reference": None,
         "status": "left", "why": TIME_UP, "steps": made, "of_steps": 158, "epochs": 1.0,
         "file_bytes": place, "served": {"share_of_base": 0.1}}
        for place, made in enumerate(steps, start=1)
    ]  # fmt: skip
    measured = {row["name"]: Measurement(row["name"], [1.0, 2.0, 5.0] * 10, [2] * 30)
                for row in rows}  # fmt: skip
    compared = _comparable(rows, measured)
    recommendation, _ = _recommended(rows, compared, measured, recipe)
    assert recommendation.verdict == verdict
    assert (recommendation.name is None) == (verdict == "not comparable")
    reasons = " ".join(recommendation.reasons)
    assert says in reasons
    assert "all that was trained" not in reasons


@pytest.mark.parametrize("left", [True, False])
def test_no_verdict_stands_on_a_reference_that_the_time_cut(
    settings: dict[str, Any], left: bool
) -> None:
    flat = {key: value for key, value in settings.items() if "." not in key}
    recipe = lighten.Recipe.from_values({**flat, "sweep": {"lora_r": [2, 4], "metric": "loss"}})
    rows: list[dict[str, Any]] = [
        {"name": "r2", "reference": None, "status": "finished"},
        {"name": "full", "reference": "full", "status": "left" if left else "finished"},
        {"name": "base", "reference": "base", "status": "finished"},
    ]
    measured = {
        row["name"]: Measurement(
            row["name"], [1.0 + place, 2.0] * 15, [2] * 30,
            statistics={"loss": [[1.0 + place, 2], [2.0, 2]] * 15},
        )
        for place, row in enumerate(rows)
    }  # fmt: skip
    _add_differences(rows, measured, recipe)
    assert set(rows[0]["against"]) == ({"base"} if left else {"base", "full"})
