"""Every shape and file that people have, and what broken ones say."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lighten import data
from lighten.data import Example, Message
from lighten.data.thoughts import thought_of, without_thought
from lighten.errors import UserError
from lighten.models import load_tokenizer
from lighten.recipe import Recipe
from lighten.training.rows import load_rows
from tests.tiny import tiny_tokenizer


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def roles_and_texts(example: Example) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in example.messages]


SHAPES: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "alpaca": (
        {"instruction": "추천해 주세요", "input": "비 오는 날", "output": "『소나기』"},
        [("user", "추천해 주세요\n비 오는 날"), ("assistant", "『소나기』")],
    ),
    "alpaca with history": (
        {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]},
        [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
    ),
    "messages": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        [("user", "a"), ("assistant", "b")],
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]},
                      {"role": "assistant", "content": "b"}]},
        [("user", "a"), ("assistant", "b")],
    ),
    "conversations": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
         "system": "s"},
        [("system", "s"), ("user", "a"), ("assistant", "b")],
    ),
    "prompt-completion": (
        {"prompt": "a", "completion": "b"}, [("user", "a"), ("assistant", "b")],
    ),
    "prompt-completion with a system message": (
        {"system": "s", "prompt": "a", "completion": "b"},
        [("system", "s"), ("user", "a"), ("assistant", "b")],
    ),
    "prompt-completion as messages": (
        {"prompt": [{"role": "user", "content": "a"}],
         "completion": [{"role": "assistant", "content": "b"}]},
        [("user", "a"), ("assistant", "b")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_recognised(name: str, tmp_path: Path) -> None:
    row, expected = SHAPES[name]
    dataset = data.read(write(tmp_path / "d.jsonl", [row]))
    assert roles_and_texts(dataset.examples[0]) == expected
    assert dataset.format == name.split(" ")[0].replace("parts", "messages")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_file_type_gives_the_same_examples(suffix: str, tmp_path: Path) -> None:
    rows = [{"instruction": f'질문 {i}, "quoted"\nline', "output": f"답 {i}"} for i in range(3)]
    path = tmp_path / f"d.{suffix}"
    if suffix == "jsonl":
        write(path, rows)
    elif suffix == "json":
        path.write_text(json.dumps(rows, ensure_ascii=False))
    elif suffix == "csv":
        import csv

        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, ["instruction", "output"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    dataset = data.read(str(path))
    assert [roles_and_texts(e)[0][1] for e in dataset.examples] == [
        row["instruction"] for row in rows
    ]
    assert [e.reference for e in dataset.examples] == [row["output"] for row in rows]


def test_a_folder_holds_its_splits_and_a_limit_follows_the_name(tmp_path: Path) -> None:
    for split, count in (("train", 5), ("valid", 2), ("test", 3)):
        write(tmp_path / f"{split}.jsonl", [{"text": f"{split} {i}"} for i in range(count)])
    assert len(data.read(str(tmp_path)).examples) == 5
    assert len(data.read(f"{tmp_path}#2").examples) == 2
    assert len(data.read(str(tmp_path), split="test").examples) == 3
    assert data.with_split(str(tmp_path), "valid")
    (tmp_path / "valid.jsonl").unlink()
    assert not data.with_split(str(tmp_path), "valid")
    with pytest.raises(UserError, match="has no valid file"):
        data.read(str(tmp_path), split="valid")


def test_broken_lines_are_told_together_with_their_places(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(
        '{"text": "fine"}\n{"text": \n\n[1]\n{"foo": 1, "bar": 2}\n{"messages": []}\n'
        '{"messages": [{"role": "robot", "content": "x"}]}\n{"instruction": "x"}\n'
        '{"prompt": "a", "completion": null}\n'
        '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}\n'
    )
    with pytest.raises(UserError) as error:
        data.read(str(path))
    message = str(error.value)
    for line, why in (
        (2, "not valid JSON"), (4, "a row must be an object"), (5, "its columns are foo, bar"),
        (6, "at least one message"), (7, "the role 'robot'"), (8, "output is missing"),
        (9, "completion must be text, not nothing"), (10, "only text can be trained"),
    ):  # fmt: skip
        assert any(f"{path}:{line}: " in row and why in row for row in message.splitlines()), why
    assert "--skip-bad-rows" in message
    dataset = data.read(str(path), skip_bad_rows=True)
    assert (len(dataset.examples), len(dataset.bad_rows)) == (1, 8)


def test_a_csv_record_with_stray_cells_or_long_ones_says_so(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('prompt,completion\n"a\nb",c\nhi,hello, world\nx,' + "y" * 200_000 + "\n")
    with pytest.raises(UserError, match=r"d\.csv:4: has more cells than the header"):
        data.read(str(path))
    dataset = data.read(str(path), skip_bad_rows=True)
    assert [len(str(e.reference)) for e in dataset.examples] == [1, 200_000]
    assert [e.line for e in dataset.examples] == [2, 5]


def test_lines_of_separators_alone_below_a_table_are_no_rows(tmp_path: Path) -> None:
    """Excel writes them for cells that were once used."""
    path = tmp_path / "d.csv"
    path.write_text("text,note\nhello,1\n,\nworld,\n,\n,\n")
    assert [(e.text, e.line) for e in data.read(str(path)).examples] == [("hello", 2), ("world", 4)]
    path.write_text('text\nhello\n""\n')
    with pytest.raises(UserError, match=r"d\.csv:3: text is empty"):
        data.read(str(path))


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ("instruction context response category",  # databricks-dolly-15k
         "{instruction: instruction, input: context, output: response}"),
        ("input output", "{instruction: input, output: output}"),
        ("input instruction response", "{instruction: instruction, output: response}"),
        ("question output", "{instruction: question, output: output}"),
        ("instruction 답변", "{instruction: instruction, output: 답변}"),
    ],
)  # fmt: skip
def test_half_an_alpaca_row_says_which_columns_may_be_meant(
    columns: str, named: str, tmp_path: Path
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({name: f"{name}?" for name in columns.split()}) + "\n")
    with pytest.raises(UserError, match=re.escape(f"; set dataset_columns: {named}")):
        data.read(str(path))
    chosen = dict(pair.split(": ") for pair in named.strip("{}").split(", "))
    (example,) = data.read(str(path), columns=chosen).examples
    assert example.reference == f"{chosen['output']}?"
    assert f"{chosen['instruction']}?" in example.messages[0].content


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ('{"text": "\\ud83d"}', "half of a surrogate pair"),
        ('{"input_ids": [1, 2], "labels": [1, "x"]}', "labels must be token ids"),
        ('{"messages": [{"role": "assistant", "content": "x", "train": "false"}]}',
         "train must be true or false"),
        ('{"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}', "0 or 1"),
        ('{"messages": [{"role": "assistant", "content": "x", "loss_scale": 2}]}',
         "message 1: loss_scale must be 0 or 1, not 2"),
        ('{"messages": [{"role": "assistant", "content": "x", "train": true, "loss": "no"}]}',
         "loss must be true or false"),
    ],
)  # fmt: skip
def test_values_that_mean_nothing_are_broken_rows(tmp_path: Path, row: str, why: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(row)
    with pytest.raises(UserError, match=why):
        data.read(str(path))


def test_a_message_of_no_weight_is_not_trained(tmp_path: Path) -> None:
    turns = [{"role": "assistant", "content": "x", "train": None, "weight": 0},
             {"role": "assistant", "content": "y", "weight": 1}]  # fmt: skip
    (example,) = data.read(write(tmp_path / "d.jsonl", [{"messages": turns}])).examples
    assert [m.train for m in example.messages] == [False, True]


@pytest.mark.parametrize("key", ["train", "loss", "training", "loss_scale"])
def test_a_message_is_learnt_as_keys_of_other_tools_say(key: str, tmp_path: Path) -> None:
    no, yes = (0, 1) if key == "loss_scale" else (False, True)
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x", key: no},
             {"from": "human", "value": "q"}, {"from": "gpt", "value": "y", key: yes}]  # fmt: skip
    dataset = data.read(write(tmp_path / "d.jsonl", [{"conversations": turns}]))
    assert [m.train for m in dataset.examples[0].messages] == [None, False, None, True]
    assert dataset.findings == []
    report = data.check(dataset, tiny_tokenizer(), max_length=64, template="t")
    assert "".join(token for token, learnt in report.sample if learnt) == "y<|im_end|>"


def test_the_thought_of_harmony_is_a_thought(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"},
             {"role": "assistant", "content": "yes", "thinking": "I reckon so"}]  # fmt: skip
    (example,) = data.read(write(tmp_path / "d.jsonl", [{"messages": turns}])).examples
    answer = example.messages[1]
    assert thought_of(answer) == "I reckon so"
    # Under the name that the templates of gpt-oss read, and under that of all others.
    assert answer.for_template() == {
        "role": "assistant", "content": "yes", "thinking": "I reckon so",
        "reasoning_content": "I reckon so",
    }  # fmt: skip
    assert without_thought(answer) == Message("assistant", "yes")


def test_keys_of_messages_that_nothing_reads_are_told_once_a_file(
    tmp_path: Path, tiny_folder: Path
) -> None:
    def row(number: int, **more: Any) -> dict[str, Any]:
        answer = {"role": "assistant", "content": str(number), "id": number, **more}
        return {"messages": [{"role": "user", "content": f"q {number}"}, answer]}

    rows = [row(0), row(1, citations=["a"]), row(2, channel="final", notes=""), row(3)]
    dataset = data.read(write(tmp_path / "train.jsonl", rows))
    (sentence,) = dataset.findings
    assert "train.jsonl:2: messages have keys that are not read: channel, citations;" in sentence
    report = data.check(dataset, tiny_tokenizer(), max_length=64, template="t")
    assert sentence in report.problems
    write(tmp_path / "valid.jsonl", [row(4, citations=[1]), row(5, channel="analysis")])
    both = data.read([str(tmp_path / f"{name}.jsonl") for name in ("train", "valid")])
    assert "channel, citations, and so in 1 other file;" in both.findings[0]
    assert len(both.findings) == 1
    recipe = Recipe.from_values(
        {"model_name_or_path": str(tiny_folder), "dataset": str(tmp_path), "max_length": 32}
    )
    notes = load_rows(recipe, load_tokenizer(str(tiny_folder))).notes
    assert len([note for note in notes if "citations" in note]) == 2


TALK = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
        {"from": "human", "value": "c"}]  # fmt: skip
GOOD, POOR = {"from": "gpt", "value": "good"}, {"from": "gpt", "value": "poor"}


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"conversations": TALK, "chosen": GOOD, "rejected": POOR},
         {"prompt": "conversations", "completion": "chosen"}, ["a", "b", "c", "good"]),
        ({"conversations": json.dumps(TALK), "chosen": json.dumps([GOOD]), "rejected": "poor"},
         {"prompt": "conversations", "completion": "chosen"}, ["a", "b", "c", "good"]),
        ({"instruction": "a", "input": "c", "output": "b", "chosen": "good", "rejected": "poor"},
         {"instruction": "instruction", "output": "chosen"}, ["a\nc", "good"]),
        ({"instruction": "a", "input": "", "chosen": "good", "rejected": "poor"},
         {"instruction": "instruction", "output": "chosen"}, ["a", "good"]),
        ({"prompt": "a", "chosen": "good", "rejected": "poor"},
         {"prompt": "prompt", "completion": "chosen"}, ["a", "good"]),
        ({"prompt": "a", "chosen": [TALK[0], GOOD], "rejected": [TALK[0], POOR]},
         {"messages": "chosen"}, ["a", "good"]),
    ],
)  # fmt: skip
def test_of_preferences_the_chosen_answers_are_learnt_only_where_that_is_said(
    row: dict[str, Any], columns: dict[str, str], expected: list[str], tmp_path: Path
) -> None:
    path = write(tmp_path / "d.jsonl", [row])
    with pytest.raises(UserError, match="has a chosen and a rejected answer") as error:
        data.read(path)
    described = ", ".join(f"{ours}: {theirs}" for ours, theirs in columns.items())
    assert f"dataset_columns: {{{described}}} to learn the chosen ones" in str(error.value)
    dataset = data.read(path, columns=columns)
    assert [m.content for m in dataset.examples[0].messages] == expected
    report = data.check(dataset, tiny_tokenizer(), max_length=128, template="t")
    assert "".join(token for token, learnt in report.sample if learnt).count("good") == 1
    if expected[1] == "b":
        assert dataset.examples[0].messages[1].train is False


def test_a_conversation_that_ends_with_the_chosen_answer_is_read(tmp_path: Path) -> None:
    whole = [*TALK, GOOD]
    rows = [
        {"conversations": whole, "chosen": whole, "rejected": [*TALK, POOR]},
        {"instruction": "a", "output": "good", "chosen": "good ", "rejected": "poor"},
    ]
    assert len(data.read(write(tmp_path / "d.jsonl", rows)).examples) == 2


def test_a_prompt_of_messages_may_be_json_text(tmp_path: Path) -> None:
    prompt, completion = [{"role": "user", "content": "a"}], [{"from": "gpt", "value": "b"}]
    listed = '[{"role": "PERSON", "text": "Ada"}]'
    rows = [{"prompt": json.dumps(prompt), "completion": json.dumps(completion, indent=2)},
            {"prompt": prompt, "completion": completion[0]},
            {"prompt": "a", "completion": listed}]  # fmt: skip
    examples = data.read(write(tmp_path / "d.jsonl", rows)).examples
    assert [roles_and_texts(example) for example in examples] == [
        [("user", "a"), ("assistant", "b")], [("user", "a"), ("assistant", "b")],
        [("user", "a"), ("assistant", listed)],  # an answer that is JSON
    ]  # fmt: skip
    path = write(tmp_path / "d.jsonl", [{"prompt": str(prompt), "completion": "b"}])
    with pytest.raises(UserError, match=r"prompt is text, but not JSON; it looks like Python"):
        data.read(path)


def test_a_file_that_is_not_there_not_text_or_empty_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        data.read(str(tmp_path / "no.jsonl"))
    (tmp_path / "d.txt").write_text("x")
    with pytest.raises(UserError, match=r"not one of \.jsonl.*; write each text as a line of JSON"):
        data.read(str(tmp_path / "d.txt"))
    for name, mend in (("a.xlsx", "save the sheet as CSV in UTF-8"), ("b.jsonl.gz", "unpack it")):
        folder = tmp_path / name[0]
        folder.mkdir()
        (folder / name).write_bytes(b"PK")
        for path, told in ((folder / name, f"; {mend}"), (folder, f"; of {name}: {mend}")):
            with pytest.raises(UserError, match=re.escape(told)):
                data.read(str(path))
    (tmp_path / "latin.jsonl").write_bytes('{"text": "a"}\n{"text": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.jsonl:2 is not UTF-8"):
        data.read(str(tmp_path / "latin.jsonl"))
    (tmp_path / "excel.csv").write_bytes("text\n안녕\n".encode("cp949"))
    with pytest.raises(UserError, match=r"excel\.csv:2 is not UTF-8 .* \(Excel saves Korean"):
        data.read(str(tmp_path / "excel.csv"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no example"):
        data.read(str(tmp_path / "empty.jsonl"))


def test_unusual_line_separators_inside_strings_do_not_split_rows(tmp_path: Path) -> None:
    dataset = data.read(write(tmp_path / "d.jsonl", [{"text": "a\u2028b\u0085c"}]))
    assert dataset.examples[0].text == "a\u2028b\u0085c"


prompts = st.lists(st.text("ab ", max_size=4), min_size=2, max_size=40)


@given(prompts, st.one_of(st.floats(0.05, 0.9), st.integers(1, 10)), st.integers(0, 3))
@settings(deadline=None)
def test_trap47_a_split_never_puts_a_prompt_on_both_sides(
    prompts: list[str], size: float, seed: int
) -> None:
    rows = [
        Example("f", i, (Message("user", p), Message("assistant", str(i))))
        for i, p in enumerate(prompts)
    ]
    try:
        train, held_out, _ = data.split(rows, size, seed)
    except UserError:
        assert len(rows) - (round(size * len(rows)) if size < 1 else size) < 2
        return
    assert {e.prompt_key for e in train}.isdisjoint(e.prompt_key for e in held_out)
    assert sorted(e.line for e in train + held_out) == list(range(len(rows)))
    assert train
    assert data.split(rows, size, seed)[:2] == (train, held_out)


def test_trap47_overlap_and_duplicates_are_reported(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"prompt": p, "completion": "x"} for p in "aabc"])
    write(tmp_path / "valid.jsonl", [{"prompt": p, "completion": "y"} for p in ("A ", "z")])
    report = data.check(
        data.read(str(tmp_path)), tiny_tokenizer(), max_length=25, template="t",
        evaluation=data.read(str(tmp_path), split="valid").examples,
    )  # fmt: skip
    assert (report.duplicates, report.overlap) == (1, 2)
    assert report.counts["supervised_tokens"] > 0
    assert sum(rows for _, rows in report.histogram) == 4
    learnt_text = "".join(token for token, supervised in report.sample if supervised)
    assert learnt_text == "x<|im_end|>"
    assert json.loads(json.dumps(report.to_dict()))["rows"] == 4


@pytest.mark.parametrize(
    ("prompt", "roles"),
    [
        ([{"role": "user", "content": "a"}], ["system", "user", "assistant"]),
        ([{"role": "system", "content": "t"}, {"role": "user", "content": "a"}],
         ["system", "user", "assistant"]),
    ],
)  # fmt: skip
def test_a_system_column_stands_before_a_prompt_that_has_none(
    prompt: list[dict[str, str]], roles: list[str], tmp_path: Path
) -> None:
    row = {"system": "s", "prompt": prompt, "completion": "b"}
    (example,) = data.read(write(tmp_path / "d.jsonl", [row])).examples
    assert [message.role for message in example.messages] == roles
    assert example.messages[0].content == ("s" if len(prompt) == 1 else "t")
    assert example.single_turn


def test_letters_written_in_parts_are_told_and_kept(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "한국어 답")
    rows = [{"prompt": "한국어", "completion": "café"}, {"prompt": "q", "completion": decomposed},
            {"text": unicodedata.normalize("NFD", "é")}, {"text": "5 \u2126"}]  # fmt: skip
    dataset = data.read(write(tmp_path / "d.jsonl", rows))
    assert dataset.examples[1].reference == decomposed
    (sentence,) = data.check(dataset, tiny_tokenizer(), max_length=99, template="t").problems
    assert sentence.startswith("2 of 4 rows write letters in parts")
    assert "d.jsonl:2: that takes more tokens" in sentence
    assert 'unicodedata.normalize("NFC", text)' in sentence
    assert data.read(write(tmp_path / "d.jsonl", [rows[0], rows[3]])).findings == []


QUOTED = '"안녕" 이라고 말해\t"네\n'


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_quote_that_begins_a_cell_between_tabs_may_be_text(end: str, tmp_path: Path) -> None:
    path = tmp_path / "d.tsv"
    text = "prompt\tcompletion\n안녕\t네\n\n" + QUOTED
    path.write_text("\ufeff" + text, encoding="utf-8", newline=end)
    dataset = data.read(str(path))
    assert [roles_and_texts(example) for example in dataset.examples] == [
        [("user", "안녕"), ("assistant", "네")],
        [("user", '"안녕" 이라고 말해'), ("assistant", '"네')],
    ]  # fmt: skip
    assert [example.line for example in dataset.examples] == [2, 4]
    assert len(dataset.findings) == 1
    assert "d.tsv is read with its quotes as they stand" in dataset.findings[0]
    whole = 'prompt\tcompletion\n"a\tb"\t"say ""yes"""\n'
    path.write_text(whole)
    assert roles_and_texts(data.read(str(path)).examples[0])[1][1] == 'say "yes"'
    for broken in (text + "one cell\n", whole + QUOTED, '"prompt"\tcompletion\n' + QUOTED):
        path.write_text(broken)
        with pytest.raises(UserError, match="is not valid CSV"):
            data.read(str(path), skip_bad_rows=True)


def test_a_prompt_is_the_same_however_its_hangul_is_composed(tmp_path: Path) -> None:
    rows = [{"prompt": unicodedata.normalize(form, "한국어 질문"), "completion": "답"}
            for form in ("NFC", "NFD")]  # fmt: skip
    texts = [{"text": row["prompt"]} for row in rows]
    for number, pair in enumerate((rows, texts)):
        first, second = data.read(write(tmp_path / f"{number}.jsonl", pair)).examples
        assert first != second
        assert first.prompt_key == second.prompt_key


def test_ready_tokens_with_one_prompt_stay_on_one_side(tmp_path: Path) -> None:
    def row(prompt: list[int], answer: list[int]) -> dict[str, list[int]]:
        padding = [0] * (8 - len(prompt) - len(answer))  # some write it without a mask
        labels = [-100] * len(prompt) + answer + [-100] * len(padding)
        return {"input_ids": prompt + answer + padding, "labels": labels}

    rows = [row([1, 7, question], [20 + n] * (1 + n % 2)) for question in range(40, 60)
            for n in range(3)]  # fmt: skip
    examples = data.read(write(tmp_path / "d.jsonl", rows)).examples
    train, held_out, _ = data.split(examples, 0.3)
    assert held_out
    assert not data.shared_prompts(train, held_out)
    assert {len({e.line for e in held_out if e.prompt_key == key}) for key in
            {e.prompt_key for e in held_out}} == {3}  # fmt: skip


def test_ready_texts_behind_one_bos_are_not_one_question(tmp_path: Path) -> None:
    rows = [{"input_ids": [1, n, n], "labels": [-100, n, n]} for n in range(5, 45)]
    rows += [{"input_ids": [n, n]} for n in range(5, 45)]
    examples = data.read(write(tmp_path / "d.jsonl", rows)).examples
    assert len({example.prompt_key for example in examples}) == 80
