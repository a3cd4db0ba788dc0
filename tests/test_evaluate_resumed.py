"""An evaluation that is ended goes on: what was measured is kept, of these models alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import lighten
from lighten import runs
from lighten.errors import UserError
from lighten.evaluation import evaluation, together
from lighten.evaluation.together import Job, Pass
from lighten.generation import slotted
from lighten.machine.hardware import PeakMemory
from lighten.runs import Run
from tests.test_evaluate import run as run  # the fixture

OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "batch_size": 8}
WAVES_OF_A_MODEL, MODELS = 3, 3


class Waves:
    """Counts what is measured, and ends the session before one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.measured, self.last = 0, 10**9
        monkeypatch.setattr(together, "ENOUGH_ROWS", 8)
        really = Pass._measure

        def measure(single_pass: Pass, wave: list[Job]) -> dict[str, Any]:
            if self.measured == self.last:
                raise KeyboardInterrupt
            self.measured += 1
            return really(single_pass, wave)

        monkeypatch.setattr(Pass, "_measure", measure)


@pytest.fixture
def waves(monkeypatch: pytest.MonkeyPatch) -> Waves:
    return Waves(monkeypatch)


@pytest.fixture
def copied(run: Run, tmp_path: Path) -> Run:
    return Run(shutil.copytree(run.folder, tmp_path / "run"))


pytestmark = pytest.mark.usefixtures("one_pass")


@pytest.fixture
def one_pass(run: Run) -> None:
    base = lighten.models.load(str(run.recipe().model_name_or_path), dtype="float32")
    if (obstacle := slotted.obstacle(base.model)) is not None:
        pytest.skip(obstacle)


def figures(measured: Any) -> tuple[Any, ...]:
    metrics = [model["metrics"] for model in measured.models]
    return metrics, measured.differences, measured.examples


def ended_after(count: int, measured: Run, waves: Waves) -> None:
    waves.last = count
    with pytest.raises(KeyboardInterrupt):
        lighten.evaluate(measured, **OPTIONS)
    waves.last, waves.measured = 10**9, 0


def test_it_goes_on_where_it_was_ended(copied: Run, waves: Waves) -> None:
    whole = lighten.evaluate(copied, **OPTIONS)
    every = waves.measured
    assert every == WAVES_OF_A_MODEL * MODELS
    waves.measured = 0
    ended_after(WAVES_OF_A_MODEL + 1, copied, waves)
    again = lighten.evaluate(copied, **OPTIONS)
    assert waves.measured == every - WAVES_OF_A_MODEL - 1
    assert figures(again) == figures(whole)
    assert not (copied.folder / runs.EVALUATION_PARTS).exists()
    waves.measured = 0
    lighten.evaluate(copied, **OPTIONS)
    assert waves.measured == every, "what was finished is measured anew"


def test_the_peak_is_that_of_all_sessions(
    copied: Run, waves: Waves, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PeakMemory, "read", lambda _: {"peak_bytes": 7 * 2**30, "method": "told"})
    ended_after(1, copied, waves)
    monkeypatch.setattr(PeakMemory, "read", lambda _: {"peak_bytes": 2**30, "method": "told"})
    models = lighten.evaluate(copied, **OPTIONS).models
    peaks = [model["peak_bytes"] for model in models]
    assert peaks == [7 * 2**30, 2**30, 2**30]


@pytest.mark.parametrize("change", ["options", "adapter", "a torn line"])
def test_what_was_made_with_other_things_is_measured_anew(
    change: str, copied: Run, waves: Waves
) -> None:
    ended_after(2, copied, waves)
    options, left = OPTIONS, 0
    parts = copied.folder / runs.EVALUATION_PARTS
    if change == "options":
        options = {**OPTIONS, "max_new_tokens": 5}
    elif change == "adapter":
        weights = copied.adapters()["r8"] / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes())
    else:
        parts.write_bytes(parts.read_bytes()[:-20])
        left = 1
    lighten.evaluate(copied, **options)
    assert waves.measured == WAVES_OF_A_MODEL * MODELS - left


def test_a_judge_that_fails_is_asked_again_without_measuring_again(
    copied: Run, waves: Waves, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reply may need more room, and other figures may be wanted of the answers by then."""
    judge = {"judge": "http://127.0.0.1:9/v1", "judge_model": "judge"}
    monkeypatch.setattr(evaluation.Judge, "check", lambda _: None)
    monkeypatch.setattr(evaluation.Judge, "ask", lambda *_: "tie")
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "judged", failing)
        with pytest.raises(UserError, match="all else that was measured is in"):
            lighten.evaluate(copied, **OPTIONS, **judge)
    assert waves.measured == WAVES_OF_A_MODEL * MODELS
    more: dict[str, Any] = {"judge_max_tokens": 9000, "extra_metrics": "rougeL"}
    judged = lighten.evaluate(copied, **OPTIONS, **judge, **more)
    assert waves.measured == WAVES_OF_A_MODEL * MODELS
    assert [judgement["adapter"] for judgement in judged.judged] == ["r2", "r8"]
    assert not (copied.folder / runs.EVALUATION_PARTS).exists()


def failing(*_: Any, **__: Any) -> None:
    raise UserError("judge: answered 500")


def test_a_model_alone_goes_on_too(
    tiny_folder: Path, chat_file: Path, tmp_path: Path, waves: Waves
) -> None:
    options = {**OPTIONS, "eval_dataset": str(chat_file), "output_dir": str(tmp_path / "alone")}
    waves.last = 1
    with pytest.raises(KeyboardInterrupt):
        lighten.evaluate(str(tiny_folder), **options)
    waves.last, waves.measured = 10**9, 0
    dataset = lighten.evaluate(str(tiny_folder), **options).dataset
    assert waves.measured == 4, "forty rows, eight at a time, of which eight were measured"
    assert dataset["answered"] == 40
