"""The example of Ray Serve for real: two replicas, each a server of its own."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("xllamacpp")
pytest.importorskip("uvicorn")
pytest.importorskip("ray")
pytest.importorskip("ray.serve", exc_type=ImportError)

import ray
from ray import serve

from tests.serving import save_adapter

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
NAMES = ("one", "two", "three")


@pytest.fixture(scope="module")
def client(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    root = tmp_path_factory.mktemp("ray")
    for seed, name in enumerate(NAMES):
        save_adapter(tiny_folder, root / "adapters" / name, seed=seed + 1)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=True)
    try:
        from examples.serving import ray_serve

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        words = [
            "--engine",
            "llamacpp",
            "--storage",
            "f32",
            "--threads",
            "1",
            "--max-num-seqs",
            "2",
        ]
        app = ray_serve.build(str(tiny_folder), str(root / "adapters"), 2, words)
        serve.run(app)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            yield client
    finally:
        serve.shutdown()
        ray.shutdown()


def ask(client: httpx.Client, model: str, **options: Any) -> httpx.Response:
    body = {"model": model, "prompt": "the answer", "temperature": 0, "max_tokens": 6, **options}
    return client.post("/v1/completions", json=body)


def test_an_adapters_requests_stay_together_and_are_answered_by_it(client: httpx.Client) -> None:
    texts: dict[str, set[str]] = {}
    places: dict[str, set[str]] = {}
    for _ in range(4):
        for model in ("base", *NAMES):
            answer = ask(client, model)
            assert answer.status_code == 200, answer.text
            texts.setdefault(model, set()).add(answer.json()["choices"][0]["text"])
            places.setdefault(model, set()).add(answer.headers["X-Replica"])
    assert {model: len(answers) for model, answers in texts.items()} == dict.fromkeys(texts, 1)
    assert len(set.union(*texts.values())) == 4
    assert {name: len(places[name]) for name in NAMES} == dict.fromkeys(NAMES, 1)


def test_streams_and_errors_come_through(client: httpx.Client) -> None:
    full_text = ask(client, "two").json()["choices"][0]["text"]
    streamed = ask(client, "two", stream=True)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    lines = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines) == full_text
    assert "data: [DONE]" in streamed.text
    assert ask(client, "nobody").status_code == 404
    assert ask(client, "../adapters").status_code == 403
    assert ask(client, "one", temperature=9).status_code == 400
    listed = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["base", *sorted(NAMES)]
    assert client.get("/nothing").status_code == 404
