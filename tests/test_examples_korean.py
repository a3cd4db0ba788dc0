"""The Korean example: enough rows, none twice, as its script makes them, and none cut."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lighten import data, models
from lighten.recipe import Recipe

FOLDER = Path(__file__).parents[1] / "examples" / "korean-books"
SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, str]]]:
    return {
        split: [
            json.loads(line)
            for line in (FOLDER / "data" / f"{split}.jsonl").read_text("utf-8").splitlines()
        ]
        for split in SPLITS
    }


def test_the_frozen_files_are_what_the_script_makes() -> None:
    completed = subprocess.run([sys.executable, str(FOLDER / "make.py"), "--check"], check=False)
    assert completed.returncode == 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [*lines[:-1], lines[-1].replace("『", "「")], "is not what this makes"),
        (lambda lines: [*lines, lines[0]], "input twice"),
    ],
)
def test_the_check_finds_a_changed_and_a_repeated_row(tmp_path: Path, damage, message: str) -> None:
    (tmp_path / "data").mkdir()
    for name in ("make.py", "catalogue.tsv", "moments.tsv", *(f"data/{s}.jsonl" for s in SPLITS)):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    file = tmp_path / "data" / "valid.jsonl"
    file.write_text("\n".join(damage(file.read_text("utf-8").splitlines())) + "\n", "utf-8")
    command = [sys.executable, str(tmp_path / "make.py"), "--check"]
    completed = subprocess.run(command, check=False, capture_output=True, text=True)
    assert completed.returncode == 1
    assert message in completed.stderr


def test_there_are_enough_rows_and_wordings(rows: dict[str, list[dict[str, str]]]) -> None:
    assert len(rows["train"]) >= 210
    assert len(rows["valid"]) >= 20
    assert len(rows["test"]) >= 20
    assert len({row["instruction"] for row in rows["train"]}) == 12
    assert len({row["instruction"] for row in rows["test"]}) > 6


def test_no_situation_and_no_answer_stands_twice(rows: dict[str, list[dict[str, str]]]) -> None:
    for key in ("input", "output"):
        values = [row[key] for split in SPLITS for row in rows[split]]
        assert len(set(values)) == len(values)


def test_no_situation_stands_in_two_splits(rows: dict[str, list[dict[str, str]]]) -> None:
    train, valid, test = ({row["input"] for row in rows[split]} for split in SPLITS)
    assert train.isdisjoint(valid | test)
    assert valid.isdisjoint(test)


def test_every_answer_names_two_different_books_in_korean(
    rows: dict[str, list[dict[str, str]]],
) -> None:
    for row in (row for split in SPLITS for row in rows[split]):
        assert set(row) == {"instruction", "input", "output"}
        titles = re.findall(r"『(.+?)』\((.+?)\)[은는] ", row["output"])
        assert len({title for title, _ in titles}) == 2, row
        assert all(re.search("[가-힣]", row[key]) for key in row)


def test_no_row_is_cut(smollm2_folder: Path) -> None:
    recipe = Recipe.from_file(FOLDER / "recipe.yaml")
    tokenizer = models.load_tokenizer("smollm2-135m")
    for split in SPLITS:
        dataset = data.read(recipe.dataset, split=split)
        encoded = data.encode(dataset.examples, tokenizer, max_length=recipe.max_length)
        assert encoded.counts.truncated == encoded.counts.dropped == 0
        assert encoded.problems == []
