"""Folders of data as the hub and people have them: every shard, in order, or a refusal."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lighten import data
from lighten.errors import UserError
from lighten.machine import hardware
from lighten.planning import calibration
from lighten.recipe import Recipe


def write_texts(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": text} for text in texts]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    elif path.suffix.lower() == ".csv":
        path.write_text("text\n" + "\n".join(texts))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(folder: Path | str, split: str = "train", **how: Any) -> list[str | None]:
    return [example.text for example in data.read(str(folder), split=split, **how).examples]


def refused(folder: Path | str, split: str = "train") -> str:
    with pytest.raises(UserError) as error:
        data.read(str(folder), split=split)
    return str(error.value)


LAYOUTS = {
    "data/, parquet": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
    "flat, parquet": ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
    "a configuration": ["main/train-00000-of-00002.parquet", "main/train-00001-of-00002.parquet"],
    "converted": ["default/train/0000.parquet", "default/train/0001.parquet"],
    "a folder a split": ["train/a.jsonl", "train/b.jsonl"],
    "numbered": ["train-2.jsonl", "train-10.jsonl"],
    "numbered, no dash": ["train1.csv", "train2.csv"],
    "parts": ["train.part2.jsonl", "train.part11.jsonl"],
    "a prefix": ["korquad-train-00000-of-00002.json", "korquad-train-00001-of-00002.json"],
    "from one": ["train-00001-of-00002.jsonl", "train-00002-of-00002.jsonl"],
    "upper case": ["Train-0.JSONL", "Train-1.JSONL"],
    "saved to disk": ["train/data-00000-of-00002.arrow", "train/data-00001-of-00002.arrow"],
    "no split named": ["part-0.jsonl", "part-1.jsonl"],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_shards_of_a_split_are_read_in_order(name: str, tmp_path: Path) -> None:
    files = [
        write_texts(tmp_path / file, f"{i} a", f"{i} b") for i, file in enumerate(LAYOUTS[name])
    ]
    (tmp_path / "README.md").write_text("# a data set")
    write_texts(tmp_path / "dataset_infos.json", "no data")
    write_texts(tmp_path / "train" / "state.json", "no data")
    write_texts(tmp_path / ".cache" / "train.jsonl", "no data")
    dataset = data.read(str(tmp_path))
    assert [e.text for e in dataset.examples] == ["0 a", "0 b", "1 a", "1 b"]
    assert [(e.file, e.line) for e in dataset.examples][2] == (
        str(files[1]),
        dataset.examples[0].line,
    )
    assert dataset.sha256 == hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
    assert texts(f"{tmp_path}#3") == ["0 a", "0 b", "1 a"]


@pytest.mark.parametrize("word", ["valid", "validation", "val", "dev", "eval"])
def test_held_out_data_goes_by_any_of_its_names(word: str, tmp_path: Path) -> None:
    write_texts(tmp_path / "data" / "train-00000-of-00001.parquet", "a")
    write_texts(tmp_path / "data" / f"{word}-00000-of-00001.parquet", "b")
    assert data.with_split(str(tmp_path), "valid")
    assert not data.with_split(str(tmp_path), "test")
    assert (texts(tmp_path), texts(tmp_path, "valid")) == (["a"], ["b"])
    assert "has no test file" in refused(tmp_path, "test")


@pytest.mark.parametrize(
    "names",
    [("train.json", "train.jsonl"), ("train.csv", "train.jsonl"), ("valid.jsonl", "dev.jsonl"),
     ("train.jsonl", "data/train.jsonl"), ("main/train.jsonl", "socratic/train.jsonl"),
     ("train.jsonl", "train-00000-of-00001.jsonl"), ("train/a.jsonl", "train/b.csv"),
     ("train-00000-of-00002.jsonl", "train-00000-of-00003.jsonl"), ("a.jsonl", "b.jsonl")],
)  # fmt: skip
def test_two_files_that_could_both_be_meant_are_refused(
    names: tuple[str, str], tmp_path: Path
) -> None:
    split = "valid" if "valid" in names[0] else "train"
    paths = [write_texts(tmp_path / name, name) for name in names]
    why = refused(tmp_path, split)
    assert f"could each be the {split} data" in why
    assert all(str(path) in why for path in paths)
    assert data.with_split(str(tmp_path), split)


@pytest.mark.parametrize(
    ("numbers", "total", "missing"),
    [((0, 2), 3, "number 1"), ((1, 2), 3, "number 0"), ((0, 1), 4, "number 2, 3"),
     ((1, 2), 4, "number 0, 3")],
)  # fmt: skip
def test_a_missing_shard_is_said(
    numbers: tuple[int, ...], total: int, missing: str, tmp_path: Path
) -> None:
    for number in numbers:
        write_texts(tmp_path / "data" / f"train-{number:05}-of-{total:05}.jsonl", "a")
    assert missing in refused(tmp_path)


def test_an_exact_name_goes_before_a_longer_one(tmp_path: Path) -> None:
    write_texts(tmp_path / "train.jsonl", "a")
    write_texts(tmp_path / "train_notes.jsonl", "no")
    write_texts(tmp_path / "old-train.jsonl", "no")
    assert texts(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["C#/train.jsonl", "q&a #2.jsonl", "#5/data.jsonl"])
def test_an_existing_path_wins_over_a_number_of_rows(name: str, tmp_path: Path) -> None:
    path = write_texts(tmp_path / name, "a", "b", "c")
    assert texts(path) == ["a", "b", "c"]
    assert texts(f"{path}#2") == ["a", "b"]
    recipe = Recipe.from_values({"model_name_or_path": "m", "dataset": f"{path}#2"})
    assert recipe.name == f"m-{path.stem}"
    (tmp_path / "recipe.yaml").write_text(
        f"model_name_or_path: m\ndataset: {json.dumps(name + '#2')}\n"
    )
    assert texts(Recipe.from_file(tmp_path / "recipe.yaml").dataset) == ["a", "b"]


@pytest.mark.parametrize("count", ["0", "-1", "x", "", "1.5", "²"])
def test_what_follows_the_mark_must_be_a_number(count: str, tmp_path: Path) -> None:
    path = write_texts(tmp_path / "d.jsonl", "a")
    assert "number of rows" in refused(f"{path}#{count}")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_texts(tmp_path / "sets" / "d.jsonl", "a", "b")
    assert texts("~/sets/d.jsonl") == ["a", "b"]
    assert texts("~/sets/d.jsonl#1") == ["a"]
    for where in ("~/sets/d.jsonl", "~/sets/d.jsonl#1"):
        settings = {"model_name_or_path": "m", "dataset": where, "eval_dataset": where}
        assert Recipe.from_values(settings).dataset == where
    write_texts(tmp_path / "both" / "train.jsonl", "a")
    write_texts(tmp_path / "both" / "valid.jsonl", "b")
    assert data.with_split("~/both", "valid")
    with pytest.raises(UserError, match="does not exist"):
        data.read("~nobody-here/d.jsonl")


def test_the_cache_and_the_calibration_may_begin_with_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("LIGHTEN_CACHE", "~/kept")
    monkeypatch.setenv("LIGHTEN_CALIBRATION", "~/pairs.json")
    assert hardware.cache_folder() == tmp_path / "kept"
    assert calibration.path() == tmp_path / "pairs.json"
    monkeypatch.delenv("LIGHTEN_CALIBRATION")
    assert calibration.path().parent == tmp_path / "kept"
