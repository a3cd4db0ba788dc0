"""LLaMA-Factory's names of data sets: its own example's form, read as files and their columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lighten import data
from lighten.recipe import Recipe, RecipeError

ALPACA = {"instruction": "Add 1 and 1.", "input": "", "output": "2"}
TALK = {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]}
ENTRIES: dict[str, Any] = {
    "identity": {"file_name": "identity.json"},
    "alpaca_en_demo": {"file_name": "alpaca.json", "num_samples": 2},
    "glaive": {"file_name": "talk.json", "formatting": "sharegpt",
               "columns": {"messages": "conversations", "tools": "tools"}},
    "openai": {"file_name": "openai.json", "formatting": "sharegpt",
               "columns": {"messages": "messages"},
               "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user",
                        "assistant_tag": "assistant", "system_tag": "system"}},
    "renamed": {"file_name": "renamed.json",
                "columns": {"prompt": "ask", "response": "say", "system": "as"}},
    "dialog": {"file_name": "dialog.json", "formatting": "sharegpt",
               "columns": {"messages": "dialog"}},
    "hub": {"hf_hub_url": "llamafactory/alpaca_gpt4_en", "ms_hub_url": "x/y"},
    "dpo": {"file_name": "dpo.json", "ranking": True},
    "pictures": {"file_name": "p.json", "formatting": "sharegpt", "columns": {"images": "images"}},
    "odd": {"file_name": "talk.json", "formatting": "sharegpt", "tags": {"user_tag": "person"}},
    "part": {"hf_hub_url": "a/b", "folder": "en"},
    "config": {"hf_hub_url": "a/b", "subset": "en"},
    "test": {"hf_hub_url": "a/b", "split": "test"},
    "script": {"script_url": "script.py"},
    "form": {"file_name": "identity.json", "formatting": "xml"},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As LLaMA-Factory's: `data/` beside where its command runs."""
    (tmp_path / "data").mkdir()
    openai = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    files = {
        "dataset_info": ENTRIES, "identity": [ALPACA], "alpaca": [ALPACA] * 5, "talk": [TALK],
        "openai": [openai], "renamed": [{"ask": "What?", "say": "That.", "as": "Be short."}],
        "dialog": [{"dialog": TALK["conversations"]}],
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(dataset: str, **settings: Any) -> Recipe:
    return Recipe.from_values({"model_name_or_path": "m", "dataset": dataset, **settings})


def contents(taken: Recipe) -> list[list[str]]:
    examples = data.read(taken.dataset, columns=taken.dataset_columns).examples
    return [[message.content for message in example.messages] for example in examples]


def test_several_names_are_their_files(folder: Path) -> None:
    taken = recipe("identity,alpaca_en_demo,glaive")
    places = [str(folder / "data" / name) for name in ("identity.json", "alpaca.json", "talk.json")]
    assert [str(Path(name).absolute()) for name in taken.dataset] == [
        places[0], f"{places[1]}#2", places[2]
    ]  # fmt: skip
    assert contents(taken) == [["Add 1 and 1.", "2"]] * 3 + [["hello", "hi"]]
    assert any("identity is an entry of" in notice for notice in taken.notices)
    assert recipe("identity,alpaca_en_demo", max_samples=1).dataset[1].endswith("alpaca.json#1")
    assert recipe("alpaca_en_demo#4").dataset.endswith("alpaca.json#4")


@pytest.mark.parametrize(
    ("name", "expected", "columns"),
    [
        ("openai", ["a", "b"], {}),
        ("renamed", ["Be short.", "What?", "That."],
         {"instruction": "ask", "output": "say", "system": "as"}),
        ("dialog", ["hello", "hi"], {"conversations": "dialog"}),
    ],
)  # fmt: skip
def test_columns_have_the_names_that_the_entry_gives(
    name: str, expected: list[str], columns: dict[str, str], folder: Path
) -> None:
    assert folder.is_dir()
    taken = recipe(name)
    assert taken.dataset_columns == columns
    assert contents(taken) == [expected]


def test_a_folder_of_data_may_be_elsewhere_or_beside_the_recipe(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "more").mkdir()
    (folder / "data").rename(folder / "more" / "sets")
    text = "model_name_or_path: m\ndataset: identity\ndataset_dir: sets\n"
    (folder / "more" / "recipe.yaml").write_text(text, encoding="utf-8")
    taken = Recipe.from_file(folder / "more" / "recipe.yaml")
    assert contents(taken) == [["Add 1 and 1.", "2"]]
    monkeypatch.chdir(folder / "more")
    assert contents(recipe("identity", dataset_dir="sets")) == [["Add 1 and 1.", "2"]]
    assert Recipe.from_values(taken.completed()).dataset == taken.dataset


def test_a_hub_data_set_is_its_id(folder: Path) -> None:
    assert folder.is_dir()
    assert recipe("hub").dataset == "llamafactory/alpaca_gpt4_en"
    assert recipe("config#3").dataset == "a/b/en#3"


def test_what_exists_is_no_entry_unless_the_folder_is_named(folder: Path) -> None:
    (folder / "identity").mkdir()
    assert recipe("identity").dataset == "identity"
    assert recipe("identity", dataset_dir="data").dataset.endswith("identity.json")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("dpo", "dpo in dataset_info.json is ranked: preferences are not built"),
        ("pictures", "columns: images is not read: only text"),
        ("odd", "user_tag is 'person', and user or human is what is read"),
        ("part", "folder is not read; set dataset to the file itself, or to owner/name/FOLDER"),
        ("test", "split is 'test', and train is what is read"),
        ("script", "script_url is not read"),
        ("form", "formatting 'xml' is none of alpaca, sharegpt, openai"),
        ("identity,renamed", "call their columns by different names"),
    ],
)
def test_what_an_entry_asks_for_and_is_not_read_is_told(name: str, why: str, folder: Path) -> None:
    assert folder.is_dir()
    with pytest.raises(RecipeError, match=why):
        recipe(name)


@pytest.mark.parametrize(
    ("text", "why"), [("{", "is not JSON"), (None, "has no dataset_info.json")]
)
def test_a_folder_without_names_is_told(text: str | None, why: str, folder: Path) -> None:
    file = folder / "data" / "dataset_info.json"
    file.unlink() if text is None else file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=why):
        recipe("identity", dataset_dir="data")


def test_what_datasets_writes_under_that_name_is_none(folder: Path) -> None:
    info = {"features": {"text": {"dtype": "string"}}, "splits": {"train": {"num_bytes": 1}}}
    (folder / "data" / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    assert recipe("data").dataset == "data"
    with pytest.raises(RecipeError, match="'identity' does not exist"):
        recipe("identity")
