"""What answers say of themselves: tokens, where they stand in the text, what a cache held."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("xllamacpp")
pytest.importorskip("uvicorn")

from lighten import models
from lighten.serving.options import Options
from tests.serving import client_of, save_adapters

# Of characters that the tiny tokenizer writes in parts.
LETTERS = "서울은 어디 있나 부산"
LONG = "the user is the answer to a question of the system " * 4


@pytest.fixture(scope="module", params=["lighten", "llamacpp"])
def client(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[httpx.Client]:
    folder = save_adapters(tiny_folder, tmp_path_factory.mktemp("adapters"))
    options = Options(
        adapters={"one": str(folder / "inside" / "one")}, engine=request.param,
        served_name="base", storage="f32", slots=2, threads=1, context=224,
    )  # fmt: skip
    with client_of(tiny_folder, tmp_path_factory.mktemp("cache"), options) as http:
        yield http


def complete(client: httpx.Client, **changes: Any) -> dict[str, Any]:
    body = {"model": "one", "prompt": LONG, "max_tokens": 8, "temperature": 0, **changes}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def streamed(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with client.stream("POST", path, json={**body, "stream": True}) as answer:
        return [
            json.loads(line[6:])
            for line in answer.iter_lines()
            if line.startswith("data: ") and line != "data: [DONE]"
        ]


def writing(text: str) -> dict[str, Any]:
    """Settings under which an answer is this text, in quotes."""
    pytest.importorskip("llguidance")
    schema = {"name": "it", "schema": {"enum": [text]}}
    return {"response_format": {"type": "json_schema", "json_schema": schema}, "temperature": 0}


def test_each_token_is_told_as_itself_at_its_place(client: httpx.Client) -> None:
    """llama.cpp tells a character of three tokens as one, with the probability of the third."""
    answer = complete(client, prompt="a", logprobs=3, max_tokens=80, **writing(LETTERS + " ab"))
    choice, told = answer["choices"][0], answer["choices"][0]["logprobs"]
    assert choice["text"] == f'"{LETTERS} ab"'
    whole = 0
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        if token.startswith("bytes:"):
            part = token.removeprefix("bytes:").encode().decode("unicode_escape").encode("latin-1")
            assert part[-1:] in choice["text"][offset:].encode()[:4]
        else:
            whole += 1
            assert choice["text"][offset:].startswith(token)
    assert 4 <= whole < len(told["tokens"])
    for place, (token, top) in enumerate(zip(told["tokens"], told["top_logprobs"], strict=True)):
        assert top[token] == told["token_logprobs"][place]
        assert len(top) in (3, 4)
    assert {len(top) for top in told["top_logprobs"]} >= {4}  # a schema allows what is unlikely


@pytest.mark.parametrize("most", [19, 20, 21])
def test_tokens_without_a_log_probability_are_counted(client: httpx.Client, most: int) -> None:
    settings = {"model": "one", "max_tokens": most, **writing(LETTERS)}
    body = {**settings, "prompt": "the answer", "logprobs": 1}
    answer = complete(client, **body)
    told = answer["choices"][0]["logprobs"]
    assert answer["usage"]["completion_tokens"] == most
    assert len(told["tokens"]) + told.get("missing_tokens", 0) == most
    chat = {**settings, "messages": [{"role": "user", "content": "a"}], "logprobs": True}
    for path, request, name in (
        ("/v1/completions", body, "tokens"), ("/v1/chat/completions", chat, "content"),
    ):  # fmt: skip
        parts = [
            choice["logprobs"]
            for event in streamed(client, path, request)
            for choice in event["choices"]
            if choice["logprobs"]
        ]
        assert sum(len(part[name]) + part.get("missing_tokens", 0) for part in parts) == most


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_cache_held_is_told_however_an_answer_ends(
    client: httpx.Client, prompts: int, stream: bool
) -> None:
    prompt = [f"{number} {LONG}" for number in range(prompts)]
    texts = [choice["text"] for choice in complete(client, prompt=prompt)["choices"]]
    body = {"prompt": prompt, "model": "one", "max_tokens": 8, "temperature": 0}
    cached = {}
    for how, stop in (("length", []), ("stop", [text[1:3] for text in texts])):
        if stream:
            options = {"stream_options": {"include_usage": True}}
            events = streamed(client, "/v1/completions", {**body, "stop": stop, **options})
            usage = events[-1]["usage"]
        else:
            answer = complete(client, **body, stop=stop)
            assert {choice["finish_reason"] for choice in answer["choices"]} == {how}
            usage = answer["usage"]
        cached[how] = usage["prompt_tokens_details"]["cached_tokens"]
        assert cached[how] <= usage["prompt_tokens"]
    assert cached["stop"] == cached["length"] >= 64 * prompts


def test_an_event_is_one_line_to_every_client(client: httpx.Client) -> None:
    """Some end lines where Unicode does, as `httpx.Response.iter_lines`."""
    text = "a\N{LINE SEPARATOR}서\N{PARAGRAPH SEPARATOR}\x85b"
    body = {"model": "one", "prompt": "a", "max_tokens": 40, **writing(text)}
    events = streamed(client, "/v1/completions", body)
    assert "".join(event["choices"][0]["text"] for event in events) == f'"{text}"'


def test_a_special_token_that_is_a_stop_ends_the_answer(
    client: httpx.Client, tiny_folder: Path
) -> None:
    """The text holds none, so that no text would be found in it."""
    token = models.load_tokenizer(str(tiny_folder)).convert_tokens_to_ids("<|im_start|>")
    settings = {"prompt": "a", "logit_bias": {str(token): 100}, "max_tokens": 4}
    for stop, finish, tokens in ((["x<|"], "length", 4), (["x<|", "<|im_start|>"], "stop", 1)):
        answer = complete(client, stop=stop, **settings)
        assert answer["choices"][0]["text"] == ""
        assert answer["choices"][0]["finish_reason"] == finish
        assert answer["usage"]["completion_tokens"] == tokens


def test_what_ends_an_answer_is_for_clients_to_say(client: httpx.Client, tiny_folder: Path) -> None:
    """By vLLM's fields: loads of equal length leave out the usual end."""
    end = models.load_tokenizer(str(tiny_folder)).eos_token_id
    likely = {"prompt": "a", "logit_bias": {str(end): 100}, "max_tokens": 4}
    for more, finish, tokens in (
        ({}, "stop", 1), ({"ignore_eos": True}, "length", 4), ({"ignore_eos": False}, "stop", 1)
    ):  # fmt: skip
        answer = complete(client, **likely, **more)
        assert answer["choices"][0]["finish_reason"] == finish
        assert answer["usage"]["completion_tokens"] == tokens
    for ignore in (False, True):
        likely = {"prompt": "a", "logit_bias": {"70": 100}, "max_tokens": 4, "ignore_eos": ignore}
        answer = complete(client, **likely, stop_token_ids=[70, 71])
        assert (answer["choices"][0]["text"], answer["usage"]["completion_tokens"]) == ("", 1)
        assert answer["choices"][0]["finish_reason"] == "stop"
    body = {"model": "one", "prompt": "a", "stop_token_ids": [100_000]}
    refused = client.post("/v1/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "stop_token_ids")


def test_an_answer_that_ends_at_its_limit_keeps_its_last_character(client: httpx.Client) -> None:
    """One that stands for what is no character, too; a part of one is not shown."""
    for most, text in (
        (4, '"a'),
        (5, '"a\N{REPLACEMENT CHARACTER}'),
        (9, '"a\N{REPLACEMENT CHARACTER}b서'),
    ):
        settings = {"prompt": "a", "max_tokens": most}
        answer = complete(client, **settings, **writing("a\N{REPLACEMENT CHARACTER}b서c"))
        assert answer["choices"][0]["text"] == text
