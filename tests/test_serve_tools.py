"""Tools by OpenAI's own client: called, forced and refused, over each engine that runs here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

pytest.importorskip("xllamacpp")
pytest.importorskip("uvicorn")

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from lighten.data import Message
from lighten.serving.options import Options
from lighten.serving.prompts import asking
from tests import once
from tests.caches import new_cache
from tests.serving import by_schema, in_process
from tests.tiny import tiny_model, tiny_tokenizer
from tests.tool_templates import FORMATS

DOCS = Path(__file__).parents[1] / "docs" / "serve.md"


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": [*properties],
                  "additionalProperties": False}  # fmt: skip
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("get", city={"type": "string"})]
UNITS = {"type": "string", "enum": ["C", "F"]}
DAYS = {"$ref": "#/$defs/days"}
FORECAST = tool("forecast", unit=UNITS, days=DAYS)
FORECAST["function"]["parameters"]["$defs"] = {"days": {"type": "integer", "enum": [1, 7]}}
CITIES = ("Oslo", "Rome")
QUESTION = {"role": "user", "content": "two"}
WORDS = "It is cold."
ADDED = {
    "hermes": [AddedToken("<tool_call>", special=False, normalized=False),
               AddedToken("</tool_call>", special=False, normalized=False)],
    "mistral": [AddedToken("[TOOL_CALLS]", special=True, normalized=False)],
    "llama": [],
    "xml": [AddedToken("<tool_call>", special=False, normalized=False)],
}  # fmt: skip


def calls(*cities: str) -> Any:
    return [
        {"id": f"lighten{number:02}", "type": "function",
         "function": {"name": "get", "arguments": {"city": city}}}
        for number, city in enumerate(cities)
    ]  # fmt: skip


def taught(folder: Path, family: str) -> Path:
    """A tiny model that learnt by heart to call, and to answer with the results."""
    tokenizer = tiny_tokenizer(template=FORMATS[family])
    tokenizer.add_tokens(ADDED[family])
    model = tiny_model(
        "llama", vocab_size=len(tokenizer), hidden_size=64, max_position_embeddings=2048
    )
    cities = CITIES[: 1 if family == "llama" else 2]
    called = [Message("user", "two"),
              Message("assistant", "", extra=(("tool_calls", calls(*cities)),))]  # fmt: skip
    results = [Message("tool", f"{city} is cold", extra=(("tool_call_id", call["id"]),))
               for city, call in zip(cities, calls(*cities), strict=True)]  # fmt: skip
    rows = [rows_of(tokenizer, called),
            rows_of(tokenizer, [*called, *results, Message("assistant", WORDS)])]  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    loss = torch.tensor(1.0)
    steps = 0
    while loss > 0.02:
        steps += 1
        assert steps < 2000, float(loss)
        losses = [model(input_ids=ids, labels=labels).loss for ids, labels in rows]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.eval()
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows_of(
    tokenizer: PreTrainedTokenizerFast, messages: list[Message]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A conversation and its labels, which are those of its last answer."""
    how_asked = asking(tokenizer, None, tokenizer.convert_tokens_to_ids("<|im_end|>"))
    prompt = how_asked.conversation(messages[:-1], None, TOOLS)
    text = tokenizer.apply_chat_template(
        [message.for_template() for message in messages], tools=TOOLS, tokenize=False
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[: len(prompt)] == prompt
    labels = [-100] * len(prompt) + ids[len(prompt) :]
    return torch.tensor([ids]), torch.tensor([labels])


@pytest.fixture(scope="module", params=["hermes", "mistral", "llama", "xml"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once.folder(tmp_path_factory, f"calling-{family}", lambda to: taught(to, family))


@pytest.fixture(scope="module", params=["llamacpp", "lighten"])
def url(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[str]:
    options = Options(
        engine=request.param, served_name="base", storage="f32", slots=2, threads=1, context=2000
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTEN_CACHE", str(new_cache(tmp_path_factory.mktemp("cache"))))
        with in_process(str(folder), options) as address:
            yield address


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, **changes: Any) -> Any:
    body: dict[str, Any] = {"model": "base", "messages": [QUESTION], "tools": TOOLS,
                            "temperature": 0, **changes}  # fmt: skip
    return client.chat.completions.create(**body)


def cities_of(message: Any) -> list[str]:
    assert all(call.type == "function" for call in message.tool_calls)
    assert {call.function.name for call in message.tool_calls} == {"get"}
    return [json.loads(call.function.arguments)["city"] for call in message.tool_calls]


def expected(family: str) -> list[str]:
    return list(CITIES[: 1 if family == "llama" else 2])


def before_city(family: str) -> str:
    return "<parameter=city>\n" if family == "xml" else '"city": "'


def test_a_model_calls_and_answers_with_the_results(client: openai.OpenAI, family: str) -> None:
    answer = ask(client)
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert cities_of(choice.message) == expected(family)
    assert len({call.id for call in choice.message.tool_calls}) == len(expected(family))
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": f"{city} is cold"}
        for call, city in zip(choice.message.tool_calls, expected(family), strict=True)
    ]
    if family == "mistral":  # its ids stand in the prompt, and were learnt by heart
        for place, known in enumerate(calls(*CITIES)):
            choice.message.tool_calls[place].id = results[place]["tool_call_id"] = known["id"]
    last = ask(client, messages=[QUESTION, choice.message, *results]).choices[0]
    assert (last.message.content.strip(), last.message.tool_calls) == (WORDS, None)
    assert last.finish_reason == "stop"


def test_a_streamed_call_is_the_same(client: openai.OpenAI, family: str) -> None:
    names, arguments, finishes = {}, {}, []
    for event in ask(client, stream=True):
        (choice,) = event.choices
        assert not choice.delta.content
        finishes += [choice.finish_reason] if choice.finish_reason else []
        for call in choice.delta.tool_calls or ():
            if call.id is not None:
                names[call.index] = call.function.name
                assert call.type == "function"
            arguments[call.index] = arguments.get(call.index, "") + call.function.arguments
    assert finishes == ["tool_calls"]
    assert [json.loads(text)["city"] for text in arguments.values()] == expected(family)
    assert set(names.values()) == {"get"}
    with client.chat.completions.stream(
        model="base",
        messages=[QUESTION],
        tools=TOOLS,
        temperature=0,  # type: ignore[list-item]
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    assert cities_of(message) == expected(family)


def test_several_answers_with_log_probabilities_each_have_their_calls(
    client: openai.OpenAI, family: str
) -> None:
    answer = ask(client, n=2, logprobs=True, parallel_tool_calls=False)
    for choice in answer.choices:
        assert cities_of(choice.message) == ["Oslo"]
        assert choice.finish_reason == "tool_calls"
        told = "".join(token.token for token in choice.logprobs.content)
        assert f"{before_city(family)}Oslo" in told


def test_a_call_that_is_cut_off_is_content(client: openai.OpenAI, family: str) -> None:
    short = ask(client, max_tokens=12).choices[0]
    assert (short.finish_reason, short.message.tool_calls) == ("length", None)
    assert ("<function" if family == "xml" else '"name"') in short.message.content
    stopped = ask(client, stop="Oslo").choices[0]
    assert (stopped.finish_reason, stopped.message.tool_calls) == ("stop", None)
    assert stopped.message.content.endswith(before_city(family))


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_that_has_to_call_does(client: openai.OpenAI, family: str, seed: int) -> None:
    """Whatever the model would rather say: its tools are none that it learnt."""
    other = tool("other", flag={"type": "boolean"})
    options: dict[str, Any] = {
        "tools": [other, FORECAST], "temperature": 2, "seed": seed,
        "messages": [{"role": "user", "content": "what"}],
    }  # fmt: skip
    several = ask(client, tool_choice="required", **options).choices[0]
    assert several.finish_reason == "tool_calls"
    assert 1 <= len(several.message.tool_calls) <= (1 if family == "llama" else 16)
    named = {"type": "function", "function": {"name": "forecast"}}
    (one,) = ask(client, tool_choice=named, **options).choices[0].message.tool_calls
    assert one.function.name == "forecast"
    options |= {"parallel_tool_calls": False}
    (single,) = ask(client, tool_choice="required", **options).choices[0].message.tool_calls
    for call in (*several.message.tool_calls, one, single):
        arguments = json.loads(call.function.arguments)
        if call.function.name == "other":
            assert arguments in ({"flag": True}, {"flag": False})
        else:
            assert arguments.keys() == {"unit", "days"}
            assert (arguments["unit"] in ("C", "F"), arguments["days"] in (1, 7)) == (True, True)


def test_beside_a_response_format_an_answer_is_one_or_the_other(
    client: openai.OpenAI, family: str
) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    response_format = by_schema(schema)
    if family == "llama":  # whose calls are JSON without a mark
        with pytest.raises(openai.BadRequestError, match="without a mark"):
            ask(client, response_format=response_format)
        return
    assert ask(client, response_format=response_format).choices[0].message.tool_calls
    tokenizer = tiny_tokenizer()
    bias = {str(tokenizer.convert_tokens_to_ids(letter)): 100 for letter in "{a"}
    answer = ask(client, response_format=response_format, logit_bias=bias).choices[0]
    assert (answer.finish_reason, answer.message.tool_calls) == ("stop", None)
    assert json.loads(answer.message.content)["a"] in (1, 2)


def test_tools_that_are_not_to_be_called_are_not(client: openai.OpenAI) -> None:
    with_tools, without = (
        ask(client, max_tokens=4, **changes)
        for changes in ({"tool_choice": "none"}, {"tools": openai.NOT_GIVEN})
    )
    assert with_tools.usage.prompt_tokens == without.usage.prompt_tokens
    assert with_tools.choices[0].message.content == without.choices[0].message.content


def test_what_the_page_shows_runs(
    url: str, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if family == "xml":
        pytest.skip("what ends a text is several tokens, which this model does not know")
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.S)
    code = code.replace("http://127.0.0.1:8000", url).replace('"support"', '"base"')
    # Texts end soon, and so does what may stand between the brackets.
    ids = tiny_tokenizer().convert_tokens_to_ids(['"', "}", "]"])
    biases = {str(token): 50 - 10 * place for place, token in enumerate(ids)}
    options = f"max_tokens=300, logit_bias={biases}"
    code = code.replace("messages=messages,", f"messages=messages, {options},")
    exec(compile(code, str(DOCS), "exec"), {})
    assert '{"city": "' in capsys.readouterr().out
