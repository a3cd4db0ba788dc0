"""Data sets larger than memory should hold: the same rows from disk as from memory."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from rich.console import Console

from lighten import data
from lighten.data import Example, Message, choose_template, encode, storage
from lighten.data.storage import ExampleStore, Spool
from lighten.data.tokenise import PART_EXAMPLES
from lighten.errors import UserError
from lighten.machine import forks
from lighten.models import load_tokenizer
from lighten.training import progress
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
