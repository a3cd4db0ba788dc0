"""Data sets by their ids on the hub: its interface on a local server, and its cache."""

from __future__ import annotations

import hashlib
import http.server
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import lighten
from lighten import data
from lighten.data import sources
from lighten.errors import UserError
from lighten.recipe import Recipe
from tests.conftest import HUB_COMMIT
from tests.local_server import serving


def rows(prefix: str, count: int) -> bytes:
    lines = [json.dumps({"text": f"{prefix} {number}"}) for number in range(count)]
    return ("\n".join(lines) + "\n").encode()


FILES = {
    "README.md": b"---\nlicense: mit\n---\n",
    "one/train-00000-of-00002.jsonl": rows("one", 4),
    "one/train-00001-of-00002.jsonl": rows("more", 4),
    "one/validation-00000-of-00001.jsonl": rows("held out", 3),
    "two/train-00000-of-00001.jsonl": rows("two", 2),
}


@dataclass
class Hub:
    """What the server was asked for."""

    fetched: list[str] = field(default_factory=list)


def handler_of(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    api, files = "/api/datasets/someone/chats/", "/datasets/someone/chats/resolve/"

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if path.startswith(f"{api}revision/"):
                self.answer(json.dumps({"id": "someone/chats", "sha": HUB_COMMIT}).encode())
            elif path.startswith(f"{api}tree/"):
                tree = [
                    {"type": "file", "path": name, "size": len(content),
                     "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in FILES.items()
                ]  # fmt: skip
                self.answer(json.dumps(tree).encode(), Content_Type="application/json")
            elif path.startswith(files):
                name = path.removeprefix(files).partition("/")[2]
                if self.command == "GET":
                    hub.fetched.append(name)
                content = FILES[name]
                self.answer(content, X_Repo_Commit=HUB_COMMIT,
                            ETag=f'"{hashlib.sha1(content).hexdigest()}"')  # fmt: skip
            else:
                self.answer(b"{}", 404, X_Error_Code="RepoNotFound")

    return Handler


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of the hub's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    sources._fetched.cache_clear()
    yield tmp_path / "hub" / "datasets--someone--chats" / "snapshots" / HUB_COMMIT
    sources._fetched.cache_clear()


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    del cache
    hub = Hub()
    with serving(handler_of(hub)) as address:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        )
        yield hub


@pytest.fixture
def cached(cache: Path) -> Path:
    """The data set, as an earlier download has left it."""
    for name, content in FILES.items():
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(content)
    references = cache.parent.parent / "refs"
    references.mkdir()
    (references / "main").write_text(HUB_COMMIT)
    return cache


def texts(dataset: data.Dataset) -> list[str | None]:
    return [example.text for example in dataset.examples]


def test_a_part_of_a_data_set_is_fetched_and_no_more(hub: Hub, cache: Path) -> None:
    dataset = data.read("someone/chats/one#5")
    assert texts(dataset) == ["one 0", "one 1", "one 2", "one 3", "more 0"]
    assert dataset.name == "someone/chats/one"
    assert data.with_split("someone/chats/one", "valid") == ["someone/chats/one"]
    assert sorted(hub.fetched) == sorted(
        name for name in FILES if name.startswith("one/") or name == "README.md"
    )
    assert not (cache / "two").exists()
    assert texts(data.read("someone/chats/two/train-00000-of-00001.jsonl")) == ["two 0", "two 1"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nobody/chats", "and the hub has no data set nobody/chats, or it is private"),
        ("someone/chats/three", "someone/chats has no file of .*at three"),
        ("someone/chats", r"someone/chats/one/train-00000-of-00002\.jsonl and someone/chats/two/"
                          r".* could each be the train data of someone/chats; name the file"),
    ],
)  # fmt: skip
def test_what_the_hub_has_not_is_told(name: str, why: str, hub: Hub) -> None:
    with pytest.raises(UserError, match=why):
        data.read(name)
    assert set(hub.fetched) <= set(FILES)


CARD = """---
license: mit
configs:
- config_name: first
  data_files:
  - split: train
    path: one/*-of-00002.jsonl
  - split: validation
    path: ["one/valid*"]
- config_name: two
  data_files: "two/**"
---
configs: none of these
"""


def test_the_configs_of_a_card_say_which_files_are_meant(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FILES, "README.md", CARD.encode())
    with pytest.raises(UserError, match=r"someone/chats has the configs first, two; name one: "
                                        r"someone/chats/first \(or subset: first\)"):  # fmt: skip
        data.read("someone/chats")
    assert hub.fetched == ["README.md"]
    dataset = data.read("someone/chats/two")
    assert (texts(dataset), dataset.name) == (["two 0", "two 1"], "someone/chats/two")
    assert not any(name.startswith("one/") for name in hub.fetched)
    assert len(texts(data.read("someone/chats/first"))) == 8
    assert len(texts(data.read("someone/chats/first#5"))) == 5
    assert len(texts(data.read("someone/chats/first", split="valid"))) == 3
    assert data.with_split("someone/chats/first", "test") == []
    with pytest.raises(UserError, match="the config two of someone/chats/two has no valid data"):
        data.read("someone/chats/two", split="valid")


@pytest.mark.parametrize("config", [None, "first", "two", "three", "four", "five"])
def test_a_folder_s_configs_are_read_as_datasets_reads_them(
    config: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    card = CARD.replace(
        "- config_name: two",
        """\
- config_name: three
  default: true
  data_dir: one
- config_name: four
  data_dir: one
  data_files: [{split: validation, path: "more*"}]
- config_name: five
  data_files: ["one/train-0000?-*.jsonl", "two/**/train*"]
- config_name: two""",
    )
    files = {**FILES, "one/more-1.jsonl": rows("m", 2), "two/deep/train-x.jsonl": rows("x", 1)}
    folder = tmp_path / "chats"
    for name, content in {**files, "README.md": card.encode()}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    theirs = datasets.load_dataset("./chats", config, cache_dir=str(tmp_path / "cache"))
    setting = f"chats/{config or 'three'}"
    expected = {name: list(theirs[name]["text"]) for name in theirs}
    ours = {
        name: texts(data.read(setting if config else "chats", split=split))
        for name, split in (("train", "train"), ("validation", "valid"), ("test", "test"))
        if (split == "train" and config != "four") or data.with_split(setting, split)
    }
    assert ours == expected
    assert Recipe.from_values({"model": "m", "dataset": "chats", "subset": "two"}).dataset == (
        "chats/two"
    )


def test_a_config_is_chosen_by_other_tools_names(tmp_path: Path) -> None:
    def data_set(**settings: Any) -> Any:
        return Recipe.from_values({"model": "m", **settings}).dataset

    assert data_set(dataset="a/b#500", subset="en") == "a/b/en#500"
    assert data_set(dataset_name="a/b", dataset_config="en") == "a/b/en"
    assert data_set(datasets=[{"path": "a/b", "name": "en"}, {"path": "a/c"}]) == ["a/b/en", "a/c"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\ndataset: a/b\nsubset: en\n")
    assert Recipe.from_file(recipe).dataset == "a/b/en"
    assert Recipe.from_file(recipe, {"dataset": "a/c"}).dataset == "a/c"
    recipe.write_text("model: m\ndataset: a/b\n")
    assert Recipe.from_file(recipe, {"subset": "en"}).dataset == "a/b/en"
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "README.md").write_text(CARD)
    recipe.write_text("model: m\ndataset: rows\nsubset: first\n")
    for chosen, overrides in (("first", {}), ("two", {"subset": "two"})):
        assert Recipe.from_file(recipe, overrides).dataset == str(tmp_path / "rows" / chosen)
    with pytest.raises(UserError, match="subset is of one data set; write dataset: NAME/en"):
        data_set(dataset=["a/b", "a/c"], subset="en")


def test_without_the_hub_what_was_fetched_is_there(cached: Path) -> None:
    assert len(data.read("someone/chats/one").examples) == 8
    with pytest.raises(UserError, match="other/chats does not exist: no file or folder is there"):
        data.read("other/chats")
    assert cached.is_dir()


def test_a_folder_of_that_name_comes_first(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cached.is_dir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    (tmp_path / "someone" / "chats").mkdir()
    (tmp_path / "someone" / "chats" / "train.jsonl").write_bytes(rows("here", 1))
    assert texts(data.read("someone/chats")) == ["here 0"]
    assert texts(data.read(["someone/chats", "someone/chats/two#1"]))[-1] == "two 0"


@pytest.mark.parametrize("name", ["data/no.jsonl", "../no", "/no/data", "~/no", "chats"])
def test_what_is_no_id_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(UserError, match="does not exist; give a file, a folder or a hub id"):
        Recipe.from_values({"model_name_or_path": "m", "dataset": name})


def test_a_run_learns_from_the_hubs_data(cached: Path, tiny_folder: Path, tmp_path: Path) -> None:
    settings = {
        "model_name_or_path": str(tiny_folder), "dataset": "someone/chats/one",
        "output_dir": str(tmp_path / "run"), "dtype": "float32", "max_steps": 1,
    }  # fmt: skip
    assert cached.is_dir()
    assert lighten.plan(**settings).data is not None
    run = lighten.train(**settings)
    facts = run.info()["data"]
    assert (facts["path"], facts["train_rows"], facts["eval_rows"]) == ("someone/chats/one", 8, 3)
    assert Recipe.from_values(settings).name.endswith("-one")


def test_a_plan_downloads_nothing(cache: Path, tiny_folder: Path) -> None:
    plan = lighten.plan(model=str(tiny_folder), dataset="someone/chats", max_length=64)
    assert any("the data are not on this machine" in note for note in plan.notes)
    assert not cache.exists()
