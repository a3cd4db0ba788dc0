"""`/tokenize` and `/detokenize`, as vLLM has them: prompts and conversations as tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

pytest.importorskip("xllamacpp")
pytest.importorskip("uvicorn")

from lighten.serving.answering import Front
from lighten.serving.front import application
from lighten.serving.options import Options
from lighten.serving.requests import ChatRequest, Refused, parse
from lighten.serving.running import prepare
from tests.processes import run_async
from tests.serving import save_adapter
from tests.tiny import save_tiny, tiny_tokenizer

MESSAGES = [{"role": "user", "content": "the answer"}]
Ask = Callable[..., httpx.Response]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """Posts to a server whose tokenizer begins texts; its adapter has a template of its own."""
    root = tmp_path_factory.mktemp("served")
    base = save_tiny(root / "base")
    tiny_tokenizer(add_bos=True).save_pretrained(base)
    adapter = save_adapter(base, root / "one", seed=1)
    (adapter / "chat_template.jinja").write_text(
        "{{ messages[0].name or 'Q' }}: {{ messages[0].content }} A:"
    )
    options = Options(adapters={"one": str(adapter)}, engine="lighten", served_name="base",
                      context=64)  # fmt: skip
    registry, engine = prepare(str(base), options, lambda _: None)

    def post(path: str, *, keys: tuple[str, ...] = (), **body: Any) -> httpx.Response:
        transport = httpx.ASGITransport(application(Front(registry, engine, keys)))

        async def run() -> httpx.Response:
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
                return await http.post(path, json=body)

        return run_async(run())

    return post


def tokens(ask: Ask, **body: Any) -> list[int]:
    answer = ask("/tokenize", **body)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert (told["count"], told["max_model_len"]) == (len(told["tokens"]), 64)
    return list(told["tokens"])


def test_texts_are_tokens_and_back(ask: Ask) -> None:
    tokenizer = tiny_tokenizer(add_bos=True)
    for name in ({}, {"model": "base"}, {"model": "one"}):
        whole = tokens(ask, prompt="the 서울 answer", **name)
        assert whole == tokenizer("the 서울 answer")["input_ids"]
        plain = tokens(ask, prompt="the 서울 answer", add_special_tokens=False, **name)
        assert plain == whole[1:]
        assert ask("/detokenize", tokens=plain, **name).json() == {"prompt": "the 서울 answer"}
    assert ask("/detokenize", tokens=whole).json() == {"prompt": "<s>the 서울 answer"}
    assert tokens(ask, prompt="", add_special_tokens=False, messages=None) == []
    answer = ask("/tokenize", prompt="the answer", return_token_strs=True).json()
    assert answer["token_strs"] == tokenizer.convert_ids_to_tokens(answer["tokens"])


def test_a_conversation_is_read_with_the_adapters_template(ask: Ask) -> None:
    tokenizer = tiny_tokenizer()
    base = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert tokens(ask, messages=MESSAGES, add_generation_prompt=True) == base
    own = tokens(ask, messages=MESSAGES, model="one")
    assert tokenizer.decode(own) == "Q: the answer A:"


def test_who_speaks_is_told_to_the_template(ask: Ask) -> None:
    """As vLLM does; agents' clients send their names with every message."""
    named = [{"role": "user", "name": "Kim", "content": "the answer"},
             {"role": "assistant", "name": "a", "content": "the"}]  # fmt: skip
    assert tiny_tokenizer().decode(tokens(ask, messages=named, model="one")) == "Kim: the answer A:"
    plain = [{key: value for key, value in each.items() if key != "name"} for each in named]
    assert tokens(ask, messages=named) == tokens(ask, messages=plain)
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    turn = {"role": "assistant", "name": "a", "content": None, "tool_calls": [call]}
    request = parse(ChatRequest, {"model": "it", "messages": [turn]})
    assert dict(request.conversation()[0].extra).keys() == {"name", "tool_calls"}


def test_an_answer_to_an_answer_is_another_turn(ask: Ask) -> None:
    """As at OpenAI and in vLLM, unless its `continue_final_message` says otherwise."""
    answered = [*MESSAGES, {"role": "assistant", "content": "the"}]
    tokenizer = tiny_tokenizer()
    expected = tokenizer.apply_chat_template(answered, add_generation_prompt=True)["input_ids"]
    assert tokens(ask, messages=answered) == expected
    request = parse(ChatRequest, {"model": "it", "messages": answered,
                                  "continue_final_message": False})  # fmt: skip
    assert request.conversation()[-1].content == "the"
    with pytest.raises(Refused, match="continue_final_message is not applied"):
        parse(ChatRequest, {"model": "it", "messages": answered, "continue_final_message": True})


@pytest.mark.parametrize(
    ("path", "body", "status", "field"),
    [
        ("/tokenize", {"prompt": "a", "model": "nobody"}, 404, "model"),
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "other": 1}, 400, "other"),
        ("/tokenize", {"prompt": "the answer " * 1000}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"messages": MESSAGES, "add_generation_prompt": False}, 400,
         "add_generation_prompt"),
        ("/tokenize", {"messages": MESSAGES, "continue_final_message": True}, 400,
         "continue_final_message"),
        ("/detokenize", {"tokens": [1, 100_000]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_refused_by_name(
    ask: Ask, path: str, body: dict[str, Any], status: int, field: str
) -> None:
    answer = ask(path, **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, field), answer.text


def test_a_key_is_needed_where_there_is_one(ask: Ask) -> None:
    for path in ("/tokenize", "/detokenize"):
        assert ask(path, keys=("key",), prompt="a").status_code == 401
