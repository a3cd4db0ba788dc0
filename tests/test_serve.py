"""`lighten serve` for real: llama.cpp, a tiny base, two adapters that answer differently."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import socket
import threading
import time
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import openai
import psutil
import pytest
import torch
from peft import PeftModel

pytest.importorskip("xllamacpp")
pytest.importorskip("uvicorn")

import lighten.api
from benchmarks import serve_identity
from lighten import models
from lighten.serving import checks
from lighten.serving.options import Options
from lighten.serving.remote import Remote
from lighten.serving.talk import talk
from tests.caches import new_cache
from tests.processes import call
from tests.serving import ADMIN, Server, ask, by_schema, in_process, save_adapters, serving, text

BASE = "base"
QUESTIONS = ["What is the answer?", "Who is the user?", "the question is", "answer the system"]


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapters(tiny_folder, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module", params=["llamacpp", "lighten"])
def server(
    folder: Path,
    tiny_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Server]:
    inside = folder / "inside"
    with serving(
        str(tiny_folder), "--adapters", f"one={inside / 'one'}", f"two={inside / 'two'}",
        "--served-model-name", BASE, "--adapter-dir", str(inside), "--storage", "f32",
        "--max-num-seqs", "4", "--engine", request.param,
        cache=new_cache(tmp_path_factory.mktemp("cache")),
    ) as running:  # fmt: skip
        yield running


def test_models_are_listed_with_their_parents(server: Server) -> None:
    listed = {model.id: getattr(model, "parent", None) for model in server.client().models.list()}
    assert {"base": None, "one": "base", "two": "base"}.items() <= listed.items()
    assert server.client().models.retrieve("one").id == "one"


@pytest.mark.parametrize("model", ["base", "one", "two"])
def test_log_probabilities_are_those_of_peft_alone(
    server: Server, model: str, folder: Path, tiny_folder: Path
) -> None:
    base = models.load(str(tiny_folder), dtype="float32")
    reference: Any = base.model
    if model != "base":
        reference = PeftModel.from_pretrained(reference, str(folder / "inside" / model))
    compared = 0
    for question in (f"{question} {number}" for question in QUESTIONS for number in range(3)):
        reply = ask(server, model, question, max_completion_tokens=1, logprobs=True, top_logprobs=5)
        if not reply.choices[0].logprobs.content:
            continue  # half a character, whose probability llama.cpp does not tell
        messages = [{"role": "user", "content": question}]
        ids = base.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        assert reply.usage.prompt_tokens == ids.shape[1]
        with torch.inference_mode():
            expected = reference(ids).logits[0, -1].float().log_softmax(-1).topk(5).values
        top = [entry.logprob for entry in reply.choices[0].logprobs.content[0].top_logprobs]
        # All is float32, keys and values too: what is left is the order of sums, and our engine's
        # factors of adapters, which have the 11 bits of float16.
        close = 1e-3 if model == "base" or engine_of(server) == "llama.cpp" else 5e-3
        torch.testing.assert_close(torch.tensor(top), expected, atol=close, rtol=0)
        compared += 1
    assert compared >= 4


def engine_of(server: Server) -> str:
    return str(server.http().get("/health").json()["engine"])


def test_answers_are_the_named_adapters_whatever_the_caches_hold(server: Server) -> None:
    models_ = ("base", "one", "two")
    alone = {pair: text(server, *pair) for pair in itertools.product(models_, QUESTIONS)}
    for question in QUESTIONS:
        assert len({alone[model, question] for model in models_}) == 3
    order = list(alone) * 8
    random.Random(0).shuffle(order)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda pair: text(server, *pair), order))
    assert [pair for pair, got in zip(order, answers, strict=True) if got != alone[pair]] == []


def test_answers_under_load_are_those_alone_with_caches_off(
    server: Server, folder: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixty answers at random while an adapter is trained anew in its place, or loaded again."""
    inside = folder / "inside"
    for name, source in (("first", "one"), ("second", "spare"), ("moving", "one")):
        shutil.copytree(inside / source, inside / name)
    monkeypatch.setenv("LIGHTEN_CACHE", str(tmp_path))
    own_engine = engine_of(server) == "lighten"
    options = Options(
        engine="lighten" if own_engine else "llamacpp", served_name=BASE, storage="f32", slots=1,
        threads=1, adapter_dir=inside, prefix_caching=False,
    )  # fmt: skip
    fixed_contents = {BASE: [BASE], "one": ["one"], "two": ["two"]}
    contents = {BASE: None, **{name: name for name in ("one", "two", "first", "second")}}
    questions = serve_identity.questions(6, 2)
    with in_process(str(tiny_folder), options) as url:
        alone = serve_identity.references(Remote(url), Remote(url, ADMIN), contents, questions)
    assert len({answer.text for answer in alone.values()}) > len(alone) / 3
    admin = Remote(server.url, ADMIN)
    serve_identity.load(admin, "moving", "moving")
    report = serve_identity.under_load(
        Remote(server.url), admin, inside, {**fixed_contents, "moving": ["first", "second"]}, alone,
        questions, requests=60, clients=6, tie=0.0 if own_engine else 1e-3,
    )  # fmt: skip
    serve_identity.unload(admin, "moving")
    assert report.wrong == []
    assert report.equal + report.ties == 60
    assert report.ties <= 3
    assert report.reloads >= 1
    for name in ("first", "second", "moving"):
        shutil.rmtree(inside / name)


def test_adapters_come_and_go_while_others_answer(server: Server, folder: Path) -> None:
    before = {model: text(server, model, QUESTIONS[0]) for model in ("base", "one", "two")}
    wrong: list[str] = []
    done = threading.Event()

    def load() -> None:
        while not done.is_set():
            for model, expected in before.items():
                got = text(server, model, QUESTIONS[0])
                if got != expected:
                    wrong.append(f"{model}: {got!r}, not {expected!r}")

    changing = folder / "inside" / "changing"
    name, as_macs_write_it = "말투", unicodedata.normalize("NFD", "말투")
    admin = server.http(ADMIN)
    with ThreadPoolExecutor(2) as pool:
        clients = [pool.submit(load) for _ in range(2)]
        changing_texts = []
        for source in ("one", "two", "spare"):  # trained anew in its place each time
            shutil.rmtree(changing, ignore_errors=True)
            shutil.copytree(folder / "inside" / source, changing)
            body = {"lora_name": as_macs_write_it, "lora_path": "changing"}
            answer = admin.post("/v1/load_lora_adapter", json=body)
            assert answer.status_code == 200, answer.text
            assert text(server, as_macs_write_it, QUESTIONS[0])
            changing_texts.append(text(server, name, QUESTIONS[0]))
        assert f'model="{name}"' in server.http().get("/metrics").text
        unload_answer = admin.post("/v1/unload_lora_adapter", json={"lora_name": name})
        assert unload_answer.status_code == 200
        done.set()
        for client in clients:
            client.result()
    assert wrong == []
    assert changing_texts[:2] == [before["one"], before["two"]]
    assert changing_texts[2] not in before.values()
    with pytest.raises(openai.NotFoundError, match=name):
        text(server, name, QUESTIONS[0])


def test_streams_say_the_same_as_whole_answers(server: Server) -> None:
    full_answer = ask(server, "one", QUESTIONS[1], n=2, max_completion_tokens=12)
    parts: list[str] = ["", ""]
    ends: list[str | None] = [None, None]
    usage = None
    for event in ask(
        server, "one", QUESTIONS[1], n=2, max_completion_tokens=12, stream=True,
        stream_options={"include_usage": True},
    ):  # fmt: skip
        usage = event.usage or usage
        for choice in event.choices:
            parts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert parts == [choice.message.content for choice in full_answer.choices]
    assert ends == [choice.finish_reason for choice in full_answer.choices]
    assert usage is not None
    assert usage.completion_tokens == full_answer.usage.completion_tokens


def test_a_stop_text_ends_an_answer_and_is_not_shown(server: Server) -> None:
    full_text = text(server, "two", QUESTIONS[0], max_completion_tokens=20)
    stop = full_text[len(full_text) // 2 :][:2]
    answer = ask(server, "two", QUESTIONS[0], max_completion_tokens=20, stop=[stop, "never"])
    assert answer.choices[0].message.content == full_text[: full_text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_sampling_takes_effect(server: Server) -> None:
    def sample_texts(**options: Any) -> list[str]:
        answer = ask(server, "one", QUESTIONS[0], n=4, **options)
        return [choice.message.content for choice in answer.choices]

    assert len(set(sample_texts(temperature=0))) == 1
    assert len(set(sample_texts(temperature=1.5, seed=7))) > 1
    assert sample_texts(temperature=1.5, seed=7) == sample_texts(temperature=1.5, seed=7)
    assert sample_texts(temperature=1.5, seed=7) != sample_texts(temperature=1.5, seed=8)
    completion = server.client().completions.create(
        model="one", prompt="the", max_tokens=4, temperature=0, logit_bias={"40": 100}
    )
    assert len(set(completion.choices[0].text)) == 1


def likely(folder: Path, prompt: list[int], *tokens: int) -> list[float]:
    """The base's logits of tokens after a prompt."""
    with torch.inference_mode():
        logits = models.load(str(folder), dtype="float32").model(torch.tensor([prompt])).logits
    return [float(logits[0, -1, token]) for token in tokens]


def test_settings_mean_the_same_in_both_engines(server: Server, tiny_folder: Path) -> None:
    """Temperature comes before top_p, and penalties count what was generated alone."""
    tokenizer = models.load_tokenizer(str(tiny_folder))
    x, y = (tokenizer(letter)["input_ids"][0] for letter in "XY")
    prompt = [x, x, x, *tokenizer("the")["input_ids"]]
    of_x, of_y = likely(tiny_folder, prompt, x, y)
    client = server.client()

    def first_letters(margin: float, **options: Any) -> set[str]:
        """First letters of answers where X has so much more than Y, and both all the rest."""
        bias = {str(x): 90.0, str(y): 90.0 + of_x - of_y - margin}
        completion = client.completions.create(
            model="base", prompt=prompt, max_tokens=1, logit_bias=bias, **options
        )
        return {choice.text for choice in completion.choices}

    # At temperature 1 X has 0.88 of both, at temperature 2 it has 0.73.
    assert first_letters(2, n=16, seed=-1, temperature=1, top_p=0.8) == {"X"}
    assert first_letters(2, n=16, seed=2**32 - 1, temperature=2, top_p=0.8) == {"X", "Y"}
    for only in ({"top_k": 1}, {"min_p": 0.5}):
        assert first_letters(2, n=8, seed=3, temperature=2, extra_body=only) == {"X"}
    for _ in range(2):  # with a cold cache and a warm one
        assert first_letters(1, temperature=0, frequency_penalty=2) == {"X"}
    if engine_of(server) == "llama.cpp":
        for name, extra in (
            ("presence_penalty", {}),
            ("frequency_penalty", {"extra_body": {"repetition_penalty": 2}}),
        ):
            with pytest.raises(openai.BadRequestError, match=name) as refused:
                first_letters(1, temperature=0, **{name: 1}, **extra)
            assert refused.value.param == name
    else:
        assert first_letters(1, temperature=0, presence_penalty=2) == {"X"}


PERSON = {
    "type": "object",
    "properties": {
        "kind": {"$ref": "#/$defs/kind"},
        "age": {"type": "integer", "minimum": 3, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["p", "q"]}, "minItems": 1, "maxItems": 2},
        "note": {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 3}]},
    },
    "required": ["kind", "age", "tags", "note"],
    "additionalProperties": False,
    "$defs": {"kind": {"enum": ["x", "y"], "title": "Kind"}},
}


@pytest.mark.parametrize("model", ["base", "one"])
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_json_follows_its_schema(server: Server, model: str, temperature: float) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    pytest.importorskip("llguidance")
    answer = ask(
        server, model, "json", response_format=by_schema(PERSON), n=4, seed=3,
        temperature=temperature, max_completion_tokens=150, logprobs=True,
    )  # fmt: skip
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    for choice in answer.choices:
        jsonschema.validate(json.loads(choice.message.content), PERSON)
    plain = text(server, model, "json", response_format={"type": "json_object"}, seed=5,
                 max_completion_tokens=1)  # fmt: skip
    assert plain.startswith("{")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"$ref": "#/$defs/nowhere"},
        {"type": "object", "propertyNames": {"pattern": "^a"}},
        {"type": "object", "properties": {"a": {"not": {"type": "string"}}}},
        {"type": "array", "uniqueItems": True},
        {"type": "string", "format": "no-such-format"},
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused(
    server: Server, schema: dict[str, Any]
) -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(openai.BadRequestError, match="schema") as refused:
        text(server, "one", "json", response_format=by_schema(schema))
    assert refused.value.param == "response_format"


def test_completions_take_texts_and_ids(server: Server, tiny_folder: Path) -> None:
    ids = models.load_tokenizer(str(tiny_folder))("the answer")["input_ids"]
    client = server.client()
    settings: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "logprobs": 2}
    of_text = client.completions.create(model="two", prompt="the answer", **settings)
    of_ids = client.completions.create(model="two", prompt=[ids, ids], **settings)
    assert of_text.usage is not None
    assert of_text.usage.prompt_tokens == len(ids)
    assert {choice.text for choice in of_ids.choices} == {of_text.choices[0].text}
    assert of_text.choices[0].logprobs is not None
    assert all(len(top) == 2 for top in of_text.choices[0].logprobs.top_logprobs or ())


def _chat(**changes: Any) -> dict[str, Any]:
    return {"model": "one", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1,
            **changes}  # fmt: skip


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (_chat(model="nobody"), 404, "nobody"),
        (_chat(model=None), 400, "model"),
        (_chat(messages=[]), 400, "messages"),
        (_chat(messages=[{"role": "critic", "content": "a"}]), 400, "role"),
        (_chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "content"),
        (_chat(messages=[{"role": "user", "content": "word " * 2000}]), 400, "256"),
        (_chat(max_tokens=10_000), 400, "max_tokens"),
        (_chat(max_tokens=0), 400, "max_tokens"),
        (_chat(max_completion_tokens=2), 400, "max_completion_tokens"),
        (_chat(temperature=3), 400, "temperature"),
        (_chat(temperature="hot"), 400, "temperature"),
        (_chat(n=1000), 400, "n:"),
        (_chat(stop=[""]), 400, "stop"),
        (_chat(top_logprobs=3), 400, "top_logprobs"),
        (_chat(logit_bias={"99999": 1}), 400, "logit_bias"),
        (_chat(tools=[{"type": "function"}]), 400, "tools"),
        (_chat(reasoning_effort="high"), 400, "reasoning_effort"),
        (_chat(stream_options={"include_usage": True}), 400, "stream_options"),
        (_chat(adapter_id="two"), 400, "adapter_id"),
        ([], 400, "object"),
    ],
)
def test_what_is_not_applied_is_refused_by_name(
    server: Server, body: Any, status: int, message: str
) -> None:
    answer = server.http().post("/v1/chat/completions", json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        ({}, b"{}", 415),
        ({"Content-Type": "text/plain"}, b"{}", 415),
        ({"Content-Type": "application/json"}, b"{", 400),
        ({"Content-Type": "application/json"}, b"\xff", 400),
        ({"Content-Type": "application/json"}, b"[" * 100_000, 400),
        ({"Content-Type": "application/json"}, b'"' + b"a" * 9_000_000 + b'"', 413),
        ({"Content-Type": "application/json", "Host": "evil.example"}, b"{}", 421),
    ],
)
def test_broken_bodies_and_strange_hosts(
    server: Server, headers: dict[str, str], content: bytes, status: int
) -> None:
    answer = server.http().post("/v1/chat/completions", headers=headers, content=content)
    assert answer.status_code == status, answer.text


@pytest.mark.parametrize(
    ("key", "path", "status"),
    [
        (None, "spare", 401),
        ("wrong", "spare", 401),
        (ADMIN, "../outside", 403),
        (ADMIN, "/etc", 403),
        (ADMIN, "link", 403),
        (ADMIN, ".", 403),
        (ADMIN, "nobody", 404),
        (ADMIN, "a\0b", 400),
        (ADMIN, "dora", 400),
    ],
)
def test_adapters_are_loaded_with_the_key_and_from_the_folder_alone(
    server: Server, key: str | None, path: str, status: int
) -> None:
    body = {"lora_name": "more", "lora_path": path}
    answer = server.http(key).post("/v1/load_lora_adapter", json=body)
    assert answer.status_code == status, answer.text
    if path == "dora":
        assert "merge" in answer.json()["error"]["message"]
    assert "more" not in [model.id for model in server.client().models.list()]


def test_bench_serve_measures_and_checks(server: Server, tmp_path: Path) -> None:
    report = lighten.api.bench_serve(
        server.url, output_dir=tmp_path, requests=12, clients=4, prompt_words=3, max_tokens=4,
        identity_requests=24, popularity="zipf",
    )  # fmt: skip
    assert [check["name"] for check in report["checks"] if not check["passed"]] == []
    assert report["identity"]["wrong"] == 0
    assert report["identity"]["same"] + report["identity"]["rounding"] == 24
    loads = {load["what"]: load for load in report["loads"]}
    assert {"base", "1 adapter", "2 adapters", "base and adapters"} <= loads.keys()
    for load in loads.values():
        assert load["answered"] == 12
        assert load["errors"] == {}
        assert 0 < load["first_token_s"]["p50"] <= load["first_token_s"]["p99"]
        assert load["ignore_eos"]
        assert load["tokens_per_answer"] == 4
    assert report["comparable"]
    assert set(loads["base"]["by_model"]) == {"base"}
    assert json.loads((tmp_path / "bench-serve.json").read_text())["identity"]["wrong"] == 0
    ElementTree.parse(tmp_path / "bench-serve.svg")


def test_bench_serve_fails_where_no_request_of_a_load_is_answered(server: Server) -> None:
    bench = call(
        "bench", "serve", server.url, "--requests", "2", "--clients", "1", "--prompt-words",
        "4000", "--max-tokens", "4", "--identity-requests", "4",
    )  # fmt: skip
    assert bench.returncode == 1, bench.stderr
    assert "0 answered, 2 errors, most often: " in bench.stdout


def test_checks_find_a_server_that_answers_with_another_adapter(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = Remote(server.url)
    chat, calls = remote.chat, itertools.count()

    def mixed_up(model: str, messages: Any, **options: Any) -> Any:
        # The first answers are those of each model alone.
        wrong = next(calls) >= 8 and model == "two"
        return chat("one" if wrong else model, messages, **options)

    monkeypatch.setattr(remote, "chat", mixed_up)
    report = checks.identity(remote, ["one", "two"], requests=16, clients=2)
    assert report.wrong == 8
    assert report.same == 8


def test_chat_talks_to_a_server(server: Server) -> None:
    out = io.StringIO()
    question = f"{QUESTIONS[0]}\n/adapter nobody\n/adapter two\n/reset\n{QUESTIONS[0]}\n/exit\n"
    talk(server.url, lines=io.StringIO(question), out=out, max_new_tokens=8)
    output = out.getvalue()
    assert output.startswith(text(server, "one", QUESTIONS[0]))
    assert "no model is called 'nobody'" in output
    assert output.rstrip("\n").endswith(text(server, "two", QUESTIONS[0]).rstrip("\n"))


def test_options_of_a_stream_that_ask_for_nothing_are_known(server: Server) -> None:
    more = {"include_usage": None, "include_obfuscation": False, "continuous_usage_stats": None}
    answer = server.http().post(
        "/v1/chat/completions", json=_chat(stream=True, stream_options=more, max_tokens=2)
    )
    assert answer.status_code == 200, answer.text
    assert '"usage"' not in answer.text.replace('"usage":null', "")


def test_an_answer_is_as_long_as_there_is_room_for(server: Server) -> None:
    """A conversation grows; the wish for a long answer must not end it."""
    out = io.StringIO()
    talk(server.url, lines=io.StringIO(f"{QUESTIONS[0]}\n"), out=out, max_new_tokens=100_000)
    assert "more than" not in out.getvalue()
    assert out.getvalue().strip()


def test_the_page_asks_two_models(server: Server, browser: Any) -> None:
    page = browser.new_page()
    page.goto(server.url)
    page.wait_for_selector("option >> nth=5", state="attached")
    page.select_option("select >> nth=0", "one")
    page.select_option("select >> nth=1", "two")
    page.fill("input[name=tokens]", "8")
    page.fill("textarea", QUESTIONS[0])
    page.click("text=Ask")
    page.wait_for_selector(".told >> nth=1", state="attached")
    shown = [element.text_content() for element in page.query_selector_all(".answer")]
    assert shown == [text(server, "one", QUESTIONS[0]), text(server, "two", QUESTIONS[0])]
    # One question at a time, and an answer as long as there is room for.
    page.fill("input[name=tokens]", "100000")
    page.fill("textarea", QUESTIONS[1])
    # Looked at in the same moment: a tiny model has answered in the next one.
    assert page.evaluate("""() => {
        const {ask, forget} = document.forms[0].elements;
        ask.click();
        return [ask.disabled, forget.disabled];
    }""") == [True, True]
    page.wait_for_selector(".told >> nth=3", state="attached")
    page.wait_for_function("!document.forms[0].elements.ask.disabled")
    assert not page.query_selector_all(".error")
    page.close()


def test_a_client_that_hangs_up_frees_its_slot(server: Server) -> None:
    for _ in range(6):  # more than there are slots
        with server.http().stream(
            "POST", "/v1/chat/completions",
            json=_chat(max_tokens=200, stream=True, logit_bias={"4": -100}),
        ) as stream:  # fmt: skip
            next(stream.iter_lines())
    assert text(server, "one", QUESTIONS[0])
    deadline = time.monotonic() + 20
    while "lighten_requests_running 0" not in server.http().get("/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"GARBAGE\r\n\r\n", b"400"),
        (b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000, b"400"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
         b"Content-Length: 1000\r\n\r\n{", b""),
    ],
    ids=["no HTTP", "endless header", "half a request"],
)  # fmt: skip
def test_what_is_no_request_is_ended_and_others_are_answered(
    server: Server, sent: bytes, expected: bytes
) -> None:
    address = httpx.URL(server.url)
    with socket.create_connection((address.host, address.port or 80), timeout=60) as connection:
        # The server may hang up before all was sent: reset, broken pipe or no longer connected.
        with contextlib.suppress(OSError):
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
        reply = b""
        with contextlib.suppress(OSError):
            reply = connection.recv(100)
    # Who hangs up while more is being sent takes its answer along.
    assert expected in reply or (not reply and len(sent) > 100_000)
    assert text(server, "one", QUESTIONS[0])


def test_health_and_metrics(server: Server) -> None:
    text(server, "one", QUESTIONS[0])  # something to count, whichever tests ran before
    http = server.http()
    assert engine_of(server) in ("llama.cpp", "lighten")
    assert http.get("/ready").json() == {"ready": True}
    page = http.get("/metrics").text
    assert 'lighten_generated_tokens_total{model="one"}' in page
    for line in page.splitlines():
        assert line.startswith("#") or float(line.rpartition(" ")[2]) >= 0
    assert http.get("/nothing").status_code == 404
    assert http.get("/v1/completions").status_code == 405
    assert "side by side" in http.get("/").text


def test_a_crashed_engine_is_started_again(server: Server) -> None:
    if engine_of(server) == "lighten":
        pytest.skip("it lives in the server's process")
    before = text(server, "two", QUESTIONS[2])
    (child,) = (
        process for process in psutil.Process(server.process.pid).children(recursive=True)
        if "lighten.serving.child" in process.cmdline()
    )  # fmt: skip
    child.suspend()  # so that the request is under way for as long as it takes
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(server.http().post, "/v1/chat/completions", json=_chat())
        while "lighten_requests_running 0" in server.http().get("/metrics").text:
            time.sleep(0.02)
        child.kill()
        answer = asking.result()
    assert answer.status_code == 503
    assert "ended while it answered" in answer.json()["error"]["message"]
    assert answer.headers["Retry-After"]
    deadline = time.monotonic() + 60
    while (
        server.http().get("/ready").status_code != 200
        or not server.http().get("/health").json()["restarts"]
    ):
        assert time.monotonic() < deadline, server.lines
        time.sleep(0.1)
    assert text(server, "two", QUESTIONS[2]) == before


def test_sigterm_lets_running_answers_finish(server: Server) -> None:
    """The last test: it ends the module's server, with three answers under way.

    Service managers signal all processes of a service, and Ctrl-C all of a terminal's group.
    """
    began = threading.Barrier(4, timeout=60)

    def stream() -> list[str]:
        with server.http().stream(
            "POST", "/v1/chat/completions",
            json=_chat(max_tokens=220, stream=True, logit_bias={"4": -100, "2": -100}),
        ) as events:  # fmt: skip
            lines = events.iter_lines()
            first_line = next(lines)
            began.wait()
            return [first_line, *lines]

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(stream) for _ in range(3)]
        began.wait()
        for child in psutil.Process(server.process.pid).children(recursive=True):
            assert os.getpgid(child.pid) != os.getpgid(server.process.pid)
            child.send_signal(signal.SIGTERM)
            child.send_signal(signal.SIGINT)
        server.process.send_signal(signal.SIGTERM)
        for answer in running:
            assert "data: [DONE]" in answer.result(timeout=60)
    assert server.process.wait(timeout=60) == 0
    with pytest.raises(httpx.ConnectError):
        server.http().get("/health")
