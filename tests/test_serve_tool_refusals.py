"""Requests with tools that cannot be answered: each refused by the field that is wrong."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("xllamacpp")
pytest.importorskip("uvicorn")

import llguidance
import llguidance.hf
from tokenizers import AddedToken

from lighten.data import Message
from lighten.data.spans import render
from lighten.models import load_tokenizer
from lighten.serving.answering import Front
from lighten.serving.engine import Generation
from lighten.serving.front import application
from lighten.serving.options import Options
from lighten.serving.requests import ChatRequest, parse
from lighten.serving.running import prepare
from lighten.serving.tools.use import tool_use
from lighten.serving.vllm import request_body
from tests.processes import run_async
from tests.tiny import CHATML, save_tiny, tiny_tokenizer
from tests.tool_templates import FORMATS, HERMES, LLAMA, PYTHONIC

TOOL: dict[str, Any] = {"type": "function", "function": {"name": "get"}}
CHAT: dict[str, Any] = {
    "model": "base", "messages": [{"role": "user", "content": "a"}], "tools": [TOOL],
}  # fmt: skip
CALL = {"id": "call_1", "type": "function", "function": {"name": "get", "arguments": "{}"}}
NAMED = {"type": "function", "function": {"name": "get"}}

Ask = Callable[[str, dict[str, Any]], httpx.Response]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"))


def fronted(base: Path, template: str) -> Front:
    options = Options(engine="lighten", served_name="base", chat_template=template)
    return Front(*prepare(str(base), options, lambda _: None))


@pytest.fixture(scope="module")
def ask(base: Path) -> Ask:
    """Answers of the routes over a base with a chat template; no engine is started."""
    fronts: dict[str, Front] = {}

    def ask(template: str, changes: dict[str, Any]) -> httpx.Response:
        if template not in fronts:
            fronts[template] = fronted(base, template)
        transport = httpx.ASGITransport(application(fronts[template]))

        async def send() -> httpx.Response:
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost"
            ) as client:
                return await client.post("/v1/chat/completions", json={**CHAT, **changes})

        return run_async(send())

    return ask


def parameters(**schema: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "get", "parameters": schema}}]}


def turns(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [*CHAT["messages"], *messages, {"role": "user", "content": "b"}]}


def calling(**changes: Any) -> dict[str, Any]:
    call = {**CALL, **changes}
    return turns({"role": "assistant", "content": None, "tool_calls": [call]})


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    (CHATML, {}, "tools", "does not know tools"),
    (PYTHONIC, {}, "tools", "is not understood"),
    (CHATML, {"tools": [], **calling()}, "messages[1].tool_calls", "writes no calls"),
    (HERMES, {"tools": [], "tool_choice": "required"}, "tool_choice", "needs tools"),
    (HERMES, {"tools": None, "tool_choice": NAMED}, "tool_choice", "needs tools"),
    (HERMES, {"tool_choice": {"type": "function", "function": {"name": "put"}}}, "tool_choice",
     "'put'"),
    (HERMES, {"tool_choice": "sometimes"}, "tool_choice", "'required'"),
    (HERMES, {"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type", "'function'"),
    (HERMES, {"tools": [{"type": "custom", "custom": {}}]}, "tools.0.type", "'function'"),
    (HERMES, {"tools": [{"type": "function"}]}, "tools.0.function", "required"),
    (HERMES, {"tools": [{"type": "function", "function": {"name": "a b"}}]},
     "tools.0.function.name", "pattern"),
    (HERMES, {**parameters(type="string"), "tool_choice": "required"},
     "tools[0].function.parameters", "object"),
    (HERMES, {**parameters(properties={"a": {"type": "nothing"}}), "tool_choice": NAMED},
     "tools[0].function.parameters", "nothing"),
    (FORMATS["xml"], {**parameters(properties={"a": {"type": "string", "pattern": "^a$"}}),
     "tool_choice": NAMED}, "tools[0].function.parameters", "pattern cannot be followed"),
    (FORMATS["xml"], {**parameters(anyOf=[{"required": ["a"]}]), "tool_choice": NAMED},
     "tools[0].function.parameters", "anyOf cannot be followed"),
    (FORMATS["xml"], {**parameters(properties={}, required=["a"]), "tool_choice": NAMED},
     "tools[0].function.parameters", "required 'a' cannot be followed"),
    (HERMES, {"tool_choice": NAMED, "chat_template_kwargs": {"enable_thinking": True}},
     "tool_choice", "no thought"),
    (HERMES, calling(function={"name": "get", "arguments": "{"}), "messages[1].tool_calls",
     "not JSON"),
    (HERMES, calling(function={"name": "get", "arguments": "[1]"}), "messages[1].tool_calls",
     "object"),
    (HERMES, turns({"role": "user", "content": "a", "tool_calls": [CALL]}),
     "messages[1].tool_calls", "not applied"),
    (HERMES, turns({"role": "user", "content": "a", "weight": 1}), "messages[1].weight",
     "not applied"),
    (HERMES, turns({"role": "tool", "tool_call_id": "1"}), "messages[1].content", "missing"),
    (HERMES, turns({"role": "assistant", "content": None}), "messages[1].content", "missing"),
    (FORMATS["mistral"], calling(), "messages", "length 9"),
    (LLAMA, turns({"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}), "messages",
     "single tool-calls"),
    (HERMES, {"tools": [{"type": "function", "function": {"name": "get",
     "description": "word " * 2000}}]}, "tools", "more than 256 tokens"),
    (LLAMA, {"response_format": {"type": "json_object"}}, "response_format", "without a mark"),
    (HERMES, {"functions": [{"name": "get"}]}, "functions", "not applied"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "changes", "field", "message"), REFUSED)
def test_what_cannot_be_done_with_tools_is_refused_by_name(
    ask: Ask, template: str, changes: dict[str, Any], field: str, message: str
) -> None:
    answer = ask(template, changes)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == field, error
    assert message in error["message"]


TAKEN: list[tuple[str, dict[str, Any]]] = [
    (HERMES, {}),
    (HERMES, {"tool_choice": "auto", "parallel_tool_calls": True}),
    (HERMES, calling()),
    (HERMES, calling(function={"name": "get", "arguments": ""}, index=0)),
    (HERMES, turns({"role": "assistant", "content": "So:", "tool_calls": [CALL], "refusal": None},
                   {"role": "tool", "tool_call_id": "call_1", "name": "get", "content": "b"})),
    (HERMES, turns({"role": "user", "content": "a", "name": "me"})),
    (HERMES, {**parameters(type="string"), "tool_choice": "auto"}),
    (CHATML, {"tool_choice": "none"}),
    (CHATML, {"tools": [], "tool_choice": "auto", "parallel_tool_calls": False}),
    (CHATML, {"tools": None, **turns({"role": "tool", "content": "b"})}),
]  # fmt: skip


@pytest.mark.parametrize(("template", "changes"), TAKEN)
def test_what_can_be_done_is_taken(ask: Ask, template: str, changes: dict[str, Any]) -> None:
    answer = ask(template, changes)
    assert (answer.status_code, "being started" in answer.text) == (503, True), answer.text


def grammar_of(base: Path, name: str, **changes: Any) -> str:
    model = fronted(base, FORMATS[name]).registry.models["base"]
    use = tool_use(parse(ChatRequest, {**CHAT, "tool_choice": "required", **changes}), model)
    assert use is not None
    assert use.grammar is not None
    return use.grammar


def follows(base: Path, lark: str, text: str) -> bool:
    """Whether a text is a whole answer by a grammar."""
    tokenizer = load_tokenizer(str(base))
    words = llguidance.hf.from_tokenizer(tokenizer, len(tokenizer))
    matcher = llguidance.LLMatcher(words, llguidance.LLMatcher.grammar_from_lark(lark))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return matcher.validate_tokens(ids) == len(ids) and (
        bool(matcher.consume_tokens(ids)) and matcher.is_accepting()
    )


WEATHER = [
    {"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city", "days"],
        "additionalProperties": False}}}
    for name in ("get", "get_all")
]  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("added", [False, True], ids=["text", "tokens"])
def test_a_forced_answer_is_calls_of_the_given_functions(
    base: Path, tmp_path: Path, name: str, added: bool
) -> None:
    """As the chat template writes them, their marks tokens of their own or not."""
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    if added:
        tokenizer = load_tokenizer(str(folder))
        marks = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|sep|>"]
        tokenizer.add_tokens([AddedToken(mark, special=mark[0] == "[") for mark in marks])
        tokenizer.save_pretrained(folder)
    lark = grammar_of(folder, name, tools=WEATHER)
    one = grammar_of(folder, name, tools=WEATHER, parallel_tool_calls=False)

    def written(*calls: tuple[str, dict[str, Any]]) -> str:
        return re.sub(r', "id": "\w+"', "", rendered(calls, FORMATS[name]))

    oslo = ("get", {"city": "Oslo", "days": 5})
    rome = ("get_all", {"city": '"} \n', "days": -1})
    for call in (oslo, rome):
        assert follows(folder, lark, written(call))
        assert follows(folder, one, written(call))
    if name != "llama":
        assert follows(folder, lark, written(oslo, rome, rome))
        assert not follows(folder, one, written(oslo, rome))
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("put", oslo[1]), ("get", {}), ("get", {"city": "Oslo"}),
        ("get", {"city": "Oslo", "days": "some"}), ("get", {"town": "Oslo", "days": 5}),
    ]  # fmt: skip
    for text in ("Well, " + written(oslo), written(oslo)[:-1], *map(written, wrong)):
        assert not follows(folder, lark, text), text


@pytest.mark.parametrize("name", FORMATS)
def test_a_function_without_arguments_is_called_without_any(base: Path, name: str) -> None:
    for described in ({}, {"parameters": {"type": "object", "properties": {}}}):
        nothing = {"type": "function", "function": {"name": "get", **described}}
        lark = grammar_of(base, name, tools=[nothing])
        assert follows(
            base, lark, re.sub(r', "id": "\w+"', "", rendered([("get", {})], FORMATS[name]))
        )


def test_texts_without_quotes_are_those_of_their_schema(base: Path) -> None:
    """An enum, perhaps of one, perhaps with nothing; more than that is refused."""
    enum = {"type": "string", "enum": ["a", "b c"]}
    properties = {
        "enum": enum, "const": {"const": "one"},
        "maybe": {"anyOf": [{"$ref": "#/$defs/enum"}, {"type": "null"}]},
    }  # fmt: skip
    schema = {"type": "object", "properties": properties, "required": ["enum", "const"],
              "$defs": {"enum": enum}}  # fmt: skip
    lark = grammar_of(base, "xml", **parameters(**schema))

    def call(**arguments: Any) -> str:
        return rendered([("get", arguments)], FORMATS["xml"])

    for arguments in ({"enum": "b c"}, {"enum": "a", "maybe": "a"}, {"enum": "a", "maybe": "null"}):
        written = {key: value for key, value in arguments.items() if key != "maybe"}
        more = {key: value for key, value in arguments.items() if key == "maybe"}
        assert follows(base, lark, call(**written, const="one", **more))
    for wrong in ({"enum": "c", "const": "one"}, {"enum": "a", "const": "two"}, {"enum": "a"},
                  {"enum": "a", "const": "one", "maybe": "c"}):  # fmt: skip
        assert not follows(base, lark, call(**wrong))


def rendered(calls: Sequence[tuple[str, dict[str, Any]]], template: str) -> str:
    """An answer with these calls."""
    written = [
        {"id": f"lighten{number:02}", "type": "function",
         "function": {"name": name, "arguments": arguments}}
        for number, (name, arguments) in enumerate(calls, 1)
    ]  # fmt: skip
    question = Message("user", "?")
    answer = Message("assistant", "", extra=(("tool_calls", written),))
    tokenizer = tiny_tokenizer(template=template)
    prompt = render([question], tokenizer, "", add_generation_prompt=True)
    text = render([question, answer], tokenizer, "").removeprefix(prompt)
    return text.removeprefix("<think>\n\n</think>\n\n").partition("<|im_end|>")[0]


def test_an_answer_that_follows_a_grammar_holds_no_thought(base: Path) -> None:
    """Where the prompt opened one, a call in place of JSON is a call."""
    model = fronted(base, HERMES).registry.models["base"]
    for changes in ({"tool_choice": NAMED}, {"response_format": {"type": "json_object"}}):
        use = tool_use(parse(ChatRequest, {**CHAT, **changes}), model)
        assert use is not None
        text = rendered([("get", {})], HERMES)
        content, calls = use.reader(thinking=True).take(text, final=True)
        assert (content, [call.name for call in calls]) == ("", ["get"])


def test_vllm_is_told_a_grammar_that_it_reads(base: Path) -> None:
    """It takes Lark for a grammar and hands it to llguidance."""
    lark = grammar_of(base, "hermes")
    body = request_body(Generation((5,), None, 9, grammar=lark))
    assert body["structured_outputs"] == {"grammar": lark}
    grammar = llguidance.grammar_from("grammar", lark)
    assert not llguidance.LLMatcher.validate_grammar(grammar)
