"""Encoded rows are kept in a cache: the same at a second start, and never of what has changed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lighten import data
from lighten.data import files
from lighten.errors import UserError
from lighten.machine import devices
from lighten.models import load_tokenizer
from lighten.planning import predict, text
from lighten.planning.data_cost import cost_of, with_data
from lighten.planning.predict import read_rows
from lighten.planning.result import MemoryPart
from lighten.recipe import Recipe
from lighten.training import row_cache
from lighten.training.base import tokenizer_of
from lighten.training.rows import load_rows
from tests.caches import new_cache

# The room has a function of this name.
read_module = sys.modules["lighten.data.read"]


def recipe_for(folder: Path, model: Path, **settings: Any) -> Recipe:
    values = {
        "model_name_or_path": str(model), "dataset": str(folder / "rows.jsonl"), "val_size": 0.1,
        "max_length": 64, "output_dir": str(folder / "run"), **settings,
    }  # fmt: skip
    return Recipe.from_values({name: value for name, value in values.items() if value is not None})


def loaded(recipe: Recipe, model: Path) -> Any:
    return load_rows(recipe, load_tokenizer(str(model)))


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data that are large enough to keep, and a cache of its own."""
    monkeypatch.setenv("LIGHTEN_CACHE", str(new_cache(tmp_path / "cache")))
    monkeypatch.setattr(row_cache, "LEAST_BYTES", 0)
    rows = [
        {"messages": [{"role": "user", "content": f"Say {i}"},
                      {"role": "assistant", "content": f"{i} 가나다 " * (1 + i % 5)}]}
        for i in range(60)
    ]  # fmt: skip
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def entries(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / "data").iterdir())


def assert_same(first: Any, second: Any) -> None:
    for left, right in ((first.train, second.train), (first.held_out, second.held_out)):
        assert left.sha256 == right.sha256
        assert (left.counts, left.problems, left.findings) == (
            right.counts, right.problems, right.findings,
        )  # fmt: skip
        assert [row.example.where for row in left.rows] == [row.example.where for row in right.rows]
    assert (first.facts, first.notes, first.longest) == (second.facts, second.notes, second.longest)


def test_a_second_start_reads_no_row_and_gives_the_same(
    cached: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(cached, tiny_folder)
    monkeypatch.setenv("LIGHTEN_DATA_CACHE", "off")
    uncached = loaded(recipe, tiny_folder)
    assert not (cached / "cache" / "data").exists()
    monkeypatch.delenv("LIGHTEN_DATA_CACHE")
    first = loaded(recipe, tiny_folder)
    assert len(entries(cached)) == 1
    with monkeypatch.context() as patch:
        patch.setattr(data, "encode", None)
        patch.setattr(data, "read", None)
        second = loaded(recipe, tiny_folder)
    assert isinstance(second.train.rows.ids, np.memmap)
    assert_same(uncached, first)
    assert_same(first, second)


@pytest.mark.parametrize(
    "changed",
    [{"max_length": 32}, {"val_size": 0.3}, {"assistant_only_loss": False},
     {"chat_template": "alpaca"}, {"max_train_samples": 30}, {"added_tokens": ["<x>"]}],
)  # fmt: skip
def test_other_settings_have_another_entry(
    changed: dict[str, Any], cached: Path, tiny_folder: Path
) -> None:
    original = loaded(recipe_for(cached, tiny_folder), tiny_folder)
    recipe = recipe_for(cached, tiny_folder, **changed)
    tokenizer = tokenizer_of(recipe)
    changed_rows = load_rows(recipe, tokenizer)
    assert len(entries(cached)) == 2
    if "added_tokens" not in changed:
        assert original.train.sha256 != changed_rows.train.sha256


def test_changed_data_are_read_again(cached: Path, tiny_folder: Path) -> None:
    recipe = recipe_for(cached, tiny_folder)
    original = loaded(recipe, tiny_folder)
    file = cached / "rows.jsonl"
    file.write_text(file.read_text(encoding="utf-8").replace("Say 7", "Say 8"), encoding="utf-8")
    changed_rows = loaded(recipe, tiny_folder)
    assert original.facts["sha256"] != changed_rows.facts["sha256"]
    assert len(entries(cached)) == 2


@pytest.mark.parametrize("name", ["train.ids", "train.supervised", "held_out.starts", "entry.json"])
@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
def test_torn_entries_are_made_again(name: str, how: str, cached: Path, tiny_folder: Path) -> None:
    recipe = recipe_for(cached, tiny_folder)
    first = loaded(recipe, tiny_folder)
    file = entries(cached)[0] / name
    content = bytearray(file.read_bytes())
    file.unlink()  # the rows of `first` stay mapped
    if how == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        content[0] ^= 0xFF
        file.write_bytes(content)
    assert_same(first, loaded(recipe, tiny_folder))
    assert_same(first, loaded(recipe, tiny_folder))
    assert len(entries(cached)) == 1


@pytest.mark.parametrize(
    "entry",
    ["[]", "3", '{"parts": [], "beside": {}}', '{"parts": {}}', '{"parts": {"train": 1}}',
     '{"parts": {"train": null, "held_out": null}, "beside": {"facts": {}, "notes": []}}'],
)  # fmt: skip
def test_an_entry_of_another_shape_is_made_again(
    entry: str, cached: Path, tiny_folder: Path
) -> None:
    recipe = recipe_for(cached, tiny_folder)
    first = loaded(recipe, tiny_folder)
    (entries(cached)[0] / "entry.json").write_text(entry, encoding="utf-8")
    assert_same(first, loaded(recipe, tiny_folder))
    assert len(entries(cached)) == 1


def test_entries_that_were_not_used_for_longest_go_first(
    cached: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for length in (32, 40, 48):
        loaded(recipe_for(cached, tiny_folder, max_length=length), tiny_folder)
    times = {entry: place for place, entry in enumerate(entries(cached))}
    for entry, place in times.items():
        os.utime(entry, (place, place))
    monkeypatch.setattr(row_cache, "MOST_BYTES", 0)
    loaded(recipe_for(cached, tiny_folder, max_length=56), tiny_folder)
    assert len(entries(cached)) == 1
    assert entries(cached)[0] not in times


@pytest.mark.parametrize("number", ["tokens", "lost_supervised_tokens", "rows"])
def test_a_flipped_digit_is_not_believed(number: str, cached: Path, tiny_folder: Path) -> None:
    recipe = recipe_for(cached, tiny_folder)
    first = loaded(recipe, tiny_folder)
    file = entries(cached)[0] / "entry.json"
    text = file.read_text(encoding="utf-8")
    flipped = re.sub(rf'("{number}": )(\d)', lambda m: m[1] + str((int(m[2]) + 1) % 10), text)
    assert flipped != text
    file.write_text(flipped, encoding="utf-8")
    assert_same(first, loaded(recipe, tiny_folder))
    assert file.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("package", ["lighten", "transformers", "tokenizers", "jinja2"])
def test_other_packages_have_another_entry(
    package: str, cached: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded(recipe_for(cached, tiny_folder), tiny_folder)
    real_version = row_cache.version_of
    monkeypatch.setattr(
        row_cache, "version_of", lambda name: "0.0.1" if name == package else real_version(name)
    )
    loaded(recipe_for(cached, tiny_folder), tiny_folder)
    assert len(entries(cached)) == 2


def test_other_code_has_another_entry(
    cached: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded(recipe_for(cached, tiny_folder), tiny_folder)
    copy = cached / "data"
    copy.mkdir()
    for file in Path(str(data.__file__)).parent.glob("*.py"):
        (copy / file.name).write_bytes(file.read_bytes() + b"# changed\n")
    monkeypatch.setattr(data, "__file__", str(copy / "__init__.py"))
    row_cache._code.cache_clear()
    loaded(recipe_for(cached, tiny_folder), tiny_folder)
    row_cache._code.cache_clear()
    assert len(entries(cached)) == 2


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(
    cached: Path, tiny_folder: Path
) -> None:
    root = cached / "cache" / "data"
    root.mkdir(parents=True)
    with row_cache._scratch(root) as living:
        killed, begun = root / f"{row_cache.NEW}killed", root / f"{row_cache.NEW}begun"
        for folder in (killed, begun):
            folder.mkdir()
        (killed / row_cache.LOCK).touch()
        for folder in (killed, living):
            os.utime(folder, (1.0, 1.0))
        loaded(recipe_for(cached, tiny_folder), tiny_folder)
        assert not killed.exists()  # nobody holds its lock
        assert begun.exists()  # its lock may come the next moment
        assert living.exists()
    assert not living.exists()


def test_what_was_killed_a_moment_ago_goes_as_its_run_is_started_again(
    cached: Path, tiny_folder: Path
) -> None:
    """The second start keeps the entry, and no later one would take the first one's bytes away."""
    write = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from lighten.training import row_cache\n"
        "with row_cache._scratch(Path(sys.argv[1])) as folder:\n"
        "    (folder / row_cache.ENTRY).mkdir()\n"
        "    (folder / row_cache.ENTRY / 'train.ids').write_bytes(bytes(1000))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = cached / "cache" / "data"
    root.mkdir(parents=True)
    subprocess.run([sys.executable, "-c", write, str(root)], check=False)
    assert len(entries(cached)) == 1
    with row_cache._scratch(root) as living:
        (living / row_cache.ENTRY).mkdir()
        loaded(recipe_for(cached, tiny_folder), tiny_folder)
        assert [entry for entry in entries(cached) if entry.name.startswith(row_cache.NEW)] == [
            living
        ]


def test_room_is_made_before_an_entry_is_written(
    cached: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for length in (32, 40):
        loaded(recipe_for(cached, tiny_folder, max_length=length), tiny_folder)
    before = {entry: sum(f.stat().st_size for f in entry.iterdir()) for entry in entries(cached)}
    for place, entry in enumerate(before):
        os.utime(entry, (place, place))
    # There is room for both and half of another.
    monkeypatch.setattr(row_cache, "MOST_BYTES", int(2.5 * max(before.values())))
    sizes: list[int] = []
    write = row_cache._write

    def watched(folder: Path, name: str, part: Any) -> Any:
        sizes.append(len([entry for entry in entries(cached) if not entry.name.startswith(".")]))
        return write(folder, name, part)

    monkeypatch.setattr(row_cache, "_write", watched)
    loaded(recipe_for(cached, tiny_folder, max_length=56), tiny_folder)
    assert sizes == [1, 1]
    assert len(entries(cached)) == 2


def test_a_first_start_hashes_each_file_once(
    cached: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    checksum = files.checksum
    monkeypatch.setattr(
        files,
        "checksum",
        lambda paths: (hashed.extend(path.name for path in paths), checksum(paths))[1],
    )
    (cached / "eval.jsonl").write_bytes((cached / "rows.jsonl").read_bytes())
    recipe = recipe_for(cached, tiny_folder, eval_dataset=str(cached / "eval.jsonl"), val_size=None)
    rows = loaded(recipe, tiny_folder)
    assert sorted(hashed) == ["eval.jsonl", "rows.jsonl"]
    assert rows.facts["sha256"] == hashlib.sha256((cached / "rows.jsonl").read_bytes()).hexdigest()


@pytest.mark.parametrize("cache", ["on", "off"])
@pytest.mark.parametrize("how", ["appended", "replaced", "removed", "touched"])
def test_a_file_that_changes_while_it_is_read_is_told(
    how: str, cache: str, cached: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTEN_DATA_CACHE", cache)
    file = cached / "rows.jsonl"
    content, read_rows = file.read_bytes(), read_module.rows_of

    def changing(path: Path, *columns: Any) -> Any:
        for place, row in enumerate(read_rows(path, *columns)):
            if place == 30:
                if how == "appended":
                    file.write_bytes(content + b"\n" + content)
                elif how == "replaced":
                    (cached / "new").write_bytes(content.replace(b"Say 3", b"Say 4"))
                    os.replace(cached / "new", file)
                elif how == "removed":
                    file.unlink()
                else:
                    os.utime(file, (1.0, 1.0))
            yield row

    monkeypatch.setattr(read_module, "rows_of", changing)
    recipe = recipe_for(cached, tiny_folder)
    if how == "touched":
        assert loaded(recipe, tiny_folder).train.counts.rows == 48
        return
    with pytest.raises(UserError, match=r"rows\.jsonl has changed while it was read"):
        loaded(recipe, tiny_folder)
    assert not (cached / "cache" / "data").exists()


def test_training_passes_its_progress_on(
    cached: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[int, int]] = []
    recipe = recipe_for(cached, tiny_folder)
    load_rows(
        recipe, load_tokenizer(str(tiny_folder)), lambda done, total: heard.append((done, total))
    )
    assert (48, 48) in heard
    assert heard[-1] == (12, 12)
    heard.clear()
    read_rows(recipe, [], lambda done, total: heard.append((done, total)))
    assert heard == []  # the second start encodes nothing


def test_a_plan_takes_large_data_from_the_cache_and_else_a_sample(
    cached: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "LARGEST_DATA_BYTES", 0)
    monkeypatch.setattr(predict, "SAMPLE_ROWS", 10)
    recipe = recipe_for(cached, tiny_folder)
    notes: list[str] = []
    sample = read_rows(recipe, notes)
    assert sample is not None
    assert (len(sample.train.rows), sample.of_rows) == (12, 48)
    assert "12 of 48 rows were encoded for this plan" in notes[0]
    evenly = [row.example.where for row in sample.train.rows]
    assert not (cached / "cache" / "data").exists()
    lengths = predict.lengths_of(sample)
    assert lengths is not None
    assert len(lengths) == 48
    assert set(lengths) == {len(row.input_ids) for row in sample.train.rows}
    full = loaded(recipe, tiny_folder)
    notes.clear()
    for from_cache in (read_rows(recipe, notes), read_rows(recipe, notes, all_rows=True)):
        assert from_cache is not None
        assert from_cache.cached
        assert_same(full, from_cache)
    assert evenly == [row.example.where for row in full.train.rows[::4]]
    assert not any("for this plan" in note for note in notes)
    monkeypatch.setattr(predict, "LARGEST_SAMPLED_BYTES", 0)
    assert read_rows(recipe, notes) is None
    assert "are not read for a plan" in notes[-1]


def test_a_plan_counts_what_the_data_take(cached: Path, tiny_folder: Path) -> None:
    recipe, cpu = recipe_for(cached, tiny_folder), devices.named("cpu")
    rows = loaded(recipe, tiny_folder)
    cost, without = cost_of(rows), predict.planner_for(cpu, None, calibrate=False)(recipe)
    resident_bytes = sum(
        array.nbytes
        for part in (rows.train.rows, rows.held_out.rows)
        for array in part.arrays().values()
    )
    assert (cost.rows, cost.resident_bytes) == (60, resident_bytes)
    assert cost.tokens == rows.train.counts.tokens + rows.held_out.counts.tokens
    assert cost.encoding_bytes > resident_bytes
    large = replace(cost, encoding_bytes=10 * without.host_bytes)
    assert with_data(without, large, on_processor=True).host_bytes == large.encoding_bytes
    cached_cost = cost_of(loaded(recipe, tiny_folder))
    assert cached_cost == replace(cost, encoding_bytes=0)
    plan = with_data(without, cached_cost, on_processor=True)
    assert plan.memory.expected == without.memory.expected + resident_bytes
    assert sum(part.bytes for part in plan.memory.parts) == plan.memory.expected
    assert plan.memory.parts[-1] == MemoryPart("encoded rows", resident_bytes)
    on_gpu = with_data(without, cost, on_processor=False)
    assert on_gpu.memory == without.memory
    assert on_gpu.host_bytes >= cost.encoding_bytes
    assert on_gpu.disk_bytes == without.disk_bytes + resident_bytes


def test_a_plan_of_data_says_what_they_take(cached: Path, tiny_folder: Path) -> None:
    recipe = recipe_for(cached, tiny_folder)
    plan = predict.plan(recipe, devices.named("t4"), changes=False)
    data_line = dict(text.fact_rows(plan))["data"]
    assert data_line.startswith("60 rows, ")
    assert "while they are encoded" in data_line
    again = predict.plan(recipe, devices.named("t4"), changes=False)
    assert again.data is not None
    assert again.data.encoding_bytes == 0
    assert "while they are encoded" not in dict(text.fact_rows(again))["data"]


def test_a_cache_that_cannot_be_written_changes_nothing(
    cached: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cached / "file").write_text("a file where the folder would be", encoding="utf-8")
    monkeypatch.setenv("LIGHTEN_CACHE", str(cached / "file"))
    rows = loaded(recipe_for(cached, tiny_folder), tiny_folder)
    assert rows.train.counts.rows == 48  # of 60: a fifth is held out at least
