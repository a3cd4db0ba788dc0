"""An answer may be as long as the references are; what is cut off all the same is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lighten
from lighten.errors import UserError
from lighten.evaluation import answer_length
from lighten.evaluation.generate import generate
from lighten.evaluation.run_models import Models
from lighten.quantization.model_source import evaluation_of, opened
from lighten.runs import Run
from lighten.sweeps.measure import ARMS, Measurement
from tests.test_cases_splits import write
from tests.test_sweep import sweep

LONG = "one two three four five six seven eight nine ten eleven twelve " * 2


def rows(count: int, prefix: str) -> list[dict[str, str]]:
    return [
        {"instruction": f"{prefix}{i}", "output": LONG.strip() if i % 2 else "yes"}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def settings(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("long")
    return {
        "model_name_or_path": str(tiny_folder), "dtype": "float32", "max_steps": 1,
        "planned": False, "progress": False,
        "dataset": str(write(folder / "t.jsonl", rows(8, "t"))),
        "eval_dataset": str(write(folder / "e.jsonl", rows(4, "e"))),
        "output_dir": str(folder / "run"), "max_length": 512,
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(settings: dict[str, Any]) -> Run:
    return lighten.train(**settings)


def test_answers_may_be_as_long_as_the_references(run: Run) -> None:
    evaluation = lighten.evaluate(run)
    tokenizer = Models(run, "cpu", keep=False).open(None).base.tokenizer
    longest = max(answer_length.tokens_of([LONG.strip()], tokenizer))
    limit = evaluation.settings["max_new_tokens"]
    assert longest > 64
    assert longest < limit == answer_length.long_enough([3, longest])
    assert evaluation.dataset["references_beyond_limit"] == 0
    assert not any("references are longer" in note for note in evaluation.dataset["notes"])


def test_what_is_cut_off_is_counted_and_said(run: Run) -> None:
    evaluation = lighten.evaluate(run, max_new_tokens=5)
    assert evaluation.settings["max_new_tokens"] == 5
    assert evaluation.dataset["references_beyond_limit"] == 2
    notes = evaluation.dataset["notes"]
    assert any("2 of 4 references are longer than max_new_tokens (5)" in note for note in notes)
    # Counted as transformers' own generation counts them.
    opened_base = Models(run, "cpu", keep=False).open(None)
    prompts = [
        opened_base.base.tokenizer.apply_chat_template(
            [{"role": "user", "content": example["prompt"]}], add_generation_prompt=True,
            return_dict=False,
        )
        for example in evaluation.examples
    ]  # fmt: skip
    answers = generate(
        opened_base.base.model, opened_base.base.tokenizer, prompts, max_new_tokens=5, batch_size=4
    )
    assert evaluation.dataset["limited"]["base"] == answers.limited > 0
    assert any(f"cut off: {answers.limited} of 4 of base" in note for note in notes)


def test_a_comparison_with_a_chosen_length_is_refused_before_anything_is_measured(
    run: Run, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = lighten.train(**{**settings, "output_dir": str(tmp_path / "other")})
    lighten.evaluate(other)
    assert lighten.evaluate(run, against=other).comparisons
    lighten.evaluate(other, max_new_tokens=5)
    monkeypatch.setattr("lighten.evaluation.evaluation.measure", None)
    with pytest.raises(UserError, match=r"max_new_tokens is \d+ and 5"):
        lighten.evaluate(run, against=other)


def test_a_quantised_copy_says_which_right_answers_are_too_long(run: Run, tmp_path: Path) -> None:
    with opened(run, tmp_path) as source:
        held_out = evaluation_of(source, 10**6, 4)
    assert held_out is not None
    assert held_out.task.answer_tokens == 64
    assert any(
        "2 of 4 right answers are longer than the 64" in note for note in held_out.task.notes
    )


def test_a_sweep_answers_as_long_and_says_what_was_cut_off(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    kept = {key: value for key, value in settings.items() if key not in ("planned", "progress")}
    result = sweep(kept, lora_r=[2], metric="chrf", output_dir=str(tmp_path / "sweep"))
    measurement = Measurement.read(result.folder, "r2")
    assert measurement is not None
    assert (result.folder / ARMS / "r2.json").is_file()
    assert (measurement.max_new_tokens or 0) > 64
    cut = {**kept, "evaluate.max_new_tokens": 2, "output_dir": str(tmp_path / "cut")}
    notes = sweep(cut, lora_r=[2], metric="chrf").data["notes"]
    assert any("4 of 4 references are longer than max_new_tokens (2)" in note for note in notes)


def test_the_room_has_a_bound_and_a_floor() -> None:
    assert answer_length.long_enough([]) == answer_length.LEAST_ROOM
    assert answer_length.long_enough([2]) == 2 + answer_length.LEAST_ROOM
    assert answer_length.long_enough([320, 10]) == 400
    assert answer_length.long_enough([10**6]) == answer_length.LONGEST
