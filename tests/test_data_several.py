"""Several data sets in one run: read one behind another, each with its own number of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import lighten
from lighten import data
from lighten.cli.main import app
from lighten.errors import UserError
from lighten.recipe import Recipe, RecipeError
from lighten.runs import Run
from lighten.training.rows import data_sha256


def write(path: Path, prefix: str, count: int, column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({column: f"{prefix} {number}"}) for number in range(count)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files and a folder with a validation set."""
    write(tmp_path / "mine.jsonl", "mine", 3)
    write(tmp_path / "general.jsonl", "general", 9)
    write(tmp_path / "more" / "train.jsonl", "more", 4)
    write(tmp_path / "more" / "valid.jsonl", "held out", 2)
    return tmp_path


def texts(dataset: data.Dataset) -> list[str | None]:
    return [example.text for example in dataset.examples]


def test_they_are_read_in_their_order_with_so_many_rows_of_each(folder: Path) -> None:
    setting = [str(folder / "mine.jsonl"), f"{folder / 'general.jsonl'}#2", str(folder / "more")]
    dataset = data.read(setting)
    assert texts(dataset) == [
        "mine 0", "mine 1", "mine 2", "general 0", "general 1", "more 0", "more 1", "more 2",
        "more 3",
    ]  # fmt: skip
    assert dataset.name == (
        f"{folder / 'mine.jsonl'}, {folder / 'general.jsonl'}, {folder / 'more' / 'train.jsonl'}"
    )
    assert data.with_split(setting, "valid") == [str(folder / "more")]
    assert texts(data.read(data.with_split(setting, "valid"), split="valid")) == [
        "held out 0", "held out 1"
    ]  # fmt: skip
    assert texts(data.read(setting, limit=8))[-1] == "more 2"


def test_a_limit_that_leaves_one_out_is_refused(folder: Path) -> None:
    setting = [str(folder / "general.jsonl"), str(folder / "mine.jsonl")]
    with pytest.raises(UserError, match=r"mine\.jsonl: the 9 rows that are asked for come from"):
        data.read(setting, limit=9)
    with pytest.raises(UserError, match=r"b\.jsonl does not exist"):
        data.read([str(folder / "mine.jsonl"), str(folder / "b.jsonl")])


def test_a_column_must_be_in_one_of_them(folder: Path) -> None:
    write(folder / "notes.jsonl", "note", 2, "content")
    setting = [str(folder / "mine.jsonl"), str(folder / "notes.jsonl")]
    with pytest.raises(UserError, match="unknown shape, its columns are content"):
        data.read(setting)
    assert texts(data.read(setting, columns={"text": "content"})) == [
        "mine 0", "mine 1", "mine 2", "note 0", "note 1"
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"mine\.jsonl, .*notes\.jsonl has no column body"):
        data.read(setting, columns={"text": "content", "system": "body"})


@pytest.mark.parametrize(
    "written",
    ["dataset: [mine.jsonl, general.jsonl#2]", "dataset: mine.jsonl, general.jsonl#2",
     "datasets: [{path: mine.jsonl}, {path: general.jsonl#2}]",
     "train_file: mine.jsonl,general.jsonl\nmax_samples: 2"],
)  # fmt: skip
def test_a_recipe_names_them_as_other_tools_do(written: str, folder: Path) -> None:
    """Beside the recipe, by a list, with commas, or by Axolotl's and LLaMA-Factory's settings."""
    (folder / "recipe.yaml").write_text(f"model_name_or_path: m\n{written}\n", encoding="utf-8")
    recipe = Recipe.from_file(folder / "recipe.yaml")
    limited = "#2" if "max_samples" in written else ""
    assert recipe.dataset == [
        f"{folder / 'mine.jsonl'}{limited}", f"{folder / 'general.jsonl'}#2"
    ]  # fmt: skip
    assert Recipe.from_values(recipe.completed()).dataset == recipe.dataset
    assert recipe.changed({"dataset": [str(folder / "more")]}).dataset == str(folder / "more")
    assert Recipe.from_values(recipe.completed()).name == "m-mine-and-1-more"


def test_most_rows_of_each_hold_for_data_of_the_command_line_too(folder: Path) -> None:
    (folder / "recipe.yaml").write_text("model_name_or_path: m\nmax_samples: 2\n", encoding="utf-8")
    mine, general = folder / "mine.jsonl", folder / "general.jsonl"
    recipe = Recipe.from_file(
        folder / "recipe.yaml", {"dataset": f"{mine},{general}#1", "eval_dataset": str(mine)}
    )
    assert recipe.dataset == [f"{mine}#2", f"{general}#1"]
    assert recipe.eval_dataset == f"{mine}#2"
    assert any("first 2 rows of each data set" in notice for notice in recipe.notices)


def test_a_comma_in_a_name_is_no_list(folder: Path) -> None:
    path = write(folder / "mine, and others.jsonl", "both", 1)
    assert Recipe.from_values({"model": "m", "data": str(path)}).dataset == str(path)
    assert Recipe.from_values({"model": "m", "data": f"{path}#1"}).dataset == f"{path}#1"


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ([], "give a file, folder or hub id, or a list of these"),
        ([3], "give a file, folder or hub id, or a list of these"),
        ([{"prompt": "a", "completion": "b"}], "in memory are written to a JSONL file first"),
        ({"mine": 1}, "give a file, folder or hub id, or a list of these"),
        (["no.jsonl", "nor.jsonl"], "dataset: 'nor.jsonl' does not exist"),
    ],
)
def test_what_names_no_data_is_told(value: Any, why: str) -> None:
    with pytest.raises(RecipeError, match=why) as caught:
        Recipe.from_values({"model_name_or_path": "m", "dataset": value})
    assert str(caught.value).count("dataset") == (2 if value and "exist" in why else 1)


def test_most_rows_are_a_number(folder: Path) -> None:
    settings = {"model": "m", "data": str(folder / "mine.jsonl"), "max_samples": "all"}
    with pytest.raises(RecipeError, match="max_samples: 'all' does not do; use a number from 1"):
        Recipe.from_values(settings)


def test_a_run_learns_from_all_of_them(
    folder: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planned, trained, opened from another folder, evaluated and gone on with."""
    monkeypatch.chdir(folder)
    settings = {
        "model_name_or_path": str(tiny_folder),
        "dataset": ["mine.jsonl", "general.jsonl#5", "more"],
        "output_dir": "run", "per_device_train_batch_size": 4, "dtype": "float32", "seed": 1,
    }  # fmt: skip
    assert lighten.plan(**settings).steps == 3
    run = lighten.train(**settings)
    facts = run.info()["data"]
    assert (facts["train_rows"], facts["eval_rows"]) == (12, 2)
    assert facts["path"] == "mine.jsonl, general.jsonl, more/train.jsonl"
    monkeypatch.chdir("/")
    opened = Run(folder / "run").recipe()
    assert opened.dataset == [
        str(folder / "mine.jsonl"), f"{folder / 'general.jsonl'}#5", str(folder / "more")
    ]  # fmt: skip
    before = data_sha256(opened)
    evaluation = lighten.evaluate(Run(folder / "run"), max_new_tokens=2)
    assert evaluation.dataset["rows"] == 2
    write(folder / "general.jsonl", "other", 9)
    assert data_sha256(opened) != before


def test_data_are_checked_together(folder: Path, tiny_folder: Path) -> None:
    names = f"{folder / 'mine.jsonl'},{folder / 'general.jsonl'}#4"
    result = CliRunner().invoke(
        app, ["data", "check", names, "--model", str(tiny_folder), "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["rows"] == 7
