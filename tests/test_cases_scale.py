"""Data sets larger than memory should hold: the same rows from disk as from memory."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from rich.console import Console

from lighten import data
from lighten.data import Example, Message, choose_template, encode, files, storage
from lighten.data.storage import ExampleStore, Spool
from lighten.data.tokenise import PART_EXAMPLES
from lighten.errors import UserError
from lighten.machine import devices, forks
from lighten.models import load_tokenizer
from lighten.planning import predict, text
from lighten.planning.data_cost import cost_of, with_data
from lighten.planning.predict import read_rows
from lighten.planning.result import MemoryPart
from lighten.recipe import Recipe
from lighten.training import progress, row_cache
from lighten.training.base import tokenizer_of
from lighten.training.rows import load_rows
from tests.tiny import tiny_tokenizer

# The room has functions of these names.
encoding, read_module = (sys.modules[f"lighten.data.{name}"] for name in ("encode", "read"))
WORDS = ["gradient", "한국어", "문장", "emoji 🙂🙃", "\u2028", "  spaces ", "\n\nlines", "Ünïcödé",
         "<|im_end|", "x" * 40, "é", "👩‍👩‍👧"]  # fmt: skip


def examples(count: int, seed: int = 0) -> list[Example]:
    random.seed(seed)
    generated = []
    for line in range(1, count + 1):

        def text() -> str:
            return " ".join(random.choices(WORDS, k=random.randint(1, 12)))

        variant = line % 5
        if variant == 0:
            generated.append(Example("t.jsonl", line, text=text()))
        elif variant == 1:
            ids = tuple(random.choices(range(5, 200), k=9))
            generated.append(Example("i.jsonl", line, input_ids=ids, labels=(-100, -100, *ids[2:])))
        else:
            turns: list[Message] = [Message("system", text())] if variant == 2 else []
            for turn in range(variant - 1):
                turns.append(Message("user", text()))
                train = False if turn == 0 and variant == 4 else None
                turns.append(Message("assistant", text(), train, (("name", "a"),)))
            generated.append(Example("c.jsonl", line, tuple(turns), tools=[{"a": 1}]))
    return generated


def by_all_offsets(example: Example, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Ids and marks from every token's offsets, as the text's spans say."""
    renderer = data.Renderer(tokenizer)
    rendered = renderer.render(example)
    assert rendered is not None
    encoded = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    marks = [
        any(end > begin and start < stop for begin, stop in rendered.learnt)
        for start, end in encoded["offset_mapping"]
    ]
    return encoded["input_ids"], [False, *marks[1:]]


@pytest.mark.parametrize("name", ["tiny", "smollm2-135m"])
def test_marks_are_those_that_all_offsets_give(name: str) -> None:
    tokenizer = tiny_tokenizer() if name == "tiny" else load_tokenizer(name)
    choose_template(tokenizer, "chatml" if name == "tiny" else None)
    conversations = [example for example in examples(200) if example.messages]
    encoded = encode(conversations, tokenizer, max_length=2**31)
    rows = {row.example.line: row for row in encoded.rows}
    compared = 0
    for example in conversations:
        ids, marks = by_all_offsets(example, tokenizer)
        if any(marks):
            assert rows[example.line].input_ids == ids
            assert rows[example.line].supervised == marks
            compared += 1
    assert compared > 50


def test_parts_and_disk_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    choose_template(tokenizer, "chatml")
    dataset = examples(2 * PART_EXAMPLES + 3)
    in_memory = encode(dataset, tokenizer, max_length=48)
    one_by_one = [row for example in dataset for row in _rows_of(example, tokenizer)]
    assert [row.input_ids for row in in_memory.rows] == [row.input_ids for row in one_by_one]
    monkeypatch.setattr(storage, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(Spool.__init__, "__defaults__", (0,))
    stored = encode(_store(dataset), tokenizer, max_length=48)
    assert isinstance(stored.rows, data.EncodedRows)
    assert isinstance(stored.rows.ids, np.memmap)
    assert stored.sha256 == in_memory.sha256
    assert stored.counts == in_memory.counts
    assert stored.problems == in_memory.problems
    assert stored.findings == in_memory.findings
    assert [row.example.where for row in stored.rows] == [
        row.example.where for row in in_memory.rows
    ]
    assert stored.rows[-1] == in_memory.rows[-1]
    assert stored.rows[3:5] == in_memory.rows[3:5]


needs_fork = pytest.mark.skipif(not forks.possible(), reason="this system does not fork")


@needs_fork
@pytest.mark.parametrize("container", ["list", "store", "some of a store"])
@pytest.mark.parametrize("template", ["chatml", "alpaca", "no systems"])
def test_processes_encode_what_one_encodes(
    container: str, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    choose_template(tokenizer, template if template != "no systems" else "chatml")
    if template == "no systems":
        refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}"
        tokenizer.chat_template = refusing + tokenizer.chat_template
    dataset: Sequence[Example] = examples(120)
    if container != "list":
        dataset = _store(list(dataset))
    if container == "some of a store":
        dataset = storage.chosen(dataset, [place for place in range(120) if place % 7])

    def encoded() -> data.Encoded:
        return encode(
            dataset, tokenizer, max_length=48, system_role="keep", skip_bad_rows=True,
            progress=lambda done, total: heard.append((done, total)),
        )  # fmt: skip

    heard: list[tuple[int, int]] = []
    monkeypatch.setattr(forks, "possible", lambda: False)
    alone = encoded()
    monkeypatch.undo()
    heard.clear()
    monkeypatch.setattr(forks, "processors", lambda: 3)
    monkeypatch.setattr(encoding, "PAYS_S", 0.0)
    monkeypatch.setattr(encoding, "PART_EXAMPLES", 20)
    monkeypatch.setattr(encoding, "FORKED_EXAMPLES", 7)
    forked: list[int] = []
    fork = os.fork
    monkeypatch.setattr(os, "fork", lambda: (forked.append(1), fork())[1])
    together = encoded()
    assert len(forked) == 3
    assert together.sha256 == alone.sha256
    assert together.counts == alone.counts
    assert (together.counts.refused > 0) == (template == "no systems")
    assert together.problems == alone.problems
    assert together.findings == alone.findings
    assert together.rows[:] == alone.rows[:]
    assert heard[-1] == (len(dataset), len(dataset))
    assert heard == sorted(heard)


@needs_fork
def test_a_process_that_the_system_ends_costs_no_row() -> None:
    parent_pid = os.getpid()

    def work(piece: int) -> int:
        if piece in (3, 4) and os.getpid() != parent_pid:
            os.kill(os.getpid(), signal.SIGKILL)
        return piece * piece

    assert list(forks.in_order(work, 20, 2, 30.0)) == [n * n for n in range(20)]


@needs_fork
def test_a_process_that_stands_still_is_given_up() -> None:
    parent_pid = os.getpid()

    def work(piece: int) -> int:
        while piece == 2 and os.getpid() != parent_pid:
            time.sleep(1)
        return piece

    assert list(forks.in_order(work, 6, 2, 0.3)) == list(range(6))


def children() -> list[int]:
    """Process ids of this process's children; other tests may have left helpers of libraries."""
    return sorted(child.pid for child in psutil.Process().children())


@needs_fork
def test_an_error_of_a_process_is_raised_here_and_no_process_stays() -> None:
    before = children()

    def work(piece: int) -> int:
        if piece == 5:
            raise UserError("the sixth piece is broken")
        return piece

    with pytest.raises(UserError, match="sixth"):
        list(forks.in_order(work, 9, 2, 30.0))
    assert children() == before


@needs_fork
def test_a_process_that_waits_to_be_read_ends_with_its_reader() -> None:
    before = children()
    pieces = forks.in_order(lambda piece: bytes(10**6), 50, 2, 30.0)
    assert len(next(pieces)) == 10**6
    assert children() != before
    pieces.close()
    assert children() == before


def _rows_of(example: Example, tokenizer: Any) -> Sequence[data.Row]:
    try:
        return encode([example], tokenizer, max_length=48).rows
    except UserError:
        return []


def _store(dataset: list[Example], in_memory_bytes: int = 0) -> ExampleStore:
    store = ExampleStore(in_memory_bytes)
    for example in dataset:
        store.append(example)
    return store


@pytest.mark.parametrize("limit", [0, 2000, 10**9])
def test_a_store_gives_back_what_it_took(limit: int) -> None:
    dataset = examples(100)
    store = _store(dataset, limit)
    assert len(store) == 100
    assert list(store) == dataset
    assert store[-1] == dataset[-1]
    assert list(store[10:20:3]) == dataset[10:20:3]
    assert list(store[50:][5:9]) == dataset[55:59]
    with pytest.raises(IndexError):
        store[100]


def test_a_store_keeps_values_that_json_has_not() -> None:
    import datetime

    odd = Example("p.parquet", 2, (Message("user", "a"),), tools=[datetime.date(2026, 1, 2)])
    dataset = [*examples(3), odd, *examples(2)]
    assert list(_store(dataset)) == dataset


@pytest.mark.parametrize("size", [0.2, 7])
def test_a_split_of_a_store_is_that_of_a_list(size: float) -> None:
    dataset = examples(60)
    lists, stores = data.split(dataset, size), data.split(_store(dataset), size)
    assert [list(side) for side in stores[:2]] == [list(side) for side in lists[:2]]
    assert stores.held_out


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_large_files_are_read_without_being_held(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"instruction": f"Say {i}", "output": f"{i} {'가나다' * 20}"} for i in range(300)]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        lines = ["instruction,output", *(f"{r['instruction']},{r['output']}" for r in rows)]
        path.write_text("\n".join(lines), encoding="utf-8")
    elif suffix == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    in_memory = data.read(str(path)).examples
    monkeypatch.setattr(ExampleStore.__init__, "__defaults__", (0,))
    stored = data.read(str(path)).examples
    assert isinstance(stored, ExampleStore)
    assert not stored._objects
    assert list(stored) == list(in_memory)


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
    monkeypatch.setenv("LIGHTEN_CACHE", str(tmp_path / "cache"))
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
    real_version = row_cache.version
    monkeypatch.setattr(
        row_cache, "version", lambda name: "0.0.1" if name == package else real_version(name)
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


def test_cut_rows_are_those_that_encoding_cuts() -> None:
    tokenizer = tiny_tokenizer()
    choose_template(tokenizer, "chatml")
    dataset = examples(150)
    uncut = encode(dataset, tokenizer, max_length=2**31)
    for length in (3, 20, 48, 2**31):
        direct = encode(dataset, tokenizer, max_length=length)
        later = encoding.cut(uncut, length)
        assert later.rows[:] == direct.rows[:]
        assert later.counts == direct.counts
        assert sorted(later.problems) == sorted(direct.problems)
        assert later.findings == direct.findings
    with pytest.raises(UserError, match="max_length 1: "):
        encoding.cut(uncut, 1)


def test_a_check_encodes_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {n}", "completion": "word " * n} for n in range(1, 40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tokenizer = tiny_tokenizer()
    choose_template(tokenizer, "chatml")
    calls: list[int] = []
    check_module = sys.modules["lighten.data.check"]
    monkeypatch.setattr(
        check_module,
        "encode",
        lambda *args, **kwargs: (calls.append(1), encode(*args, **kwargs))[1],
    )
    report = data.check(
        data.read(str(path)), tokenizer, max_length=24, template="", limit="the end"
    )
    assert calls == [1]
    assert report.counts["truncated"] > 0
    assert report.lengths["max"] > 24
    assert any("tokens, over the end: " in problem for problem in report.problems)


def printed(
    steps: list[tuple[int, int, float]], monkeypatch: pytest.MonkeyPatch, **console_options: Any
) -> str:
    """What is printed of an encoding that has done so many examples at such times."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    screen = Console(file=io.StringIO(), width=100, **console_options)
    with progress.TrainingProgress(console=screen) as training_progress:
        for done, total, clock[0] in steps:
            training_progress.encoding(done, total)
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = [(1, 5000, 0.0), (500, 5000, 1.0), (1000, 5000, 3.0), (1500, 5000, 5.0),
            (4000, 5000, 19.0), (5000, 5000, 25.0), (1, 40, 26.0), (40, 40, 26.1)]  # fmt: skip
    assert printed(slow, monkeypatch).splitlines() == [
        "encoding: 1,000 of 5,000 examples, 12 s left",
        "encoding: 4,000 of 5,000 examples, 5 s left",
        "encoding: 5,000 of 5,000 examples",
    ]
    assert printed([(1, 60, 0.0), (60, 60, 1.0)], monkeypatch) == ""


def test_a_terminal_gets_a_bar_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = [(1, 5000, 0.0), (1000, 5000, 3.0), (1500, 5000, 5.0), (5000, 5000, 25.0)]
    output = printed(slow, monkeypatch, force_terminal=True)
    assert "encoding" in output
    assert "1000/5000" in output
    assert output.endswith("\x1b[2K\x1b[?25h")  # the line is empty at the end


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


def test_arrays_are_gone_through_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PIECE_BYTES", 64)
    numbers = np.random.default_rng(0).integers(0, 10**6, 1001).astype(np.int32)
    numbers.tofile(tmp_path / "numbers")
    mapped = np.memmap(tmp_path / "numbers", dtype=np.int32, mode="r")
    for array in (numbers, mapped, numbers[:16], numbers[:0]):
        parts = list(storage.pieces(array))
        assert all(len(part) <= 16 for part in parts)
        assert [int(number) for part in parts for number in part] == array.tolist()
    tokenizer = tiny_tokenizer()
    choose_template(tokenizer, "chatml")
    rows = encode(examples(20), tokenizer, max_length=2**31).rows
    assert isinstance(rows, data.EncodedRows)
    assert rows.highest == max(max(row.input_ids) for row in rows)


def test_a_row_takes_little_more_than_four_bytes_a_token() -> None:
    tokenizer = tiny_tokenizer()
    choose_template(tokenizer, "chatml")
    long = [Example("f", n, (Message("user", "q"), Message("assistant", "word " * 300)))
            for n in range(40)]  # fmt: skip
    rows = encode(long, tokenizer, max_length=2**31).rows
    assert isinstance(rows, data.EncodedRows)
    array_bytes = sum(array.nbytes for array in rows.arrays().values())
    assert array_bytes <= 4.5 * len(rows.ids)


def test_a_cache_that_cannot_be_written_changes_nothing(cached: Path, tiny_folder: Path) -> None:
    (cached / "cache").write_text("a file where the folder would be", encoding="utf-8")
    rows = loaded(recipe_for(cached, tiny_folder), tiny_folder)
    assert rows.train.counts.rows == 48  # of 60: a fifth is held out at least
