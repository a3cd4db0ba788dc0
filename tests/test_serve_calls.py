"""Tool calls in the text of answers: each family's format, found from its template, and read."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import pytest

from lighten.serving.tools.formats import Abilities, abilities
from lighten.serving.tools.reader import CallFormat, CallReader
from tests.tiny import CHATML, tiny_tokenizer
from tests.tool_templates import FORMATS, PYTHONIC

TYPED = ("typed", {"text": "5", "maybe": "some", "kind": "1", "count": 5, "flag": False,
                   "list": [1, "a"], "other": "words", "ref": "5",
                   "first name": "a b"})  # fmt: skip
FUNCTIONS: dict[str, Any] = {
    "get_weather": None, "send": None, "typed": {"type": "object", "properties": {
        "text": {"type": "string"}, "count": {"type": "integer"}, "flag": {"type": "boolean"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "kind": {"enum": ["1", "2"]},
        "list": {"type": "array"}, "none": {"type": ["integer", "null"]},
        "ref": {"allOf": [{"$ref": "#/$defs/self"}], "default": "5"},
    }, "$defs": {"self": {"anyOf": [{"$ref": "#/$defs/self"}, {"$ref": "#/$defs/digit"}]},
                 "digit": {"enum": ["5", "6"]}}},
}  # fmt: skip
OSLO = ("get_weather", {"city": "Oslo"})
SENT = ("send", {"to": ["a", "b"], "text": 'said "}</tool_call>" \\ {[', "more": {"n": 1.5}})


def of(template: str) -> Abilities:
    return abilities(tiny_tokenizer(template=template), ["<|im_end|>", "</s>"])


@functools.cache
def format_of(name: str) -> CallFormat:
    call_format = of(FORMATS[name]).calls
    assert call_format is not None
    return call_format


def call(name: str, arguments: dict[str, Any], key: str = "arguments", **more: Any) -> str:
    return json.dumps({"name": name, key: arguments, **more})


def hermes(*calls: tuple[str, dict[str, Any]]) -> str:
    return "\n".join(f"<tool_call>\n{call(*each)}\n</tool_call>" for each in calls)


def xml(*calls: tuple[str, dict[str, Any]]) -> str:
    def value(argument: Any) -> str:
        return argument if isinstance(argument, str) else json.dumps(argument)

    return "\n".join(
        f"<tool_call>\n<function={name}>\n"
        + "".join(f"<parameter={k}>\n{value(v)}\n</parameter>\n" for k, v in arguments.items())
        + "</function>\n</tool_call>"
        for name, arguments in calls
    )


def blocks(*calls: tuple[str, dict[str, Any]]) -> str:
    written = (
        f"<|call|>function<|sep|>{name}\n```json\n{json.dumps(each)}\n```<|end_call|>"
        for name, each in calls
    )
    return f"<|calls|>{''.join(written)}<|end_calls|>"


def test_the_format_is_that_of_the_template() -> None:
    assert format_of("hermes") == CallFormat(
        "<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>", "name", "arguments"
    )
    assert format_of("qwen3") == format_of("hermes")
    assert format_of("llama") == CallFormat("", None, "", "name", "parameters")
    assert format_of("mistral") == CallFormat("[TOOL_CALLS] [", ", ", "]", "name", "arguments")
    assert format_of("mistral new") == CallFormat(
        "[TOOL_CALLS]", "[TOOL_CALLS]", "", middle="[ARGS]"
    )
    assert format_of("blocks").between == "\n```<|end_call|><|call|>function<|sep|>"


def test_what_a_template_does_with_tools_is_told() -> None:
    assert of(CHATML) == Abilities(False, False, True, None)
    assert of(PYTHONIC) == Abilities(True, True, True, None)
    for template in FORMATS.values():
        able = of(template)
        assert (able.describes, able.writes_calls, able.writes_results) == (True, True, True)


TEXTS: list[tuple[str, str, str, list[tuple[str, dict[str, Any]]]]] = [
    ("hermes", hermes(OSLO), "", [OSLO]),
    ("hermes", hermes(OSLO, SENT), "", [OSLO, SENT]),
    ("hermes", "Let me look.\n\n" + hermes(OSLO) + "\n", "Let me look.", [OSLO]),
    ("hermes", f"<tool_call>{call(*SENT)}</tool_call>", "", [SENT]),
    ("hermes", hermes(OSLO).removesuffix("\n</tool_call>"), "", [OSLO]),
    ("hermes", hermes(("unknown", {})), "", [("unknown", {})]),
    ("hermes", '<tool_call>\n{"name": "send"}\n</tool_call>', "", [("send", {})]),
    ("hermes", "No call: <tool and <b>.\n ", "No call: <tool and <b>.\n ", []),
    ("hermes", "<tool_call>\nnothing\n</tool_call>", "<tool_call>\nnothing\n</tool_call>", []),
    ("hermes", '<tool_call>\n{"name": "send", "arguments": {]', None, []),
    ("hermes", '<tool_call>\n{"name": "send", "arguments": 5}\n</tool_call>', None, []),
    ("hermes", '<tool_call>\n{"name": "send", "arguments": {"a": NaN}}\n</tool_call>', None, []),
    ("hermes", '<tool_call>\n{"name": 5}\n</tool_call> and ' + hermes(OSLO),
     '<tool_call>\n{"name": 5}\n</tool_call> and', [OSLO]),
    ("hermes", hermes(OSLO) + " and\n" + hermes(SENT) + "\nso", "and\nso", [OSLO, SENT]),
    ("hermes", f"<think>\nI call {hermes(SENT)} or not\n</think>\n\n{hermes(OSLO)}",
     f"<think>\nI call {hermes(SENT)} or not\n</think>", [OSLO]),
    ("llama", call(*OSLO, key="parameters"), "", [OSLO]),
    ("llama", "<|python_tag|>" + call(*SENT, key="parameters"), "", [SENT]),
    ("llama", "\n" + call(*OSLO), "", [OSLO]),
    ("llama", call(*OSLO, key="parameters") + "; " + call(*SENT, key="parameters"), "",
     [OSLO, SENT]),
    ("llama", call(*OSLO, key="parameters") + " It is cold.", "It is cold.", [OSLO]),
    ("llama", call("unknown", {}, key="parameters"), None, []),
    ("llama", '{"city": "Oslo"}', None, []),
    ("llama", '{"name": "send"}', None, []),
    ("llama", "{ is a brace.", None, []),
    ("llama", "As JSON: " + call(*OSLO, key="parameters"), None, []),
    ("llama", "<|python_tag|>print(1)", None, []),
    ("mistral", f"[TOOL_CALLS] [{call(*OSLO)}, {call(*SENT, id='123456789')}]", "", [OSLO, SENT]),
    ("mistral", f"[TOOL_CALLS][{call(*OSLO)}]", "", [OSLO]),
    ("mistral", f" It is so. [TOOL_CALLS] [{call(*OSLO)}]", " It is so.", [OSLO]),
    ("mistral", f"[TOOL_CALLS] [{call(*OSLO)}, 5]", None, []),
    ("mistral", "[TOOL_CALLS] are none", None, []),
    ("mistral new", f"[TOOL_CALLS]send[ARGS]{json.dumps(SENT[1])}", "", [SENT]),
    ("mistral new", f"a[TOOL_CALLS] send [ARGS] {{}}[TOOL_CALLS]get_weather[ARGS]"
     f"{json.dumps(OSLO[1])}", "a", [("send", {}), OSLO]),
    ("mistral new", "[TOOL_CALLS]send", None, []),
    ("mistral new", "[TOOL_CALLS]send[ARGS]5", None, []),
    ("xml", xml(OSLO), "", [OSLO]),
    ("xml", "So:\n" + xml(OSLO, SENT, ("send", {})), "So:", [OSLO, SENT, ("send", {})]),
    ("xml", xml(TYPED), "", [TYPED]),
    ("xml", "<tool_call>\n<function=typed>\n<parameter=flag>\nTrue\n</parameter>\n"
     "<parameter=none>\nNone\n</parameter>\n<parameter=maybe>\nnull\n</parameter>\n<parameter=text>\n\na\n\n</parameter>\n</function>\n"
     "</tool_call>", "", [("typed", {"flag": True, "none": None, "maybe": None, "text": "\na\n"})]),
    ("xml", xml(OSLO).removesuffix("\n</function>\n</tool_call>"), None, []),
    ("xml", "<tool_call>\n<function=send>\n", None, []),
    ("xml", xml(OSLO).replace("=get", " get"), None, []),
    ("keys", "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n"
     "</tool_call>", "", [OSLO]),
    ("keys", "<tool_call>typed<arg_key>count</arg_key><arg_value>5</arg_value><arg_key>text"
     "</arg_key><arg_value>5</arg_value></tool_call>", "", [("typed", {"count": 5, "text": "5"})]),
    ("blocks", blocks(OSLO, SENT), "", [OSLO, SENT]),
    ("blocks", "So:\n" + blocks(SENT), "So:", [SENT]),
]  # fmt: skip


def read(reader: CallReader, pieces: list[str]) -> tuple[list[str], list[Any]]:
    contents, calls = [], []
    for place, piece in enumerate(pieces):
        content, whole = reader.take(piece, final=place == len(pieces) - 1)
        contents.append(content)
        calls += whole
    assert [each.index for each in calls] == list(range(reader.count))
    return contents, [(each.name, json.loads(each.arguments)) for each in calls]


@pytest.mark.parametrize(("name", "text", "content", "calls"), TEXTS)
def test_calls_are_told_from_content_wherever_the_text_is_split(
    name: str, text: str, content: str | None, calls: list[Any]
) -> None:
    """A malformed call is content, letter by letter as it was written."""
    expected = text if content is None else content, calls
    splits = [[text], list(text), [*text, ""], [text, ""]]
    splits += [[text[:at], text[at:]] for at in range(1, len(text))]
    for pieces in splits:
        contents, whole = read(CallReader(format_of(name), FUNCTIONS), pieces)
        assert ("".join(contents), whole) == expected, pieces


@pytest.mark.parametrize("name", ["hermes", "mistral", "mistral new", "blocks"])
def test_what_begins_no_call_is_shown_at_once(name: str) -> None:
    contents, _ = read(CallReader(format_of(name), FUNCTIONS), [*"a < b [c] is", ""])
    assert "".join(contents[:2]) == "a"
    assert "".join(contents[:-1]) == "a < b [c] is"


def test_an_answer_ends_with_the_calls_that_are_wanted() -> None:
    reader = CallReader(format_of("hermes"), FUNCTIONS, most=1)
    assert read(reader, [hermes(OSLO, SENT)]) == ([""], [OSLO])
    assert reader.complete
    reader = CallReader(format_of("mistral"), FUNCTIONS, most=1)
    assert read(reader, [f"[TOOL_CALLS] [{call(*OSLO)}, {call(*SENT)}]"])[1] == [OSLO]


def test_no_call_stands_in_a_thought_that_the_prompt_opened() -> None:
    reader = CallReader(format_of("hermes"), FUNCTIONS, thinking=True)
    text = f"I call {hermes(SENT)}</think>"
    assert read(reader, [text, hermes(OSLO)]) == ([text, ""], [OSLO])


def test_ids_are_such_as_the_template_takes_back() -> None:
    (first,) = CallReader(format_of("mistral"), FUNCTIONS).take(f"[TOOL_CALLS] [{call(*OSLO)}]")[1]
    assert re.fullmatch("[A-Za-z0-9]{9}", first.id)
    (second,) = CallReader(format_of("hermes"), FUNCTIONS).take(hermes(OSLO))[1]
    assert re.fullmatch("call_[0-9a-f]{24}", second.id)


def test_half_of_a_character_in_arguments_can_be_sent() -> None:
    text = '<tool_call>\n{"name": "send", "arguments": {"text": "\\ud83d"}}\n</tool_call>'
    (whole,) = CallReader(format_of("hermes"), FUNCTIONS).take(text)[1]
    assert whole.arguments.encode() == b'{"text": "\\ud83d"}'
