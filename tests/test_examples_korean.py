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


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, str]]]:
    return {
        split: [json.loads(line) for line in (FOLDER / "data" / f"{split}.jsonl").open()]
        for split in ("train", "test")
    }


def test_the_frozen_files_are_what_the_script_makes() -> None:
    done = subprocess.run([sys.executable, str(FOLDER / "make.py"), "--check"], check=False)
    assert done.returncode == 0


def test_there_are_enough_rows_and_no_situation_stands_twice(
    rows: dict[str, list[dict[str, str]]],
) -> None:
    assert len(rows["train"]) >= 200
    assert len(rows["test"]) >= 20
    inputs = [row["input"] for split in rows.values() for row in split]
    assert len(set(inputs)) == len(inputs)
    outputs = [row["output"] for split in rows.values() for row in split]
    assert len(set(outputs)) == len(outputs)


def test_every_answer_names_two_different_books_in_korean(
    rows: dict[str, list[dict[str, str]]],
) -> None:
    for row in rows["train"] + rows["test"]:
        assert set(row) == {"instruction", "input", "output"}
        titles = re.findall(r"『(.+?)』\((.+?)\)[은는] ", row["output"])
        assert len({title for title, _ in titles}) == 2, row
        assert all(re.search("[가-힣]", row[key]) for key in row)


def test_no_row_is_cut(smollm2_folder: Path) -> None:
    recipe = Recipe.from_file(FOLDER / "recipe.yaml")
    tokenizer = models.load_tokenizer("smollm2-135m")
    for split in ("train", "test"):
        found = data.read(recipe.dataset, split=split)
        encoded = data.encode(found.examples, tokenizer, max_length=recipe.max_length)
        assert encoded.counts.truncated == encoded.counts.dropped == 0
        assert encoded.problems == []
