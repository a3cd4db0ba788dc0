"""Splits have a floor and a cap; what is left out, shared or too little is always said."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import lighten
from lighten import data
from lighten.api import recipe_of
from lighten.cli.main import app
from lighten.data import Example, Message, encode
from lighten.engine.validation_loss import ValidationLoss
from lighten.errors import NoHeldOut, UserError
from lighten.evaluation import metrics
from lighten.evaluation.bootstrap import Resamples
from lighten.evaluation.evaluation import shortened_sentence
from lighten.evaluation.generate import Answers
from lighten.evaluation.result import Evaluation, Measured
from lighten.evaluation.verdicts import verdict
from lighten.reporting import comparison, page
from lighten.runs import Run
from lighten.sweeps.recommend import Candidate, recommend
from lighten.training.base import tokenizer_of
from lighten.training.rows import load_rows
from tests.tiny import tiny_tokenizer


def examples(prompts: list[str]) -> list[Example]:
    return [
        Example("f.jsonl", line, (Message("user", prompt), Message("assistant", str(line))))
        for line, prompt in enumerate(prompts, 1)
    ]


def different(count: int) -> list[Example]:
    return examples([f"q{i}" for i in range(count)])


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def questions(count: int, prefix: str = "q") -> list[dict[str, str]]:
    return [{"instruction": f"{prefix}{i}", "output": f"a{i}"} for i in range(count)]


@pytest.fixture
def settings(tiny_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(tiny_folder), "dtype": "float32", "max_steps": 1,
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip


# The floor


@pytest.mark.parametrize(
    ("rows", "size", "held_out"),
    [
        (1000, 0.05, 50), (400, 0.05, 20), (300, 0.05, 20), (100, 0.05, 20), (60, 0.05, 12),
        (11, 0.05, 2), (40, 0.5, 20), (30, 0.9, 27), (8, 0.5, 4), (300, 5, 5), (300, 1, 1),
        (3, 1, 1), (10, 0.05, 0), (5, 0.05, 0), (2, 0.5, 0), (1, 0.05, 0), (4, 0.3, 0),
    ],
)  # fmt: skip
def test_a_share_has_a_floor_and_a_number_is_taken_as_it_is(
    rows: int, size: float, held_out: int
) -> None:
    split = data.split(different(rows), size)
    assert (len(split.train), len(split.held_out)) == (rows - held_out, held_out)
    note = split.note or ""
    if not held_out:
        assert re.search(rf"nothing is held out: {rows} rows? (is|are) too few", note)
    elif size < 1 and held_out > round(size * rows):
        assert f"{held_out} of {rows} rows are held out instead of the {round(size * rows)}" in note
        assert ("fewer than 20 tell nothing" in note) == (held_out >= 20)
    elif held_out > rows - held_out:
        assert "more rows are held out" in note
    else:
        assert not note


@pytest.mark.parametrize(
    ("rows", "size"), [(300, 500), (300, 300), (300, 299), (20, 0.99), (5, 5), (5, 4), (1, 1)]
)
def test_what_leaves_too_little_to_train_on_is_refused_with_the_numbers(
    rows: int, size: float
) -> None:
    with pytest.raises(UserError, match=rf"val_size {size:g} holds out .* of the {rows} rows?"):
        data.split(different(rows), size)


# Groups that share a prompt


@pytest.mark.parametrize(
    ("groups", "size", "low", "high"),
    [
        ([250] + [1] * 50, 0.05, 20, 20),  # today's loss of 250 rows to one draw
        ([150] + [1] * 150, 0.2, 60, 60),
        ([100, 100] + [2] * 50, 0.1, 30, 30),
        ([7] * 40, 0.1, 27, 30),
        ([3] * 100, 20, 18, 21),
        ([30] * 10, 0.05, 30, 30),  # whole groups only: the nearest there is
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_rows_that_share_a_prompt_are_held_out_near_what_was_asked(
    groups: list[int], size: float, low: int, high: int, seed: int
) -> None:
    rows = examples([f"q{i}" for i, count in enumerate(groups) for _ in range(count)])
    split = data.split(rows, size, seed)
    assert low <= len(split.held_out) <= high
    sides = [{example.prompt_key for example in side} for side in split[:2]]
    assert sides[0].isdisjoint(sides[1])
    target = max(round(size * len(rows)), 20) if size < 1 else size
    if abs(len(split.held_out) - target) > target / 10:
        assert split.note is not None
        assert "stay together" in split.note


@pytest.mark.parametrize(
    ("groups", "size", "reason"),
    [
        ([300], 0.05, "nothing is held out, where val_size 0.05 asks for 20 of 300 rows: all rows "
                      "ask the same"),
        ([200, 160], 20, "160 are held out, where val_size 20 asks for 20 of 360 rows"),
        ([200, 10, 190], 5, "10 are held out"),
        ([290] + [1] * 10, 0.05, "8 are held out.* 290 of 300 ask one thing"),
    ],
)  # fmt: skip
def test_where_prompts_do_not_allow_it_how_far_off_and_why_is_said(
    groups: list[int], size: float, reason: str
) -> None:
    rows = examples([f"q{i}" for i, count in enumerate(groups) for _ in range(count)])
    split = data.split(rows, size)
    assert re.search(reason, split.note or "")
    assert len(split.train) >= len(rows) / 2
    assert len({example.prompt_key for example in split.train}) >= max(1, min(3, len(groups) - 1))


def test_more_rows_move_few_others() -> None:
    before = data.split(different(400), 0.1).held_out
    after = data.split(different(420), 0.1).held_out
    moved = {e.prompt_key for e in before} - {e.prompt_key for e in after}
    assert len(moved) <= 4


# Nothing to hold out


@pytest.mark.parametrize(
    ("rows", "options"),
    [(10, {}), (1, {}), (12, {"val_size": 0})],
)
def test_a_run_that_can_hold_nothing_out_trains_and_reports_without(
    rows: int, options: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", questions(rows))
    run = lighten.run(**settings, dataset=str(path), progress=False, planned=False, **options)
    info = run.info()
    assert (info["status"], info["data"]["eval_rows"]) == ("finished", 0)
    assert info["data"]["train_rows"] == rows
    why = info["data"]["nothing_held_out"]
    assert "nothing is held out" in why
    html = (run.folder / "report.html").read_text(encoding="utf-8")
    assert f"This run is trained, and not measured: {why}." in html
    assert "lighten evaluate" not in html
    assert not (run.folder / "evaluation.json").exists()
    with pytest.raises(NoHeldOut, match="no held-out examples"):
        lighten.evaluate(run)


def test_the_command_run_says_so_and_ends_well(settings: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", questions(5))
    result = CliRunner().invoke(
        app,
        ["run", settings["model_name_or_path"], str(path), "--no-plan", "--max_steps", "1",
         "--load_best_model_at_end", "true", "--output_dir", settings["output_dir"]],
    )  # fmt: skip
    output = " ".join(result.output.split())
    assert result.exit_code == 0, result.output
    assert "note: nothing is held out: 5 rows are too few for val_size 0.05" in output
    assert "load_best_model_at_end has no effect" in output
    assert "not evaluated: " in output
    assert "report: " in output


def test_a_sweep_that_cannot_rank_is_refused_before_anything_trains(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", questions(5))
    with pytest.raises(UserError, match=r"no held-out examples.*5 rows are too few"):
        lighten.sweep(**settings, dataset=str(path), lora_r=[1, 2], progress=False)
    assert not Path(settings["output_dir"]).exists()


# What training leaves out is left out of held-out data too


LEFT_OUT = {
    "blank": ({"instruction": "q", "output": " \n"}, "has no answer to learn from"),
    "long": ({"instruction": "long " * 90, "output": "x"}, "over max_length 128"),
    "broken": ({"instruction": "q"}, "broken and left out"),
}


@pytest.mark.parametrize(
    ("fault", "where"),
    [("blank", "split"), ("blank", "valid"), ("blank", "test"), ("long", "split"),
     ("long", "eval_dataset"), ("broken", "test"), ("broken", "eval_dataset")],
)  # fmt: skip
def test_what_training_leaves_out_evaluation_leaves_out_and_counts(
    fault: str, where: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    row, reason = LEFT_OUT[fault]
    folder = tmp_path / "data"
    folder.mkdir()
    bad = [{**row, "instruction": f"{i} {row['instruction']}"} for i in range(20)]
    train, held_out_rows = (
        questions(40, "train "),
        [r for pair in zip(questions(20), bad, strict=True) for r in pair],
    )
    options: dict[str, Any] = {"max_length": 128, "skip_bad_rows": True}
    if where == "split":
        write(folder / "train.jsonl", held_out_rows)
        options["val_size"] = 0.5
    else:
        write(folder / "train.jsonl", train)
        name = "valid" if where == "eval_dataset" else where
        write(folder / f"{name}.jsonl", held_out_rows)
        if where == "eval_dataset":
            (folder / "valid.jsonl").rename(tmp_path / "other.jsonl")
            options["eval_dataset"] = str(tmp_path / "other.jsonl")
    run = lighten.train(**settings, dataset=str(folder), progress=False, planned=False, **options)
    evaluation = lighten.evaluate(run, max_new_tokens=1)
    references = {example["reference"] for example in evaluation.examples}
    assert all(reference.startswith("a") for reference in references)
    assert evaluation.dataset["rows"] == evaluation.dataset["answered"] == len(references)
    if where != "split":
        assert (evaluation.dataset["rows"], evaluation.dataset["left_out"]) == (20, 20)
    else:
        assert evaluation.dataset["left_out"] == 20 - evaluation.dataset["rows"] > 0
    assert any(reason in note for note in evaluation.dataset["notes"])
    if where != "test":
        assert run.info()["data"]["eval_rows"] == evaluation.dataset["rows"]


def test_examples_beyond_those_left_out_are_taken_up_to_the_number_wanted(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    blank = [{"instruction": f"b{i}", "output": " "} for i in range(9)]
    held_out_path = write(tmp_path / "other.jsonl", [*blank, *questions(20)])
    run = lighten.train(**settings, dataset=str(write(tmp_path / "rows.jsonl", questions(20, "t"))),
        eval_dataset=str(held_out_path), max_eval_samples=4, progress=False, planned=False,
    )  # fmt: skip
    assert run.info()["data"]["eval_rows"] == 4
    evaluation = lighten.evaluate(run, max_new_tokens=1, max_examples=5)
    asked = [int(example["prompt"].removeprefix("q")) for example in evaluation.examples]
    assert asked == sorted(set(asked))
    assert len(asked) == 5
    assert 0 < evaluation.dataset["left_out"] <= 9
    assert any("no answer to learn from" in note for note in evaluation.dataset["notes"])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "long " * 90, "output": "x"}, "over max_length 128"),
        ({"instruction": "q", "output": "\t"}, "has no answer to learn from"),
        ({"instruction": "q", "output": ""}, "has no answer to learn from"),
    ],
)
@pytest.mark.parametrize("as_split", [False, True], ids=["eval_dataset", "valid"])
def test_held_out_data_without_anything_to_measure_are_named(
    row: dict[str, str], reason: str, as_split: bool, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl", questions(20))
    held_out_path = write((folder if as_split else tmp_path) / "valid.jsonl", [row])
    options = {} if as_split else {"eval_dataset": str(held_out_path)}
    recipe = recipe_of(**settings, dataset=str(folder), max_length=128, **options)
    with pytest.raises(UserError, match=rf"held-out example of .*valid\.jsonl.*{reason}"):
        load_rows(recipe, tokenizer_of(recipe))


def test_encoding_knows_which_examples_its_rows_are() -> None:
    dataset = different(600)
    for place in (0, 5, 255, 256, 599):
        message = dataset[place].messages[0]
        dataset[place] = Example("f.jsonl", 1, (message, Message("assistant", " ")))
    encoded = encode(dataset, tiny_tokenizer(), max_length=64)
    assert list(encoded.places) == [i for i in range(600) if i not in (0, 5, 255, 256, 599)]
    assert encoded.problems == [
        "f.jsonl:1 has no answer to learn from, nor have 4 other rows: left out"
    ]


# Overlap


@pytest.mark.parametrize(
    ("where", "shared"), [("eval_dataset", 25), ("valid", 3), ("test", 1), ("eval_dataset", 0)]
)
def test_held_out_prompts_that_are_trained_on_are_counted_wherever_figures_are_shown(
    where: str, shared: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl", questions(40))
    # Other answers, capitals and spaces: the same questions all the same.
    held_out_rows = [{"instruction": f" Q{i} ", "output": "b"} for i in range(shared)]
    held_out_rows += questions(25 - shared, "other ")
    name = "valid" if where == "eval_dataset" else where
    path = write((tmp_path if where == "eval_dataset" else folder) / f"{name}.jsonl", held_out_rows)
    options = {"eval_dataset": str(path)} if where == "eval_dataset" else {}
    runner = CliRunner()
    begun = [settings["model_name_or_path"], str(folder), "--no-plan", "--max_steps", "1",
             "--evaluate.max_new_tokens", "1", "--output_dir", settings["output_dir"],
             *(part for key, value in options.items() for part in (f"--{key}", value))]  # fmt: skip
    trained = runner.invoke(app, ["train", *begun])
    assert trained.exit_code == 0, trained.output
    verb = "asks" if shared == 1 else "ask"
    sentence = f"{shared} of 25 held-out examples {verb} what a training example asks"
    run = Run(Path(settings["output_dir"]))
    key = "test_shared_prompts" if where == "test" else "eval_shared_prompts"
    assert run.info()["data"][key] == shared
    measured = runner.invoke(app, ["evaluate", str(run.folder)])
    assert measured.exit_code == 0, measured.output
    evaluation = run.evaluation() or {}
    assert evaluation["dataset"]["shared_prompts"] == shared
    outputs = [trained.output, measured.output, page.page([run])]
    outputs += ["\n".join(comparison.compare([run, run]).sentences),
              "\n".join(evaluation["dataset"]["notes"]),
              run._repr_html_(), Evaluation(**evaluation)._repr_html_(),
              runner.invoke(app, ["runs", "list", str(run.folder.parent)]).output]  # fmt: skip
    for text in outputs:
        assert (sentence in " ".join(text.split())) == bool(shared)


def test_of_the_loss_that_is_watched_it_is_said_too_where_others_were_measured(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl", questions(40))
    write(folder / "valid.jsonl", questions(30))
    write(folder / "test.jsonl", questions(25, "other "))
    run = lighten.train(progress=False, planned=False, dataset=str(folder), **settings)
    lighten.evaluate(run, max_new_tokens=1)
    sentence = "30 of 30 held-out examples ask what a training example asks"
    assert sentence not in " ".join((run.evaluation() or {})["dataset"]["notes"])
    for html in (page.page([run]), run._repr_html_()):
        assert html.count(sentence) == 1


def test_overlap_with_training_data_that_changed_is_not_known(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    path, held_out_path = (
        write(tmp_path / "a.jsonl", questions(20)),
        write(tmp_path / "b.jsonl", questions(20, "o")),
    )
    run = lighten.train(
        **settings,
        dataset=str(path),
        eval_dataset=str(held_out_path),
        progress=False,
        planned=False,
    )
    for change in (lambda: write(path, questions(21)), path.unlink):
        change()
        evaluation = lighten.evaluate(run, max_new_tokens=1)
        assert evaluation.dataset["shared_prompts"] is None
        assert "has changed or is gone" in " ".join(evaluation.dataset["notes"])


def test_shared_prompts_are_those_on_both_sides() -> None:
    train, held_out = examples(["a", "A ", "b", "c"]), examples(["a", "z", "b"])
    shared = data.shared_prompts(train, held_out)
    counts = Counter(example.prompt_key in shared for example in train)
    assert (len(shared), counts) == (2, {True: 3, False: 1})


# Few examples


def test_few_examples_are_said_before_training_and_one_has_no_interval_anywhere(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", questions(30))
    runner = CliRunner()
    result = runner.invoke(
        app,
        ["run", settings["model_name_or_path"], str(path), "--no-plan", "--max_steps", "1",
         "--val_size", "1", "--evaluate.max_new_tokens", "1",
         "--output_dir", settings["output_dir"]],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    output = " ".join(result.output.split())
    assert output.index("only 1 held-out example") < output.index("step 1/1")
    assert "nan" not in output.lower()
    assert "±" not in output
    assert not re.search(r"\[[-\d.]+, ", output)
    run = Run(Path(settings["output_dir"]))
    text = (run.folder / "evaluation.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert "NaN" not in (run.folder / "metrics.jsonl").read_text(encoding="utf-8")
    for model in json.loads(text)["models"]:
        for metric in model["metrics"].values():
            assert metric["value"] is not None
            assert (metric["se"], metric["low"], metric["high"]) == (None, None, None)
    compared = comparison.compare([run, run])
    assert all(entry.difference is None and not entry.intervals for entry in compared.entries)
    outputs = [page.page([run]), page.page([run, run]), "\n".join(compared.sentences)]
    outputs.append(runner.invoke(app, ["runs", "compare", str(run.folder), str(run.folder)]).output)
    outputs.append(lighten.evaluate(run, max_new_tokens=1)._repr_html_())
    for rendered in outputs:
        assert "nan" not in re.sub(r"\b\w*(?:finance|tenant)\w*\b", "", rendered).lower()
        assert not re.search(r"\[[-+\d.]+, [-+\d.]+\]", rendered)
    assert "only 1 held-out example" in outputs[0]


@pytest.mark.parametrize("count", [1, 2, 19, 20, 21])
def test_a_verdict_and_a_recommendation_need_twenty_examples(count: int) -> None:
    draw = np.random.default_rng(0)
    tokens = np.full(count, 10.0)
    nll = draw.normal(20, 1, count)
    ours, base = (np.stack([losses, tokens], 1) for losses in (nll - 5, nll))
    difference = Resamples(count, 200).difference(ours, base, metrics.mean_loss)
    enough = count >= 20
    assert verdict(difference, count, lower_is_better=True) == (
        "better" if enough else "too few examples"
    )
    assert (difference.low is None) == (count == 1)
    candidates = [Candidate("r1", nll[None] - 5, 1), Candidate("r2", nll[None], 2)]
    recommendation = recommend(candidates, tokens)
    assert (recommendation.name, recommendation.best) == ("r1" if enough else None, "r1")
    assert ("nothing is recommended" in " ".join(recommendation.reasons)) != enough
    for entry in recommendation.comparisons:
        assert (entry.se is None) == (entry.low is None) == (entry.high is None) == (count == 1)
    assert (ValidationLoss(tuple(nll), tuple(map(int, tokens))).standard_error is None) == (
        count == 1
    )


@pytest.mark.parametrize("count", [1, 3])
def test_a_sweep_over_few_examples_measures_and_recommends_nothing(
    count: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", questions(24))
    sweep = lighten.sweep(
        **settings, dataset=str(path), val_size=count, lora_r=[1, 2], progress=False, metric="loss"
    )
    assert sweep.recommended is None
    assert "too few to compare by" in sweep.data["recommendation"]["reasons"][0]
    assert any("cannot tell better from worse" in note for note in sweep.data["notes"])
    html = (sweep.folder / "report.html").read_text(encoding="utf-8")
    assert "cannot tell better from worse" in html
    assert "take this" not in html
    assert ("±" in re.sub(r"<p>.*?</p>", "", html, flags=re.S)) == (count > 1)
    assert "NaN" not in (sweep.folder / "sweep.json").read_text(encoding="utf-8")


# What is stored is said


def test_rows_that_are_not_asked_are_told_once_per_reason(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    rows = questions(20)
    held_out_rows = [{"messages": [{"role": "user", "content": "x " * 100},
                           {"role": "assistant", "content": "y"}]},
             *({"text": f"plain {i}"} for i in range(3))]  # fmt: skip
    path = write(tmp_path / "rows.jsonl", rows)
    beside = tmp_path / "other.jsonl"
    beside.write_text("\n".join(map(json.dumps, held_out_rows)), encoding="utf-8")
    runner = CliRunner()
    begun = ["run", settings["model_name_or_path"], str(path), "--no-plan", "--max_steps", "1",
             "--eval_dataset", str(beside), "--evaluate.max_new_tokens", "60",
             "--output_dir", settings["output_dir"]]  # fmt: skip
    result = runner.invoke(app, begun)
    assert result.exit_code == 0, result.output
    output = " ".join(result.output.split())
    assert output.count("3 held-out examples are not asked and count for the loss alone") == 1
    assert "does not end with an answer to compare with" in output
    dataset = (Run(Path(settings["output_dir"])).evaluation() or {})["dataset"]
    assert (dataset["rows"], dataset["answered"]) == (4, 1)
    assert dataset["shortened"] == 0
    assert "positions end" not in output


@pytest.mark.parametrize(
    ("cut", "expected"), [(0, []), (1, "1 answer of r8 ends"), (3, "3 answers")]
)
def test_answers_cut_by_the_models_positions_are_told(cut: int, expected: Any) -> None:
    results = [
        Measured(name, None, {}, Answers([], 0, 1.0, shortened), [])
        for name, shortened in (("base", 0), ("r8", cut))
    ]
    sentences = shortened_sentence(cut, results)
    assert sentences == [] if not cut else sentences[0].startswith(expected)


def test_a_plan_of_a_batch_that_no_device_holds_ends_with_a_sentence(tiny_folder: Path) -> None:
    settings = {"model_name_or_path": str(tiny_folder), "per_device_train_batch_size": 100_000,
                "max_length": 256}  # fmt: skip
    with pytest.raises(UserError, match=r"100,000 rows and 25,600,000 tokens is more than is pl"):
        lighten.plan(device="h100", **settings)
