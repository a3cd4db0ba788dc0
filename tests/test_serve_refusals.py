"""Keys, limits and the end of a server: each refusal by the real routes, no engine started."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("xllamacpp")
pytest.importorskip("uvicorn")

from lighten.errors import UserError
from lighten.serving.answering import Front, Limits
from lighten.serving.front import application
from lighten.serving.metrics import Metrics
from lighten.serving.options import Options, keys
from lighten.serving.requests import ChatRequest, parse
from lighten.serving.running import prepare
from tests.processes import run_async

CHAT: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "a"}]}
LOAD = {"lora_name": "more", "lora_path": "more"}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def served(tiny_folder: Path) -> Callable[..., tuple[Front, httpx.AsyncClient]]:
    """A front over a base whose engine is not started, and a client of its routes."""
    registry, engine = prepare(
        str(tiny_folder), Options(engine="lighten", served_name="base"), lambda _: None
    )

    def front(**settings: Any) -> tuple[Front, httpx.AsyncClient]:
        front = Front(registry, engine, **settings)
        transport = httpx.ASGITransport(application(front))
        return front, httpx.AsyncClient(transport=transport, base_url="http://localhost")

    return front


Served = Callable[..., tuple[Front, httpx.AsyncClient]]


def answered(
    client: httpx.AsyncClient, *calls: Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]
) -> list[httpx.Response]:
    async def run() -> list[httpx.Response]:
        async with client:
            return [await call(client) for call in calls]

    return run_async(run())


def test_without_a_clients_key_nothing_below_v1_is_answered(served: Served) -> None:
    _, client = served(api_keys=("first", "second"), admin_keys=("admin",))
    missing, wrong, basic, model, page, health = answered(
        client,
        lambda http: http.get("/v1/models"),
        lambda http: http.post("/v1/chat/completions", json=CHAT, headers=bearer("nobody's")),
        lambda http: http.get("/v1/models", headers={"Authorization": "Basic first"}),
        lambda http: http.get("/v1/models", headers=bearer("second")),
        lambda http: http.get("/"),
        lambda http: http.get("/health"),
    )
    for refused, code in ((missing, "missing_api_key"), (wrong, "invalid_api_key"),
                          (basic, "missing_api_key")):  # fmt: skip
        assert refused.status_code == 401
        assert refused.headers["WWW-Authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == code
    assert "second" not in wrong.text
    assert [answer.status_code for answer in (model, page, health)] == [200, 200, 200]


@pytest.mark.parametrize(
    ("path", "instead"),
    [("/v1/embeddings", "/v1/completions"), ("/v1/responses", "/v1/chat/completions"),
     ("/v1/other", "/v1/models")],
)  # fmt: skip
def test_what_is_not_served_says_what_is(served: Served, path: str, instead: str) -> None:
    _, client = served()
    (answer,) = answered(client, lambda http: http.post(path, json={"model": "base"}))
    assert answer.status_code == 404
    assert instead in answer.json()["error"]["message"]


def test_a_clients_key_loads_no_adapters_and_the_other_way_round(served: Served) -> None:
    _, client = served(api_keys=("client",), admin_keys=("admin",))
    by_client, nowhere, models = answered(
        client,
        lambda http: http.post("/v1/load_lora_adapter", json=LOAD, headers=bearer("client")),
        lambda http: http.post("/v1/load_lora_adapter", json=LOAD, headers=bearer("admin")),
        lambda http: http.get("/v1/models", headers=bearer("admin")),
    )
    assert by_client.status_code == 401
    assert (nowhere.status_code, "--adapter-dir" in nowhere.text) == (403, True)
    assert models.status_code == 401


@pytest.mark.parametrize("host", ["[::1]", "[::1]:8000", "localhost", "127.0.0.1:80"])
def test_a_name_of_this_machine_is_answered_with_or_without_a_port(
    served: Served, host: str
) -> None:
    _, client = served(hosts=frozenset({"localhost", "127.0.0.1", "::1"}))
    right, wrong = answered(
        client,
        lambda http: http.get("/v1/models", headers={"Host": host}),
        lambda http: http.get("/v1/models", headers={"Host": "[::2]"}),
    )
    assert (right.status_code, wrong.status_code) == (200, 421)


def test_a_key_of_any_letters_opens(served: Served) -> None:
    _, client = served(api_keys=("비밀",))
    right, wrong = answered(
        client,
        lambda http: http.get("/v1/models", headers={"Authorization": "Bearer 비밀".encode()}),
        lambda http: http.get("/v1/models", headers={"Authorization": "Bearer 비".encode()}),
    )
    assert (right.status_code, wrong.status_code) == (200, 401)


def test_an_empty_key_is_no_way_to_ask_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTEN_API_KEY", "of-environment,")
    assert keys([], "LIGHTEN_API_KEY") == ("of-environment",)
    with pytest.raises(UserError, match="empty"):
        keys([""], "LIGHTEN_API_KEY")


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
def test_loading_is_off_unless_a_key_turns_it_on(served: Served, path: str) -> None:
    _, client = served(api_keys=("client",))
    (answer,) = answered(client, lambda http: http.post(path, json=LOAD, headers=bearer("client")))
    assert (answer.status_code, "--admin-key" in answer.text) == (403, True)


def test_more_than_a_body_or_a_request_may_hold_is_refused(served: Served) -> None:
    front, client = served(limits=Limits(body_bytes=2000, waiting=3))
    front.ready = True
    many = {"model": "base", "prompt": ["a"] * 4, "max_tokens": 1}
    large, too_many = answered(
        client,
        lambda http: http.post("/v1/completions", json={**many, "prompt": "a" * 2000}),
        lambda http: http.post("/v1/completions", json=many),
    )
    assert (large.status_code, "2,000 bytes" in large.text) == (413, True)
    assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "prompt")
    assert "4 answers" in too_many.text


def test_what_is_far_too_much_is_refused_before_it_is_read_piece_by_piece(served: Served) -> None:
    front, client = served()
    front.ready = True
    context = front.engine.context
    chat = {"path": "/v1/chat/completions", "field": "messages"}
    prompt = {"path": "/v1/completions", "field": "prompt"}
    many = 100_000
    cases: list[tuple[dict[str, str], dict[str, Any]]] = [
        (prompt, {"prompt": ["a"] * many}),
        (prompt, {"prompt": [[5]] * many}),
        (prompt, {"prompt": [5] * many}),
        (prompt, {"prompt": [[5], [5] * many]}),
        (prompt, {"prompt": "word " * many}),
        (prompt, {"prompt": ["a"] * 40, "n": 16}),
        (chat, {"messages": CHAT["messages"] * (context + 1)}),
        (chat, {"messages": [{"role": "user", "content": "word " * many}]}),
    ]
    calls = [
        lambda http, where=where, body=body: http.post(
            where["path"], json={"model": "base", "max_tokens": 1, **body}
        )
        for where, body in cases
    ]
    began = time.process_time()
    answers = answered(client, *calls)
    seconds = time.process_time() - began
    for (where, _), answer in zip(cases, answers, strict=True):
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, where["field"])
    assert "640 answers" in answers[5].text
    assert "more than the 512" in answers[0].text
    # Encoding the first alone takes longer, by far.
    encode = front.registry.models["base"].asking.text
    began = time.process_time()
    for _ in range(many // 10):
        encode("a")
    assert seconds < 10 * (time.process_time() - began)


@pytest.mark.parametrize("kind", ["json_object", "text"])
def test_a_schema_beside_another_type_is_refused_by_name(served: Served, kind: str) -> None:
    front, client = served()
    front.ready = True
    schema = {"name": "it", "schema": {"type": "array"}}
    body = {**CHAT, "response_format": {"type": kind, "json_schema": schema}}
    (answer,) = answered(client, lambda http: http.post("/v1/chat/completions", json=body))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "response_format.json_schema"


def test_a_path_too_long_for_a_file_system_is_refused(served: Served, tmp_path: Path) -> None:
    front, client = served(admin_keys=("admin",))
    front.registry._root = tmp_path
    try:
        (answer,) = answered(
            client,
            lambda http: http.post(
                "/v1/load_lora_adapter", json={**LOAD, "lora_path": "a" * 5000},
                headers=bearer("admin"),
            ),
        )  # fmt: skip
    finally:
        front.registry._root = None
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lora_path")


def test_one_that_is_not_there_yet_or_is_being_stopped_says_so(served: Served) -> None:
    front, client = served()

    async def stop(http: httpx.AsyncClient) -> httpx.Response:
        front.stopping = True
        return await http.post("/v1/chat/completions", json=CHAT)

    early, not_ready, late, not_ready_either = answered(
        client,
        lambda http: http.post("/v1/chat/completions", json=CHAT),
        lambda http: http.get("/ready"),
        stop,
        lambda http: http.get("/ready"),
    )
    assert (early.status_code, late.status_code) == (503, 503)
    assert early.headers["Retry-After"]
    assert not_ready.json() == {"ready": False, "reason": "the engine is being started"}
    assert not_ready_either.json() == {"ready": False, "reason": "the server is being stopped"}
    assert "is being stopped" in late.text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logit_bias", {"5": float("nan")}),
        ("logit_bias", {"9" * 5000: 1}),
        ("logit_bias", {"\N{ARABIC-INDIC DIGIT THREE}": 1}),
        ("top_k", 10**30),
    ],
    ids=["nan", "digits", "arabic", "top_k"],
)
def test_a_number_that_no_engine_takes_is_refused_by_name(
    served: Served, field: str, value: Any
) -> None:
    _, client = served()
    body, kind = json.dumps({**CHAT, field: value}), {"Content-Type": "application/json"}
    (answer,) = answered(
        client, lambda http: http.post("/v1/chat/completions", content=body, headers=kind)
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(field)


NUMBERS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
           "frequency_penalty", "seed", "n", "max_tokens", "max_completion_tokens",
           "top_logprobs")  # fmt: skip


@pytest.mark.parametrize("value", [True, False, "1"], ids=repr)
@pytest.mark.parametrize("field", [*NUMBERS, "logit_bias", "best_of"])
def test_what_is_no_number_is_refused_by_name(served: Served, field: str, value: Any) -> None:
    _, client = served()
    path, body = "chat/completions", {**CHAT, field: value}
    if field == "best_of":
        path, body = "completions", {"model": "base", "prompt": "a", field: value}
    elif field == "logit_bias":
        body = {**CHAT, field: {"5": value}}
    (answer,) = answered(client, lambda http: http.post(f"/v1/{path}", json=body))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"].partition(".")[0] == field
    assert field in error["message"]


@pytest.mark.parametrize("field", NUMBERS)
def test_a_whole_number_is_a_number(field: str) -> None:
    options = {field: 1, **({"logprobs": True} if field == "top_logprobs" else {})}
    parsed = parse(ChatRequest, {**CHAT, **options})
    assert getattr(parsed, field) == 1


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], [5, -1], [5, 10**6], ["a", 5], {"a": 1}, None], ids=str
)
def test_a_prompt_that_is_none_is_refused_by_name(served: Served, prompt: Any) -> None:
    _, client = served()
    body = {"model": "base", "prompt": prompt}
    (answer,) = answered(client, lambda http: http.post("/v1/completions", json=body))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("prompt")


HALF = "a\ud83d"  # the first half of an emoji


@pytest.mark.parametrize(
    ("path", "changes", "field"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": HALF}]}, "messages"),
        ("chat/completions", {"stop": HALF}, "stop"),
        ("chat/completions", {HALF: 1}, "a?"),
        ("completions", {"prompt": HALF}, "prompt"),
        ("completions", {"prompt": ["a", HALF]}, "prompt"),
    ],
    ids=str,
)
def test_half_of_a_character_is_refused_by_name(
    served: Served, path: str, changes: dict[str, Any], field: str
) -> None:
    _, client = served()
    text = json.dumps({**(CHAT if path.startswith("chat") else {"model": "base"}), **changes})
    headers = {"Content-Type": "application/json"}
    (answer,) = answered(
        client, lambda http: http.post(f"/v1/{path}", content=text, headers=headers)
    )
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field
    assert "half of a character" in answer.json()["error"]["message"]


IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}


@pytest.mark.parametrize(
    ("changes", "status", "field", "message"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}]}, 400,
         "messages.0.content.1.type", "should be 'text'"),
        ({"messages": ["a"]}, 400, "messages.0", "should be an object"),
        ({"stop": ["a", None]}, 400, "stop.1", "valid string"),
        ({"stop": ""}, 400, "stop", "stop: an empty text"),
        ({"adapter_id": "nobody"}, 404, "adapter_id", "'nobody'"),
        ({"n": 4}, 400, "n", "4 answers"),
        ({"max_completion_tokens": 1000}, 400, "max_completion_tokens", "1000"),
        ({"repetition_penalty": 1e-300}, 400, "repetition_penalty", "0.01"),
    ],
)  # fmt: skip
def test_the_field_that_is_wrong_is_the_one_that_is_named(
    served: Served, changes: dict[str, Any], status: int, field: str, message: str
) -> None:
    _, client = served(limits=Limits(waiting=3))
    (answer,) = answered(
        client, lambda http: http.post("/v1/chat/completions", json={**CHAT, **changes})
    )
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == field
    assert message in error["message"]
    assert "_Turn" not in error["message"]


@pytest.mark.parametrize("name", ["-한글", "가\n나", "a b", "base"])
def test_a_name_that_cannot_be_is_blamed_on_the_name(served: Served, name: str) -> None:
    _, client = served(admin_keys=("admin",))
    body = {"lora_name": name, "lora_path": "more"}
    (answer,) = answered(
        client, lambda http: http.post("/v1/load_lora_adapter", json=body, headers=bearer("admin"))
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lora_name")


def test_what_waits_is_told_apart_from_what_runs(served: Served) -> None:
    front, client = served()
    front.answering = front.engine.slots + 3
    (page,) = answered(client, lambda http: http.get("/metrics"))
    assert f"lighten_requests_running {front.engine.slots}\n" in page.text
    assert "lighten_requests_waiting 3\n" in page.text


def test_metrics_count_beyond_a_million() -> None:
    metrics = Metrics()
    for _ in range(3):
        metrics.observe("request", 0.2, model="a")
    (row,) = metrics._histograms["request"].values()
    row[4] += 2_345_678
    assert 'lighten_request_seconds_count{model="a"} 2345681\n' in metrics.text({})
