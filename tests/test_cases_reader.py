"""Data files as people have them: read right, or refused in a sentence that says what and where."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pandas
import pyarrow
import pyarrow.parquet
import pytest

from lighten import api, data
from lighten.data import Example
from lighten.data.shapes import COLUMNS
from lighten.errors import UserError
from lighten.recipe import fields
from tests.tiny import save_tiny

NAN = float("nan")


def lines(path: Path, rows: list[Any]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """The rows as the file's suffix says, by the library that people use for it."""
    if path.suffix == ".jsonl":
        return lines(path, rows)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2))
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def turns(example: Example) -> list[str]:
    return [message.content for message in example.messages]


def refused(path: Path | str, **how: Any) -> str:
    with pytest.raises(UserError) as error:
        data.read(str(path), **how)
    return str(error.value)


# Values by their type.


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_no_value_is_no_text_and_zero_is_zero(suffix: str, tmp_path: Path) -> None:
    rows = [{"instruction": "q", "input": value, "output": "a"} for value in (NAN, 0, 3, None)]
    dataset = data.read(write_rows(tmp_path / f"d.{suffix}", rows))
    assert [turns(e)[0] for e in dataset.examples] == ["q", "q\n0", "q\n3", "q"]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("key", ["output", "instruction"])
def test_an_answer_or_question_without_a_value_is_a_broken_row(
    suffix: str, key: str, tmp_path: Path
) -> None:
    rows = [{"instruction": "q", "output": "a"}, {"instruction": "q", "output": "a", key: NAN}]
    if suffix == "parquet":
        rows[1][key] = None
    why = refused(write_rows(tmp_path / f"d.{suffix}", rows))
    assert f"{key} must be text, not nothing" in why
    dataset = data.read(write_rows(tmp_path / f"d.{suffix}", rows), skip_bad_rows=True)
    assert (len(dataset.examples), len(dataset.bad_rows)) == (1, 1)


def test_pandas_missing_values_are_missing_in_every_format_it_writes(tmp_path: Path) -> None:
    frame = pandas.DataFrame({
        "instruction": ["a", "b"], "input": [NAN, "x"], "output": ["c", "d"],
        "system": [None, None],
    })  # fmt: skip
    frame.to_json(tmp_path / "d.json")
    frame["history"] = pandas.Series([pandas.NaT, pandas.NaT])
    frame.to_parquet(tmp_path / "d.parquet")
    frame.to_csv(tmp_path / "d.csv", index=False)
    del frame["history"]
    frame.to_json(tmp_path / "d.jsonl", orient="records", lines=True)
    for suffix in ("parquet", "csv", "json", "jsonl"):
        dataset = data.read(str(tmp_path / f"d.{suffix}"))
        assert [turns(e) for e in dataset.examples] == [["a", "c"], ["b\nx", "d"]], suffix


@pytest.mark.parametrize(
    ("value", "why"),
    [(False, "not false"), (True, "not true"), ({"a": 1}, "not an object"), ([1], "not a list"),
     (float("inf"), "not an infinite number")],
)  # fmt: skip
def test_what_is_no_text_is_refused(value: Any, why: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "d.jsonl", [{"prompt": "q", "completion": value}])
    assert f"completion must be text, {why}" in refused(path)


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (0.5, "0.5"), (10**30, str(10**30))])
def test_numbers_are_text(value: Any, text: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "d.jsonl", [{"prompt": value, "completion": value}])
    assert turns(data.read(path).examples[0]) == [text, text]


# Tool calls and tools.

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def a_call(**call: Any) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, **call},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "It is."},
    ]


CITY = {"city": "Seoul"}
CALLS: list[dict[str, Any]] = [
    {"tool_calls": [{"type": "function", "function": {"name": "w", "arguments": CITY}}]},
    {"tool_calls": [
        {"type": "function", "function": {"name": "w", "arguments": json.dumps(CITY)}}
    ]},
    {"tool_calls": json.dumps(
        [{"type": "function", "function": {"name": "w", "arguments": json.dumps(CITY)}}]
    )},
    {"function_call": {"name": "w", "arguments": json.dumps(CITY)}},
    {"tool_calls": [
        json.dumps({"type": "function", "function": {"name": "w", "arguments": CITY}})
    ]},
    {"tool_calls": [{"name": "w", "arguments": CITY}]},
    {"tool_calls": json.dumps([{"name": "w", "arguments": json.dumps(CITY)}])},
    {"tool_calls": {"name": "w", "arguments": CITY}},
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_arguments_are_decoded_once_however_they_are_written(
    call: dict[str, Any], tmp_path: Path
) -> None:
    (example,) = data.read(
        lines(tmp_path / "d.jsonl", [{"messages": a_call(**call), "tools": [TOOL]}])
    ).examples
    function = {"type": "function", "function": {"name": "w", "arguments": CITY}}
    assert dict(example.messages[1].extra)["tool_calls"] == [function]


@pytest.mark.parametrize(
    ("tools", "expected"),
    [(json.dumps([TOOL]), [TOOL]), ([json.dumps(TOOL)], [TOOL]), (json.dumps(TOOL), [TOOL]),
     ("[]", None), ("", None), ("null", None), ([], None), (NAN, None), (None, None),
     (TOOL, [TOOL]), (json.dumps([TOOL["function"]]), [TOOL]), (TOOL["function"], [TOOL]),
     ({"type": "search", "name": "s"}, [{"type": "search", "name": "s"}])],
)  # fmt: skip
def test_tools_are_decoded_however_they_are_written(
    tools: Any, expected: Any, tmp_path: Path
) -> None:
    path = lines(tmp_path / "d.jsonl", [{"messages": a_call()[2:], "tools": tools}])
    assert data.read(path).examples[0].tools == expected


def test_functions_of_openai_are_tools(tmp_path: Path) -> None:
    row = {"messages": a_call()[2:], "functions": [TOOL["function"], json.dumps(TOOL["function"])]}
    assert data.read(lines(tmp_path / "d.jsonl", [row])).examples[0].tools == [TOOL, TOOL]


@pytest.mark.parametrize(
    ("row", "why"),
    [({"messages": a_call(), "tools": "weather"}, "tools is text, but not JSON"),
     ({"messages": a_call(), "tools": "[{'name': 'w'}]"}, "write it with json.dumps"),
     ({"messages": a_call(), "tools": [1]}, "each an object"),
     ({"messages": a_call(tool_calls=[{"function": {"name": "w", "arguments": "Seoul"}}])},
      "message 2: arguments is text, but not JSON"),
     ({"messages": a_call(tool_calls=[{"function": {"name": "w", "arguments": [1]}}])},
      "arguments must be an object"),
     ({"messages": a_call(tool_calls=json.dumps(json.dumps([])))}, "inside JSON text")],
)  # fmt: skip
def test_tools_that_mean_nothing_are_broken_rows(
    row: dict[str, Any], why: str, tmp_path: Path
) -> None:
    row["messages"][1]["content"] = ""
    assert why in refused(lines(tmp_path / "d.jsonl", [row]))


@pytest.mark.parametrize("count", [1, 2])
def test_calls_of_sharegpt_are_those_of_openai(count: int, tmp_path: Path) -> None:
    call = {"name": "w", "arguments": json.dumps(CITY)}
    written = json.dumps([call] * count if count > 1 else call)
    conversation = [
        {"from": "human", "value": "?"}, {"from": "function_call", "value": written},
        {"from": "observation", "value": "sunny"}, {"from": "function_call", "value": "w(Seoul)"},
    ]  # fmt: skip
    (example,) = data.read(lines(tmp_path / "d.jsonl", [{"conversations": conversation}])).examples
    function = {"type": "function", "function": {"name": "w", "arguments": CITY}}
    assert [message.role for message in example.messages] == [
        "user", "assistant", "tool", "assistant",
    ]  # fmt: skip
    assert turns(example) == ["?", "", "sunny", "w(Seoul)"]  # the last one is text, as before
    assert example.messages[1].extra == (("tool_calls", [function] * count),)


TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ANSWERED: list[dict[str, Any]] = [
    {"prompt": "a", "completion": "b"}, {"messages": TALK}, {"instruction": "a", "output": "b"},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
]  # fmt: skip


@pytest.mark.parametrize(
    "mark", [{"label": False}, {"kto_tag": False}, {"kto_tag": "False"}, {"label": "false"}]
)
@pytest.mark.parametrize("row", ANSWERED)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_an_answer_that_is_marked_as_a_bad_one_is_not_learnt(
    row: dict[str, Any], mark: dict[str, Any], suffix: str, tmp_path: Path
) -> None:
    assert "is false: its answer is one that is not to be learnt" in refused(
        write_rows(tmp_path / f"d.{suffix}", [{**row, **mark}])
    )


def test_a_table_s_word_marks_an_answer_too(tmp_path: Path) -> None:
    good, bad = ({**ANSWERED[0], "label": label} for label in (True, False))
    path = write_rows(tmp_path / "d.csv", [good, bad])
    assert "d.csv:3: label is false" in refused(path)
    assert len(data.read(path, skip_bad_rows=True).examples) == 1


@pytest.mark.parametrize(
    "more", [{"label": True}, {"label": 0}, {"label": None}, {"label": "0"}, {"label": "falsehood"}]
)
@pytest.mark.parametrize("row", ANSWERED)
def test_another_label_says_nothing_of_the_answer(
    row: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    assert len(data.read(lines(tmp_path / "d.jsonl", [{**row, **more}])).examples) == 1
    text = {"text": "a b", "label": False}  # its class
    assert len(data.read(lines(tmp_path / "t.jsonl", [text])).examples) == 1


@pytest.mark.parametrize("column", ["images", "videos", "audios"])
def test_rows_with_more_than_text_are_refused(column: str, tmp_path: Path) -> None:
    row = {"instruction": "<image>What is it?", "output": "A cat.", column: ["cat.jpg"]}
    assert f"holds {column}; only text can be trained here" in refused(
        lines(tmp_path / "d.jsonl", [row])
    )
    row[column] = []  # as a table that has such rows writes it of the others
    assert len(data.read(lines(tmp_path / "d.jsonl", [row])).examples) == 1


def test_keys_that_arrow_filled_in_are_gone_and_others_stay(tmp_path: Path) -> None:
    def row_with_call(name: str, **arguments: Any) -> dict[str, Any]:
        function = {"name": name, "arguments": arguments}
        return {"messages": a_call(tool_calls=[{"type": "function", "function": function}])}

    rows = [row_with_call("w", city="Seoul", days=[1, None]), row_with_call("t", zone="KST")]
    dataset = data.read(write_rows(tmp_path / "d.parquet", rows))
    arguments = [
        dict(example.messages[1].extra)["tool_calls"][0]["function"]["arguments"]
        for example in dataset.examples
    ]
    assert arguments == [{"city": "Seoul", "days": [1, None]}, {"zone": "KST"}]
    # JSON keeps a null that its writer wrote.
    dataset = data.read(lines(tmp_path / "d.jsonl", [row_with_call("w", city=None)]))
    calls = dict(dataset.examples[0].messages[1].extra)["tool_calls"]
    assert calls[0]["function"]["arguments"] == {"city": None}


def test_messages_in_a_table_cell_may_be_json_text(tmp_path: Path) -> None:
    messages = json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    for suffix in ("csv", "parquet"):
        path = write_rows(tmp_path / f"d.{suffix}", [{"messages": messages}])
        assert turns(data.read(path).examples[0]) == ["q", "a"]


# CSV.


def test_unusual_separators_inside_cells_are_kept(tmp_path: Path) -> None:
    texts = [f"a{mark}b" for mark in "\u2028\u2029\x0c\x0b\x85\x1c\x1d\x1e\r\n\t;|"] + ["a\r\nb"]
    path = write_rows(tmp_path / "d.csv", [{"text": text} for text in texts])
    assert [e.text for e in data.read(path).examples] == texts
    pandas.DataFrame({"text": texts}).to_csv(tmp_path / "p.csv", index=False)
    assert [e.text for e in data.read(str(tmp_path / "p.csv")).examples] == texts


@pytest.mark.parametrize(
    ("text", "line"),
    [
        # Not closed, a quote took every later row into its cell.
        ('prompt,completion\nq1,a1\nq2,"a2\nq3,a3\nq4,a4\n', 3),
        ('prompt,completion\nq1,"a1\nq2,"a2\nq3,a3\n', 2),
        ('"prompt,completion\nq1,a1\n', 1),
        ('prompt,completion\nq1,a1\nq2,"say \\"yes\\", please"\n', 3),
    ],
)
def test_a_quote_that_is_not_closed_swallows_no_rows(text: str, line: int, tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text(text)
    assert f"d.csv:{line} is not valid CSV" in refused(tmp_path / "d.csv")


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_the_separator_is_taken_from_the_header(mark: str, bom: str, tmp_path: Path) -> None:
    frame = pandas.DataFrame({"instruction": ["a, b; c", 'd "e"\nf'], "output": ["1,5", "2;5"]})
    for name in ("d.csv", "d.tsv", "D.CSV"):
        (tmp_path / name).write_text(bom + frame.to_csv(sep=mark, index=False), "utf-8")
        dataset = data.read(str(tmp_path / name))
        assert [turns(e) for e in dataset.examples] == [["a, b; c", "1,5"], ['d "e"\nf', "2;5"]]


def test_a_csv_s_index_column_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    frame = pandas.DataFrame({"prompt": ["a", "b"], "completion": ["c", "d"]})
    (tmp_path / "d.csv").write_text(frame.to_csv() + "\n\n")
    dataset = data.read(str(tmp_path / "d.csv"))
    assert [turns(e) for e in dataset.examples] == [["a", "c"], ["b", "d"]]


def test_a_header_that_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("text,text\na,b\n")
    assert "two columns called 'text'" in refused(tmp_path / "d.csv")
    table = pyarrow.table([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    assert "two columns called 'text'" in refused(tmp_path / "d.parquet")


# JSON that is no JSON lines.

ROWS = [{"instruction": f"say {i}", "output": f"the sea {i}"} for i in range(4)]
EXPECTED = [[row["instruction"], row["output"]] for row in ROWS]
FRAME = pandas.DataFrame(ROWS)
DOCUMENTS = {
    "a list": (json.dumps(ROWS), [1, 2, 3, 4]),
    "a list, a row a line": (
        "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n", [2, 3, 4, 5]
    ),
    "a list, indented": (json.dumps(ROWS, indent=2), [2, 6, 10, 14]),
    "objects over several lines": (
        "\n".join(json.dumps(row, indent=1) for row in ROWS), [1, 5, 9, 13]
    ),
    "one line, then several": (
        json.dumps(ROWS[0]) + "\n" + "\n".join(json.dumps(r, indent=1) for r in ROWS[1:]),
        [1, 2, 6, 10],
    ),
    "data": (json.dumps({"data": ROWS}), [1, 2, 3, 4]),
    "data, indented": (json.dumps({"version": [1], "data": ROWS}, indent=2), [6, 10, 14, 18]),
    "another key": (json.dumps({"version": "1", "examples": ROWS}), [1, 2, 3, 4]),
    "pandas": (FRAME.to_json(), [1, 2, 3, 4]),
    "pandas, indented": (FRAME.to_json(indent=2), [1, 2, 3, 4]),
    "pandas split": (FRAME.to_json(orient="split"), [1, 2, 3, 4]),
    "pandas index": (FRAME.to_json(orient="index"), [1, 2, 3, 4]),
    "pandas table": (FRAME.to_json(orient="table"), [1, 2, 3, 4]),
    "columns of lists": (json.dumps(FRAME.to_dict(orient="list")), [1, 2, 3, 4]),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["json", "jsonl", "JSON", "ndjson"])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_json_file_s_rows_are_read_whatever_its_form(
    name: str, suffix: str, tmp_path: Path
) -> None:
    text, places = DOCUMENTS[name]
    (tmp_path / f"d.{suffix}").write_text("\ufeff" + text, encoding="utf-8")
    dataset = data.read(str(tmp_path / f"d.{suffix}"))
    assert [turns(e) for e in dataset.examples] == EXPECTED
    assert [e.line for e in dataset.examples] == places


@pytest.mark.parametrize(
    ("text", "why"),
    [("[\n" + ",\n".join(map(json.dumps, ROWS)), "d.jsonl:5 is not valid JSON"),
     ("[\n" + "\n".join(map(json.dumps, ROWS)) + "]", "d.jsonl:3 is not valid JSON: a comma or ]"),
     (json.dumps(ROWS, indent=1)[:-9], "d.jsonl:16 is not valid JSON"),
     (json.dumps({"data": ROWS}, indent=1)[:-30], "is not valid JSON"),
     (json.dumps(ROWS, indent=1) + "\n{}", "'{}' follows the list"),
     (json.dumps({"train": ROWS, "test": ROWS}), "the lists train, test"),
     (json.dumps({"rows": {"a": 1}}), "its columns are rows")],
)  # fmt: skip
@pytest.mark.parametrize("skip", [False, True])
def test_a_broken_json_document_is_refused_as_one_and_never_read_in_part(
    text: str, why: str, skip: bool, tmp_path: Path
) -> None:
    (tmp_path / "d.jsonl").write_text(text)
    message = refused(tmp_path / "d.jsonl", skip_bad_rows=skip)
    assert why in message
    assert len(message.splitlines()) <= 2


def test_a_torn_line_is_a_broken_row_wherever_it_stands(tmp_path: Path) -> None:
    good = [json.dumps(row) for row in ROWS]
    for place in range(4):
        torn = [line if i != place else line[:-5] for i, line in enumerate(good)]
        (tmp_path / "d.jsonl").write_text("\n".join(torn))
        assert f"d.jsonl:{place + 1}: not valid JSON" in refused(tmp_path / "d.jsonl")
        dataset = data.read(str(tmp_path / "d.jsonl"), skip_bad_rows=True)
        assert [turns(e) for e in dataset.examples] == EXPECTED[:place] + EXPECTED[place + 1 :]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "cp949", "latin-1"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json"])
def test_another_encoding_is_said(encoding: str, suffix: str, tmp_path: Path) -> None:
    text = "값" if encoding == "cp949" else "é"
    body = f"text\na\n{text}\n" if suffix == "csv" else f'{{"text": "a"}}\n{{"text": "{text}"}}'
    (tmp_path / f"d.{suffix}").write_bytes(body.encode(encoding))
    why = refused(tmp_path / f"d.{suffix}")
    assert "save the file as UTF-8" in why
    if "utf" not in encoding:
        assert f"d.{suffix}:{3 if suffix == 'csv' else 2} is not UTF-8" in why


def test_rows_broken_alike_are_told_once_with_their_lines(tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": "q", "completion": None}] * 12 + [{"prompt": "q"}]
    why = refused(lines(tmp_path / "d.jsonl", rows)).splitlines()
    assert len(why) == 3
    assert "d.jsonl:1: completion must be text" in why[0]
    assert "lines 2, 3, 4 and 8 more" in why[0]
    assert "d.jsonl:13: " in why[1]


# Other names for columns.


def test_columns_are_mapped_and_suggested(tmp_path: Path) -> None:
    rows = [{"question": "q", "response": "a", "text": "no"}]
    for suffix in ("jsonl", "csv", "parquet", "json"):
        path = write_rows(tmp_path / f"d.{suffix}", rows)
        mapped = data.read(path, columns={"instruction": "question", "output": "response"})
        assert turns(mapped.examples[0]) == ["q", "a"]
        why = refused(path, columns={"instruction": "question", "output": "answer"})
        assert "has no column answer" in why
        assert "its columns are question, response, text" in why
    path = lines(tmp_path / "d.jsonl", [{"question": "q", "response": "a"}])
    assert "set dataset_columns: {instruction: question, output: response}" in refused(path)
    path = lines(tmp_path / "d.jsonl", [{"번호": 1, "질문": "q", "답변": "a"}])
    assert "set dataset_columns: {instruction: 질문, output: 답변}" in refused(path)
    path = lines(tmp_path / "d.jsonl", [{"dialogue": [{"role": "user"}], "id": 1}])
    assert "set dataset_columns: {messages: dialogue}" in refused(path)
    pairs = [{"conversation": [{"human": "a", "assistant": "b"}]}]
    path = lines(tmp_path / "d.jsonl", 2 * pairs)
    assert "the entries of conversation have human, assistant; write each" in refused(path)
    path = lines(tmp_path / "d.jsonl", [{"Instruction": "q", "Output": "a"}])
    assert "{instruction: Instruction, output: Output}" in refused(path)
    assert set(fields.COLUMNS) == set(COLUMNS)


# Ready tokens.


@pytest.mark.parametrize(
    ("row", "ids", "labels"),
    [({"attention_mask": [1, 1, 1, 0, 0]}, (5, 6, 2), (5, 6, 2)),
     ({"attention_mask": [True, True, False, False, False]}, (5, 6), (5, 6)),
     ({"attention_mask": [0, 0, 1, 1, 1]}, (2, 0, 0), (2, 0, 0)),
     ({"attention_mask": [1, 1, 1, 1, 1]}, (5, 6, 2, 0, 0), (5, 6, 2, 0, 0)),
     ({}, (5, 6, 2, 0, 0), (5, 6, 2, 0, 0)),
     ({"attention_mask": [0, 1, 1, 0, 0], "labels": [-100, -100, 2, 0, 7]}, (6, 2), (-100, 2))],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_padding_is_cut_away(
    row: dict[str, Any], ids: Any, labels: Any, suffix: str, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / f"d.{suffix}", [{"input_ids": [5, 6, 2, 0, 0], **row}])
    (example,) = data.read(path).examples
    assert (example.input_ids, example.labels) == (ids, labels)


@pytest.mark.parametrize(
    ("row", "why"),
    [({"input_ids": [5, 6, 2], "labels": [6, 2, -100]}, "label 1 is 6 where the token is 5"),
     ({"input_ids": [5, 6, 2], "labels": [6, 2, -100]}, "shifts them by itself"),
     ({"input_ids": [5, 6, 2], "labels": [5, 6, 9]}, "label 3 is 9 where the token is 2"),
     ({"input_ids": [5, 6, 2], "labels": [0, 0, 1]}, "label 1 is 0"),
     ({"input_ids": [5, 6, 2], "attention_mask": [1, 0, 1]}, "attention_mask hides token 2"),
     ({"input_ids": [5, 6, 2], "attention_mask": [0, 0, 0]}, "1 for each token"),
     ({"input_ids": [5, 6, 2], "attention_mask": [1, 1]}, "as long as input_ids"),
     ({"input_ids": [5, True]}, "token ids"), ({"input_ids": [5, 1.5]}, "token ids"),
     ({"input_ids": [2**40]}, "token ids"), ({"input_ids": []}, "input_ids is empty")],
)  # fmt: skip
def test_ready_tokens_that_mean_nothing_are_broken_rows(
    row: dict[str, Any], why: str, tmp_path: Path
) -> None:
    assert why in refused(lines(tmp_path / "d.jsonl", [row]))


def test_rows_left_out_are_told_and_kept_with_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken_row = {"prompt": "q", "completion": None}
    good_rows = [{"prompt": f"say {i}", "completion": f"sea {i}"} for i in range(6)]
    lines(tmp_path / "d" / "train.jsonl", [*good_rows, broken_row, broken_row])
    lines(tmp_path / "d" / "valid.jsonl", [*good_rows[:2], broken_row, "x", broken_row])
    settings = {
        "model_name_or_path": str(save_tiny(tmp_path / "m")), "dataset": str(tmp_path / "d"),
        "output_dir": str(tmp_path / "run"), "max_steps": 1, "dtype": "float32",
    }  # fmt: skip
    with pytest.raises(UserError, match=r"train\.jsonl:7: completion must be text"):
        api.train(progress=False, **settings)
    run = api.train(skip_bad_rows=True, **settings)
    data_info = run.info()["data"]
    assert (data_info["bad_rows"], data_info["eval_bad_rows"]) == (2, 3)
    # Long paths are broken anywhere: white space is left out of the comparison.
    output = "".join("".join(capsys.readouterr()).split())
    for sentence in (
        "2 of 8 training rows are broken and left out",
        "3 of 5 held-out rows are broken and left out",
        "train.jsonl:7: completion must be text",
    ):
        assert sentence.replace(" ", "") in output
    assert api.evaluate(run, max_examples=2).to_dict()["dataset"]["rows"] == 2


def test_another_name_for_columns_holds_for_training_and_evaluation(tmp_path: Path) -> None:
    rows = [{"question": f"say {i}", "response": f"sea {i}"} for i in range(6)]
    lines(tmp_path / "d" / "train.jsonl", rows)
    lines(tmp_path / "d" / "valid.jsonl", rows[:2])
    run = api.train(
        model_name_or_path=str(save_tiny(tmp_path / "m")), dataset=str(tmp_path / "d"),
        dataset_columns={"instruction": "question", "output": "response"}, dtype="float32",
        output_dir=str(tmp_path / "run"), max_steps=1, progress=False,
    )  # fmt: skip
    assert run.info()["data"]["format"] == "alpaca"
    assert api.evaluate(run, max_examples=2).to_dict()["dataset"]["rows"] == 2
