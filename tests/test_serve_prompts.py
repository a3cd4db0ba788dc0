"""Log-probabilities of prompts: PEFT's own, whatever caches and batches hold."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from torch import Tensor

pytest.importorskip("xllamacpp")
pytest.importorskip("uvicorn")

from lighten import models
from lighten.errors import UserError
from lighten.generation import engine as engine_module
from lighten.generation.engine import Engine
from lighten.generation.request import Request
from lighten.generation.sampling import Chosen
from lighten.serving.options import Options
from tests.caches import new_cache
from tests.generation import choose_kernels
from tests.serving import client_of, client_of_two, save_adapters
from tests.test_serve_cohort import (
    CLOSE,
    GREEDY,
    NAMES,
    PROMPTS,
    SERVED,
    SETTINGS,
    adapter,
    opened,
)
from tests.tiny import VOCAB, tiny_model

# Of characters that the tiny tokenizer writes in parts.
LETTERS = "the answer 서울은 user"


class Read:
    """What came back of a request that wants to know of its prompt."""

    def __init__(
        self, engine: Engine, prompt: Sequence[int], name: str | None, *, count: int = 0,
        most: int | None = VOCAB, **more: Any,
    ) -> None:  # fmt: skip
        self.prompt: list[Chosen] = []
        self.tokens: list[int] = []
        self.cached = -1
        self._done, self._how = threading.Event(), None
        engine.submit(
            Request(
                prompt, name, count, more.pop("stops", frozenset()), GREEDY, None,
                lambda chosen: self.tokens.append(chosen.token), self._end,
                lambda cached: setattr(self, "cached", cached),
                prompt_logprobs=most, on_prompt=self.prompt.extend, **more,
            )
        )  # fmt: skip

    def _end(self, how: Any) -> None:
        self._how = how
        self._done.set()

    def end(self) -> Read:
        assert self._done.wait(60)
        if isinstance(self._how, BaseException):
            raise self._how
        return self

    @property
    def how(self) -> str:
        return str(self.end()._how)

    def rows(self) -> Tensor:
        told = (dict(chosen.top) for chosen in self.end().prompt)
        return torch.tensor([[row[word] for word in range(VOCAB)] for row in told])


def rows_of(model: Any, prompt: Sequence[int]) -> Tensor:
    """Log-probabilities of a prompt's tokens but for the first: [n - 1, V]."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(prompt)])).logits[0, :-1]
    return logits.float().log_softmax(-1)


@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "pytorch"])
@pytest.mark.parametrize("arch", SERVED)
def test_prompts_are_as_likely_as_in_peft(
    arch: str, compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mixed batch, read in pieces, beside answers that nobody asks the prompt of."""
    choose_kernels(monkeypatch, compiled=compiled)
    monkeypatch.setattr(engine_module, "LOGIT_BYTES", 4 * VOCAB * 12)  # rows in one step
    model = tiny_model(arch, attn_implementation="eager")
    target = "c_attn" if arch == "gpt2" else "v_proj" if arch != "phi3" else "qkv_proj"
    settings = {**SETTINGS, "c": {"target_modules": [target, "lm_head"]}}
    folders = {
        name: adapter(model, tmp_path / name, seed, **settings[name])
        for seed, name in enumerate(settings)
    }
    reference, engine = opened(model, folders)
    reads = [
        Read(engine, prompt, name, count=3, most=None if place % 3 == 2 else VOCAB)
        for place, (prompt, name) in enumerate(zip(PROMPTS * 2, NAMES * 2, strict=True))
    ]
    for place, (prompt, name) in enumerate(zip(PROMPTS * 2, NAMES * 2, strict=True)):
        read = reads[place].end()
        assert len(read.tokens) == 3
        if place % 3 == 2:
            assert read.prompt == []
            continue
        assert [chosen.token for chosen in read.prompt] == list(prompt[1:])
        if name is None:
            with reference.disable_adapter():
                expected = rows_of(reference, prompt)
        else:
            reference.set_adapter(name)
            expected = rows_of(reference, prompt)
        if len(prompt) == 1:
            continue
        close = 1e-4 if name is None else CLOSE
        torch.testing.assert_close(read.rows(), expected, atol=close, rtol=1e-4)
        for row, chosen in zip(read.rows(), read.prompt, strict=True):
            assert chosen.logprob == float(row[chosen.token])
            assert chosen.rank == 1 + int((row > row[chosen.token]).sum())
    engine.close(10)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    model = tiny_model("llama")
    folders = [adapter(model, tmp_path / name, seed) for seed, name in enumerate("ab")]
    tiny_engine = Engine(model, max_sequences=3, max_tokens=48, prefill_tokens=16)
    for folder in folders:
        tiny_engine.load_adapter(folder.name, folder)
    yield tiny_engine
    tiny_engine.close(10)


def test_a_prompt_that_is_told_of_is_read_whole_and_kept_for_others(engine: Engine) -> None:
    """What a cache holds of it has no logits."""
    prompt = PROMPTS[3]
    cold = Read(engine, prompt, "a", count=4).end()
    others = [Read(engine, prompt, "a", count=4, most=None) for _ in range(3)]
    assert {read.end().cached for read in others} == {32}
    warm = [Read(engine, prompt, "a", count=4) for _ in range(3)]
    for read in warm:
        assert (read.end().cached, read.prompt) == (0, cold.prompt)
    assert {tuple(read.tokens) for read in (*others, *warm)} == {tuple(cold.tokens)}
    assert Read(engine, prompt, "b").end().prompt != cold.prompt


def test_a_prompt_alone_and_the_token_that_ends_an_answer(engine: Engine) -> None:
    read = Read(engine, PROMPTS[1], "a", count=2).end()
    alone = Read(engine, PROMPTS[1], "a").end()
    assert (alone.how, alone.tokens, alone.prompt) == ("length", [], read.prompt)
    stops = frozenset({read.tokens[0]})
    for tells in (False, True):
        ended = Read(engine, PROMPTS[1], "a", count=2, stops=stops, tells_end=tells)
        assert (ended.how, ended.tokens) == ("stop", read.tokens[:1] if tells else [])


def test_a_prompt_whose_numbers_are_none_is_told(engine: Engine) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[7] = float("inf")
        model.model.embed_tokens.weight[9] = 0.0
    broken = Engine(model, max_sequences=1, max_tokens=48)
    with pytest.raises(UserError, match="not finite"):
        Read(broken, [5, 9, 6], None).end()
    broken.close(10)


@pytest.fixture(scope="module")
def adapters(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapters(tiny_folder, tmp_path_factory.mktemp("adapters")) / "inside"


@pytest.fixture(scope="module")
def client(
    tiny_folder: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    cache = new_cache(tmp_path_factory.mktemp("cache"))
    with client_of_two(tiny_folder, adapters, cache) as http:
        yield http


def complete(client: httpx.Client, **changes: Any) -> dict[str, Any]:
    body = {"model": "one", "max_tokens": 1, "temperature": 0, "echo": True, **changes}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_an_echo_tells_of_every_token_of_every_prompt(
    client: httpx.Client, tiny_folder: Path, adapters: Path
) -> None:
    """Ids and texts, several prompts in one request, each adapter's as PEFT alone has them."""
    base = models.load(str(tiny_folder), dtype="float32")
    reference = PeftModel.from_pretrained(base.model, str(adapters / "one"), "one")
    reference.load_adapter(str(adapters / "two"), "two")
    texts = [LETTERS, "the user is the system", "a"]
    ids = [base.tokenizer(text)["input_ids"] for text in texts]
    for name in ("one", "two"):
        reference.set_adapter(name)
        for prompt in (texts, ids, texts[0], ids[0]):
            answer = complete(client, model=name, prompt=prompt, logprobs=2, seed=1234)
            assert len(answer["choices"]) == (3 if prompt in (texts, ids) else 1)
            for choice, each, text in zip(answer["choices"], ids, texts, strict=False):
                told = choice["logprobs"]
                assert choice["text"].startswith(text)
                assert {len(told[key]) for key in told} == {len(each) + 1}
                assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
                if len(each) > 1:
                    rows = rows_of(reference, each)
                    own = rows.gather(1, torch.tensor(each[1:])[:, None])[:, 0]
                    ours = torch.tensor(told["token_logprobs"][1:-1])
                    torch.testing.assert_close(ours, own, atol=5e-3, rtol=0)
                    best = [max(top.values()) for top in told["top_logprobs"][1:-1]]
                    torch.testing.assert_close(
                        torch.tensor(best), rows.max(-1).values, atol=5e-3, rtol=0
                    )
                for token, logprob, top in zip(
                    told["tokens"][1:], told["token_logprobs"][1:], told["top_logprobs"][1:],
                    strict=True,
                ):  # fmt: skip
                    assert top[token] == logprob
                    assert len(top) in (2, 3)
                for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
                    if not token.startswith("bytes:"):
                        assert choice["text"][offset:].startswith(token)
            assert answer["usage"]["completion_tokens"] == len(answer["choices"])
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def prompt_tokens(client: httpx.Client) -> float:
    """As the server counts them for adapter `one`."""
    lines = client.get("/metrics").text.splitlines()
    return sum(
        float(line.split()[-1])
        for line in lines
        if line.startswith('lighten_prompt_tokens_total{model="one"}')
    )


def test_an_echo_without_an_answer(client: httpx.Client, tiny_folder: Path) -> None:
    ids = models.load_tokenizer(str(tiny_folder))(LETTERS)["input_ids"]
    whole = complete(client, prompt=LETTERS, logprobs=1)["choices"][0]["logprobs"]
    for prompt in (LETTERS, ids):
        before = prompt_tokens(client)
        answer = complete(client, prompt=prompt, logprobs=1, max_tokens=0)
        (choice,) = answer["choices"]
        assert (choice["text"], choice["finish_reason"]) == (LETTERS, "length")
        assert choice["logprobs"] == {key: whole[key][:-1] for key in whole}
        assert answer["usage"]["completion_tokens"] == 0
        assert answer["usage"]["prompt_tokens"] == len(ids)
        assert prompt_tokens(client) - before == len(ids)
    plain = complete(client, prompt=LETTERS, max_tokens=0)["choices"][0]
    assert (plain["text"], plain["logprobs"]) == (LETTERS, None)
    refused = client.post("/v1/completions", json={"model": "one", "prompt": "a", "max_tokens": 0})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")


def test_the_token_that_ends_an_answer_is_told_behind_an_echo(
    client: httpx.Client, tiny_folder: Path
) -> None:
    """Else lm-eval, which leaves out the answer's one token, would leave out the prompt's last."""
    tokenizer = models.load_tokenizer(str(tiny_folder))
    bias = {str(tokenizer.eos_token_id): 100}
    answer = complete(client, prompt="the answer", logprobs=1, logit_bias=bias)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("the answer", "stop")
    told = choice["logprobs"]
    assert told["tokens"][-1] == tokenizer.eos_token
    assert told["text_offset"][-1] == len("the answer")
    assert len(told["tokens"]) == answer["usage"]["prompt_tokens"] + 1
    assert answer["usage"]["completion_tokens"] == 1


def test_several_answers_and_streams_begin_with_the_prompt(client: httpx.Client) -> None:
    settings = {"prompt": [LETTERS, "a user"], "n": 2, "temperature": 1, "seed": 3, "logprobs": 1,
                "max_tokens": 4}  # fmt: skip
    whole = complete(client, **settings)["choices"]
    assert [choice["text"].startswith(LETTERS) for choice in whole] == [True, True, False, False]
    assert len({choice["text"] for choice in whole}) == 4
    body = {"model": "one", "echo": True, "stream": True, **settings}
    streamed: list[dict[str, Any]] = [
        {"text": "", "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for _ in whole
    ]
    with client.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            for part in json.loads(line[6:])["choices"]:
                streamed[part["index"]]["text"] += part["text"]
                for key, values in (part["logprobs"] or {}).items():
                    streamed[part["index"]][key] += values
    assert streamed == [{"text": choice["text"], **choice["logprobs"]} for choice in whole]


def test_prompt_logprobs_have_the_form_of_vllm(client: httpx.Client, tiny_folder: Path) -> None:
    tokenizer = models.load_tokenizer(str(tiny_folder))
    ids = tokenizer("the answer")["input_ids"]
    told = complete(client, prompt="the answer", logprobs=2)["choices"][0]["logprobs"]
    answer = complete(client, prompt="the answer", echo=False, prompt_logprobs=2)
    (choice,) = answer["choices"]
    assert not choice["text"].startswith("the answer")
    first, *others = choice["prompt_logprobs"]
    assert first is None
    assert len(others) == len(ids) - 1
    for place, (token, words) in enumerate(zip(ids[1:], others, strict=True), start=1):
        own = words[str(token)]
        assert own["logprob"] == told["token_logprobs"][place]
        assert own["decoded_token"] == told["tokens"][place]
        ranks = sorted(word["rank"] for word in words.values())
        assert ranks == ([1, 2] if own["rank"] < 3 else [1, 2, own["rank"]])
    messages = [{"role": "user", "content": "a"}]
    body = {"model": "two", "messages": messages, "max_tokens": 1, "prompt_logprobs": 0}
    chat = client.post("/v1/chat/completions", json=body).json()
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    first, *others = chat["prompt_logprobs"]
    assert first is None
    assert [list(words) for words in others] == [[str(token)] for token in prompt[1:]]
    refused = client.post("/v1/chat/completions", json={**body, "stream": True})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt_logprobs")


def test_llama_cpp_says_which_engine_tells_of_prompts(tiny_folder: Path, tmp_path: Path) -> None:
    options = Options(engine="llamacpp", served_name="base", slots=1, threads=1, context=64)
    with client_of(tiny_folder, new_cache(tmp_path), options) as http:
        body = {"model": "base", "prompt": "the answer", "max_tokens": 2, "temperature": 0}
        for more, field in (
            ({"echo": True, "logprobs": 1}, "echo"), ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ):  # fmt: skip
            refused = http.post("/v1/completions", json={**body, **more})
            error = refused.json()["error"]
            assert (refused.status_code, error["param"]) == (400, field)
            assert "--engine lighten" in error["message"]
        plain = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
        echo = http.post("/v1/completions", json={**body, "echo": True}).json()["choices"][0]
        assert echo["text"] == "the answer" + plain
