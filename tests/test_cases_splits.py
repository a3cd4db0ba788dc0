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
from lighten.engine.validation import ValidationLoss
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


def asked(count: int, what: str = "q") -> list[dict[str, str]]:
    return [{"instruction": f"{what}{i}", "output": f"a{i}"} for i in range(count)]


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
    found = data.split(different(rows), size)
    assert (len(found.train), len(found.held_out)) == (rows - held_out, held_out)
    said = found.note or ""
    if not held_out:
        assert re.search(rf"nothing is held out: {rows} rows? (is|are) too few", said)
    elif size < 1 and held_out > round(size * rows):
        assert f"{held_out} of {rows} rows are held out instead of the {round(size * rows)}" in said
    elif held_out > rows - held_out:
        assert "more rows are held out" in said
    else:
        assert not said


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
    found = data.split(rows, size, seed)
    assert low <= len(found.held_out) <= high
    sides = [{example.prompt_key for example in side} for side in found[:2]]
    assert sides[0].isdisjoint(sides[1])
    wanted = max(round(size * len(rows)), 20) if size < 1 else size
    if abs(len(found.held_out) - wanted) > wanted / 10:
        assert found.note is not None
        assert "stay together" in found.note


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
    found = data.split(rows, size)
    assert re.search(reason, found.note or "")
    assert len(found.train) >= len(rows) / 2
    assert len({example.prompt_key for example in found.train}) >= max(1, min(3, len(groups) - 1))


def test_more_rows_move_few_others() -> None:
    before = data.split(different(400), 0.1).held_out
    after = data.split(different(420), 0.1).held_out
    moved = {e.prompt_key for e in before} - {e.prompt_key for e in after}
    assert len(moved) <= 4


# Nothing to hold out


@pytest.mark.parametrize(
    ("rows", "more"),
    [(10, {}), (1, {}), (12, {"val_size": 0})],
)
def test_a_run_that_can_hold_nothing_out_trains_and_reports_without(
    rows: int, more: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", asked(rows))
    run = lighten.run(**settings, dataset=str(path), progress=False, planned=False, **more)
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
    path = write(tmp_path / "rows.jsonl", asked(5))
    done = CliRunner().invoke(
        app,
        ["run", settings["model_name_or_path"], str(path), "--no-plan", "--max_steps", "1",
         "--load_best_model_at_end", "true", "--output_dir", settings["output_dir"]],
    )  # fmt: skip
    said = " ".join(done.output.split())
    assert done.exit_code == 0, done.output
    assert "note: nothing is held out: 5 rows are too few for val_size 0.05" in said
    assert "load_best_model_at_end has no effect" in said
    assert "not evaluated: " in said
    assert "report: " in said


def test_a_sweep_that_cannot_rank_is_refused_before_anything_trains(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", asked(5))
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
    ("kind", "where"),
    [("blank", "split"), ("blank", "valid"), ("blank", "test"), ("long", "split"),
     ("long", "eval_dataset"), ("broken", "test"), ("broken", "eval_dataset")],
)  # fmt: skip
def test_what_training_leaves_out_evaluation_leaves_out_and_counts(
    kind: str, where: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    row, said = LEFT_OUT[kind]
    folder = tmp_path / "data"
    folder.mkdir()
    bad = [{**row, "instruction": f"{i} {row['instruction']}"} for i in range(20)]
    train, other = (
        asked(40, "train "),
        [r for pair in zip(asked(20), bad, strict=True) for r in pair],
    )
    more: dict[str, Any] = {"max_length": 128, "skip_bad_rows": True}
    if where == "split":
        write(folder / "train.jsonl", other)
        more["val_size"] = 0.5
    else:
        write(folder / "train.jsonl", train)
        name = "valid" if where == "eval_dataset" else where
        write(folder / f"{name}.jsonl", other)
        if where == "eval_dataset":
            (folder / "valid.jsonl").rename(tmp_path / "other.jsonl")
            more["eval_dataset"] = str(tmp_path / "other.jsonl")
    run = lighten.train(**settings, dataset=str(folder), progress=False, planned=False, **more)
    found = lighten.evaluate(run, max_new_tokens=1)
    whole = {example["reference"] for example in found.examples}
    assert all(reference.startswith("a") for reference in whole)
    assert found.dataset["rows"] == found.dataset["answered"] == len(whole)
    if where != "split":
        assert (found.dataset["rows"], found.dataset["left_out"]) == (20, 20)
    else:
        assert found.dataset["left_out"] == 20 - found.dataset["rows"] > 0
    assert any(said in note for note in found.dataset["notes"])
    if where != "test":
        assert run.info()["data"]["eval_rows"] == found.dataset["rows"]


def test_examples_beyond_those_left_out_are_taken_up_to_the_number_wanted(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    blank = [{"instruction": f"b{i}", "output": " "} for i in range(9)]
    other = write(tmp_path / "other.jsonl", [*blank, *asked(20)])
    run = lighten.train(**settings, dataset=str(write(tmp_path / "rows.jsonl", asked(20, "t"))),
        eval_dataset=str(other), max_eval_samples=4, progress=False, planned=False,
    )  # fmt: skip
    assert run.info()["data"]["eval_rows"] == 4
    found = lighten.evaluate(run, max_new_tokens=1, max_examples=5)
    assert [example["prompt"] for example in found.examples] == [f"q{i}" for i in range(5)]


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
    write(folder / "train.jsonl", asked(20))
    other = write((folder if as_split else tmp_path) / "valid.jsonl", [row])
    more = {} if as_split else {"eval_dataset": str(other)}
    recipe = recipe_of(**settings, dataset=str(folder), max_length=128, **more)
    with pytest.raises(UserError, match=rf"held-out example of .*valid\.jsonl.*{reason}"):
        load_rows(recipe, tokenizer_of(recipe))


def test_encoding_knows_which_examples_its_rows_are() -> None:
    given = different(600)
    for place in (0, 5, 255, 256, 599):
        message = given[place].messages[0]
        given[place] = Example("f.jsonl", 1, (message, Message("assistant", " ")))
    found = encode(given, tiny_tokenizer(), max_length=64)
    assert list(found.places) == [i for i in range(600) if i not in (0, 5, 255, 256, 599)]
    assert found.problems == [
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
    write(folder / "train.jsonl", asked(40))
    # Other answers, capitals and spaces: the same questions all the same.
    other = [{"instruction": f" Q{i} ", "output": "b"} for i in range(shared)]
    other += asked(25 - shared, "other ")
    name = "valid" if where == "eval_dataset" else where
    path = write((tmp_path if where == "eval_dataset" else folder) / f"{name}.jsonl", other)
    more = {"eval_dataset": str(path)} if where == "eval_dataset" else {}
    runner = CliRunner()
    begun = [settings["model_name_or_path"], str(folder), "--no-plan", "--max_steps", "1",
             "--evaluate.max_new_tokens", "1", "--output_dir", settings["output_dir"],
             *(part for key, value in more.items() for part in (f"--{key}", value))]  # fmt: skip
    done = runner.invoke(app, ["train", *begun])
    assert done.exit_code == 0, done.output
    verb = "asks" if shared == 1 else "ask"
    sentence = f"{shared} of 25 held-out examples {verb} what a training example asks"
    run = Run(Path(settings["output_dir"]))
    key = "test_shared_prompts" if where == "test" else "eval_shared_prompts"
    assert run.info()["data"][key] == shared
    measured = runner.invoke(app, ["evaluate", str(run.folder)])
    assert measured.exit_code == 0, measured.output
    evaluation = run.evaluation() or {}
    assert evaluation["dataset"]["shared_prompts"] == shared
    shown = [done.output, measured.output, page.page([run])]
    shown += ["\n".join(comparison.compare([run, run]).sentences),
              "\n".join(evaluation["dataset"]["notes"]),
              run._repr_html_(), Evaluation(**evaluation)._repr_html_(),
              runner.invoke(app, ["runs", "list", str(run.folder.parent)]).output]  # fmt: skip
    for text in shown:
        assert (sentence in " ".join(text.split())) == bool(shared)


def test_of_the_loss_that_is_watched_it_is_said_too_where_others_were_measured(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl", asked(40))
    write(folder / "valid.jsonl", asked(30))
    write(folder / "test.jsonl", asked(25, "other "))
    run = lighten.train(progress=False, planned=False, dataset=str(folder), **settings)
    lighten.evaluate(run, max_new_tokens=1)
    sentence = "30 of 30 held-out examples ask what a training example asks"
    assert sentence not in " ".join((run.evaluation() or {})["dataset"]["notes"])
    for shown in (page.page([run]), run._repr_html_()):
        assert shown.count(sentence) == 1


def test_overlap_with_training_data_that_changed_is_not_known(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    path, other = (
        write(tmp_path / "a.jsonl", asked(20)),
        write(tmp_path / "b.jsonl", asked(20, "o")),
    )
    run = lighten.train(
        **settings, dataset=str(path), eval_dataset=str(other), progress=False, planned=False
    )
    for change in (lambda: write(path, asked(21)), path.unlink):
        change()
        found = lighten.evaluate(run, max_new_tokens=1)
        assert found.dataset["shared_prompts"] is None
        assert "has changed or is gone" in " ".join(found.dataset["notes"])


def test_shared_prompts_are_those_on_both_sides() -> None:
    train, held_out = examples(["a", "A ", "b", "c"]), examples(["a", "z", "b"])
    shared = data.shared_prompts(train, held_out)
    both = Counter(example.prompt_key in shared for example in train)
    assert (len(shared), both) == (2, {True: 3, False: 1})


# Few examples


def test_few_examples_are_said_before_training_and_one_has_no_interval_anywhere(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", asked(30))
    runner = CliRunner()
    done = runner.invoke(
        app,
        ["run", settings["model_name_or_path"], str(path), "--no-plan", "--max_steps", "1",
         "--val_size", "1", "--evaluate.max_new_tokens", "1",
         "--output_dir", settings["output_dir"]],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert said.index("only 1 held-out example") < said.index("step 1/1")
    assert "nan" not in said.lower()
    assert "±" not in said
    assert not re.search(r"\[[-\d.]+, ", said)
    run = Run(Path(settings["output_dir"]))
    text = (run.folder / "evaluation.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert "NaN" not in (run.folder / "metrics.jsonl").read_text(encoding="utf-8")
    for model in json.loads(text)["models"]:
        for own in model["metrics"].values():
            assert own["value"] is not None
            assert (own["se"], own["low"], own["high"]) == (None, None, None)
    compared = comparison.compare([run, run])
    assert all(entry.difference is None and not entry.intervals for entry in compared.entries)
    asked_for = [page.page([run]), page.page([run, run]), "\n".join(compared.sentences)]
    asked_for.append(
        runner.invoke(app, ["runs", "compare", str(run.folder), str(run.folder)]).output
    )
    asked_for.append(lighten.evaluate(run, max_new_tokens=1)._repr_html_())
    for shown in asked_for:
        assert "nan" not in re.sub(r"\b\w*(?:finance|tenant)\w*\b", "", shown).lower()
        assert not re.search(r"\[[-+\d.]+, [-+\d.]+\]", shown)
    assert "only 1 held-out example" in asked_for[0]


@pytest.mark.parametrize("count", [1, 2, 19, 20, 21])
def test_a_verdict_and_a_recommendation_need_twenty_examples(count: int) -> None:
    draw = np.random.default_rng(0)
    tokens = np.full(count, 10.0)
    nll = draw.normal(20, 1, count)
    ours, base = (np.stack([own, tokens], 1) for own in (nll - 5, nll))
    found = Resamples(count, 200).difference(ours, base, metrics.mean_loss)
    enough = count >= 20
    assert verdict(found, count, lower_is_better=True) == (
        "better" if enough else "too few examples"
    )
    assert (found.low is None) == (count == 1)
    candidates = [Candidate("r1", nll[None] - 5, 1), Candidate("r2", nll[None], 2)]
    told = recommend(candidates, tokens)
    assert (told.name, told.best) == ("r1" if enough else None, "r1")
    assert ("nothing is recommended" in " ".join(told.reasons)) != enough
    for own in told.comparisons:
        assert (own.se is None) == (own.low is None) == (own.high is None) == (count == 1)
    assert (ValidationLoss(tuple(nll), tuple(map(int, tokens))).standard_error is None) == (
        count == 1
    )


@pytest.mark.parametrize("count", [1, 3])
def test_a_sweep_over_few_examples_measures_and_recommends_nothing(
    count: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", asked(24))
    found = lighten.sweep(
        **settings, dataset=str(path), val_size=count, lora_r=[1, 2], progress=False, metric="loss"
    )
    assert found.recommended is None
    assert "too few to compare by" in found.data["recommendation"]["reasons"][0]
    assert any("cannot tell better from worse" in note for note in found.data["notes"])
    html = (found.folder / "report.html").read_text(encoding="utf-8")
    assert "cannot tell better from worse" in html
    assert "take this" not in html
    assert ("±" in re.sub(r"<p>.*?</p>", "", html, flags=re.S)) == (count > 1)
    assert "NaN" not in (found.folder / "sweep.json").read_text(encoding="utf-8")


# What is stored is said


def test_rows_that_are_not_asked_are_told_once_per_reason(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    rows = asked(20)
    other = [{"messages": [{"role": "user", "content": "x " * 100},
                           {"role": "assistant", "content": "y"}]},
             *({"text": f"plain {i}"} for i in range(3))]  # fmt: skip
    path = write(tmp_path / "rows.jsonl", rows)
    beside = tmp_path / "other.jsonl"
    beside.write_text("\n".join(map(json.dumps, other)), encoding="utf-8")
    runner = CliRunner()
    begun = ["run", settings["model_name_or_path"], str(path), "--no-plan", "--max_steps", "1",
             "--eval_dataset", str(beside), "--evaluate.max_new_tokens", "60",
             "--output_dir", settings["output_dir"]]  # fmt: skip
    done = runner.invoke(app, begun)
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert said.count("3 held-out examples are not asked and count for the loss alone") == 1
    assert "does not end with an answer to compare with" in said
    dataset = (Run(Path(settings["output_dir"])).evaluation() or {})["dataset"]
    assert (dataset["rows"], dataset["answered"]) == (4, 1)
    assert dataset["shortened"] == 0
    assert "positions end" not in said


@pytest.mark.parametrize(("cut", "said"), [(0, []), (1, "1 answer of r8 ends"), (3, "3 answers")])
def test_answers_cut_by_the_models_positions_are_told(cut: int, said: Any) -> None:
    results = [
        Measured(name, None, {}, Answers([], 0, 1.0, shortened))
        for name, shortened in (("base", 0), ("r8", cut))
    ]
    told = shortened_sentence(cut, results)
    assert told == [] if not cut else told[0].startswith(said)


def test_a_plan_of_a_batch_that_no_device_holds_ends_with_a_sentence(tiny_folder: Path) -> None:
    settings = {"model_name_or_path": str(tiny_folder), "per_device_train_batch_size": 100_000,
                "max_length": 256}  # fmt: skip
    with pytest.raises(UserError, match=r"100,000 rows and 25,600,000 tokens is more than is pl"):
        lighten.plan(device="h100", **settings)
