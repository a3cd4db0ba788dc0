"""What runs teach plans: only whole runs, and only those of models like the planned one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lighten import api
from lighten.planning import calibration
from lighten.planning.result import States
from tests.test_plan_calibration import GIB, a_plan, pair


@pytest.fixture(autouse=True)
def own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTEN_CALIBRATION", str(tmp_path / "calibration.json"))
    monkeypatch.delenv("LIGHTEN_PLAN")


def planned(weights: float, model: str = "smollm2-135m") -> Any:
    return replace(a_plan(), model=model, states=States(weights - 1e6, 1e6, 1e6, 2e6))


@pytest.mark.parametrize("weights", [1e5, 5e6, 170e6, 430e6, 16e9])
def test_runs_of_other_models_leave_a_plan_as_it_is(weights: float) -> None:
    """Five runs each of toys, of models half as large and of far larger ones."""
    for _ in range(5):
        calibration.add(pair(1.25, 1.25, model="m/toy", weights_bytes=weights))
    plan = planned(279e6)
    assert calibration.corrected(plan, "here") == plan


@pytest.mark.parametrize("weights", [200e6, 279e6, 400e6])
def test_runs_of_models_alike_correct_it(weights: float) -> None:
    for _ in range(5):
        calibration.add(pair(1.25, 1.25, model="another folder", weights_bytes=weights))
    plan = calibration.corrected(planned(279e6), "here")
    assert plan.memory.expected == pytest.approx(5 * GIB)


def test_pairs_of_earlier_versions_count_for_the_same_name_alone() -> None:
    for _ in range(5):
        calibration.add(pair(1.25, 1.25, model="m/toy"))
    plan = planned(279e6)
    assert calibration.corrected(plan, "here") == plan
    assert calibration.corrected(planned(279e6, "m/toy"), "here").memory.expected > 4 * GIB


def test_what_went_on_from_a_checkpoint_is_not_remembered(
    tmp_path: Path, tiny_folder: Path, chat_file: Path
) -> None:
    recipe: dict[str, Any] = {
        "model_name_or_path": str(tiny_folder), "dataset": str(chat_file), "max_steps": 2,
        "output_dir": str(tmp_path / "run"), "save_steps": 1, "val_size": 0.2,
    }  # fmt: skip
    api.train(None, progress=False, **recipe)
    (first_pair,) = calibration.pairs()
    assert first_pair["weights_bytes"] > 0
    api.train(None, progress=False, resume=True, **recipe)
    assert calibration.pairs() == [first_pair]
