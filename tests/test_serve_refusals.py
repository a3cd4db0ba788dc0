"""Keys, limits and the end of a server: each refusal by the real routes, no engine started."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("xllamacpp")
pytest.importorskip("uvicorn")

from lighten.serving.answering import Front, Limits
from lighten.serving.front import application
from lighten.serving.options import Options
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
    "prompt", ["", [], [[]], [5, -1], [5, 10**6], ["a", 5], {"a": 1}, None], ids=str
)
def test_a_prompt_that_is_none_is_refused_by_name(served: Served, prompt: Any) -> None:
    _, client = served()
    body = {"model": "base", "prompt": prompt}
    (answer,) = answered(client, lambda http: http.post("/v1/completions", json=body))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("prompt")
