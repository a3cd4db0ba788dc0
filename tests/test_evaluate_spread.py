"""Where fewer held-out rows are measured on than there are, they stand for all; that is said."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import lighten
from lighten.data.storage import spread_evenly
from lighten.quantization.model_source import evaluation_of, opened
from lighten.runs import Run
from lighten.sweeps.measure import ARMS
from tests.test_cases_splits import questions, write
from tests.test_sweep import losses, sweep

FEW: dict[str, Any] = {"max_new_tokens": 1, "max_examples": 10, "bootstrap_samples": 100}


def sources_of(evaluation: Any) -> Counter[str]:
    return Counter(example["prompt"][0] for example in evaluation.examples)


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Watched and evaluated on three files, a third of the rows each."""
    folder = tmp_path_factory.mktemp("spread")
    held_out = [str(write(folder / f"{name}.jsonl", questions(30, name))) for name in "xyz"]
    return lighten.train(
        model_name_or_path=str(tiny_folder), dtype="float32", max_steps=1, progress=False,
        planned=False, dataset=str(write(folder / "train.jsonl", questions(20, "t"))),
        eval_dataset=held_out, max_eval_samples=6, output_dir=str(folder / "run"),
    )  # fmt: skip


def test_few_rows_are_of_all_files_in_their_order_and_the_same_ones_each_time(run: Run) -> None:
    evaluation = lighten.evaluate(run, **FEW)
    assert sorted(sources_of(evaluation).values()) == [3, 3, 4]
    asked = [example["prompt"] for example in evaluation.examples]
    assert asked == sorted(asked, key=lambda prompt: (prompt[0], int(prompt[1:])))
    again = lighten.evaluate(run, **FEW)
    assert again.examples == evaluation.examples
    assert again.dataset["examples_sha256"] == evaluation.dataset["examples_sha256"]
    assert any(
        "10 of 90 examples, spread evenly over them (max_examples)" in note
        for note in evaluation.dataset["notes"]
    )
    whole = lighten.evaluate(run, **{**FEW, "max_examples": 90})
    assert not any("spread evenly" in note for note in whole.dataset["notes"])


def test_the_loss_is_watched_on_rows_of_all_files(run: Run) -> None:
    data = run.info()["data"]
    assert data["eval_rows"] == 6
    assert any(
        "6 of 90 examples, spread evenly over them (max_eval_samples)" in note
        for note in data["held_out_notes"]
    )


def test_a_quantised_copy_is_measured_on_rows_of_all_files(run: Run, tmp_path: Path) -> None:
    with opened(run, tmp_path) as source:
        held_out = evaluation_of(source, 200, 6)
        assert held_out is not None
        rows = [source.tokenizer.decode(row.ids) for row in held_out.rows]
        asked = [source.tokenizer.decode(ids) for ids in held_out.prompts]
        whole = evaluation_of(source, 10**6, 90)
    for texts in (rows, asked):
        assert [sum(f"{name}" in text for text in texts) > 0 for name in "xyz"] == [True] * 3
    assert sum(len(row.ids) for row in held_out.rows) <= 200
    assert any(f"{len(rows)} of 90 held-out rows" in note for note in held_out.notes)
    assert whole is not None
    assert len(whole.rows) == len(whole.prompts) == 90
    assert not any("held-out rows" in note for note in whole.notes)


def test_rows_that_take_turns_are_all_seen() -> None:
    for kinds in (2, 3, 5):
        for most, count in ((20, 200), (100, 2600), (30, 60)):
            shares = Counter(place % kinds for place in spread_evenly(most, count))
            assert all(0.3 < shares[kind] * kinds / most < 1.7 for kind in range(kinds))


def test_evenly_spread_places_are_as_many_as_wanted_and_differ() -> None:
    assert list(spread_evenly(0, 5)) == []
    for most in range(1, 40):
        for count in range(40):
            places = list(spread_evenly(most, count))
            assert places == sorted(set(places))
            assert len(places) == min(most, count)
            assert set(places) <= set(range(count))


def test_an_arm_measured_before_on_the_first_rows_is_measured_anew(
    tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    settings = {
        "model_name_or_path": str(tiny_folder), "dtype": "float32", "dataset": str(chat_file),
        "max_steps": 2, "val_size": 0.5, "output_dir": str(tmp_path / "sweep"),
        "evaluate.max_examples": 5, "lora_r": [2, 4], "metric": "loss",
    }  # fmt: skip
    first = sweep(settings)
    path = first.folder / ARMS / "r2.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    del stored["examples_sha256"]
    stored["nll"] = [nll + 1 for nll in stored["nll"]]
    path.write_text(json.dumps(stored), encoding="utf-8")
    resumed = sweep(settings, resume=True)
    assert losses(resumed) == losses(first)
    assert any("5 of 20 examples" in note for note in resumed.data["notes"])
