"""Several `lighten serve` behind one address with Ray Serve's model multiplexing.

    pip install 'lighten[serve]' 'ray[serve]'
    export LIGHTEN_BASE=smollm2-135m LIGHTEN_ADAPTERS=/models/adapters LIGHTEN_REPLICAS=2
    serve run examples.serving.ray_serve:app

Clients use `http://127.0.0.1:8000/v1` as they use one server. Each replica is a server of its own.
An adapter is a folder below `LIGHTEN_ADAPTERS`; a replica loads it when it is first asked for, and
Ray Serve sends its requests to a replica that has it. One that has eight unloads the one that was
asked for longest ago.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

BASE = "base"  # what clients call it
ADAPTERS_PER_REPLICA = 8


class Refused(Exception):
    """The server of a replica did not load an adapter."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status, body)
        self.status, self.body = status, body


class Loaded:
    """An adapter that a replica's server holds; Ray Serve deletes the one it wants out."""

    def __init__(self, url: str, key: str, name: str) -> None:
        self._url, self._key, self._name, self._held = url, key, name, True

    def __del__(self) -> None:
        """Unload it, once; answers under way end as they began."""
        if not self._held:  # Python deletes what Ray Serve has deleted
            return
        self._held = False
        headers = {"Authorization": f"Bearer {self._key}"}
        body = {"lora_name": self._name}
        httpx.post(f"{self._url}/v1/unload_lora_adapter", json=body, headers=headers, timeout=60)


@serve.deployment(max_ongoing_requests=64, health_check_period_s=5, health_check_timeout_s=60)
class Replica:
    """One `lighten serve`, which ends with the replica.

    Args:
        base: As of `lighten serve`.
        adapters: Folder of adapters.
        words: More of the command's words.
    """

    def __init__(self, base: str, adapters: str, words: list[str]) -> None:
        self._key = secrets.token_urlsafe()
        self._place = serve.get_replica_context().replica_id.unique_id
        command = [sys.executable, "-m", "lighten.serving.tether", sys.executable, "-m", "lighten",
                   "serve", base, "--served-model-name", BASE, "--port", "0", "--adapter-dir",
                   adapters, "--max-cpu-loras", str(2 * ADAPTERS_PER_REPLICA), *words]  # fmt: skip
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "LIGHTEN_ADMIN_KEY": self._key},
        )  # fmt: skip
        assert self._process.stderr is not None
        self._url = ""
        for line in self._process.stderr:
            print(line, end="")  # Ray's log
            if (found := re.search(r"listening at (\S+)", line)) is not None:
                self._url = found[1]
            if "ready after" in line:
                break
        else:
            raise RuntimeError(f"lighten serve ended with code {self._process.wait()}")
        stderr = self._process.stderr
        threading.Thread(target=lambda: [*map(print, stderr)], daemon=True).start()
        self._client = httpx.AsyncClient(base_url=self._url, timeout=600)

    def __del__(self) -> None:
        """End the server; it finishes its answers."""
        if self._process.stdin is not None:
            self._process.stdin.close()

    async def check_health(self) -> None:
        """Ray Serve starts a replica again whose server is gone or left its engine down."""
        (await self._client.get("/health")).raise_for_status()

    @serve.multiplexed(max_num_models_per_replica=ADAPTERS_PER_REPLICA)
    async def adapter(self, name: str) -> Loaded:
        """Load an adapter, once as long as it is held."""
        await self._load(name)
        return Loaded(self._url, self._key, name)

    async def _load(self, name: str) -> None:
        answer = await self._client.post(
            "/v1/load_lora_adapter", json={"lora_name": name, "lora_path": name},
            headers={"Authorization": f"Bearer {self._key}"},
        )  # fmt: skip
        if answer.status_code != 200:
            raise Refused(answer.status_code, answer.content)

    async def answer(self, path: str, body: bytes) -> AsyncIterator[Any]:
        """Status, kind of content and which replica this is, then the content as it comes."""
        name = serve.get_multiplexed_model_id()
        headers = {"Content-Type": "application/json"}
        try:
            if name:
                await self.adapter(name)
            for again in (bool(name), False):
                async with self._client.stream("POST", path, content=body, headers=headers) as got:
                    if got.status_code == 404 and again:  # unloaded just now, for another one
                        await self._load(name)
                        continue
                    yield got.status_code, got.headers["content-type"], self._place
                    async for part in got.aiter_raw():
                        yield part
                    return
        except Refused as refused:
            yield refused.status, "application/json", self._place
            yield refused.body


@serve.deployment(num_replicas=1, max_ongoing_requests=1000)
class Router:
    """The address: reads which model a request names."""

    def __init__(self, replicas: Any, adapters: str) -> None:
        self._replicas, self._adapters = replicas, Path(adapters)

    async def __call__(self, request: Request) -> Response:
        """Answer a request of OpenAI's clients."""
        path = request.url.path
        if path == "/v1/models":
            there = sorted(
                file.parent.name for file in self._adapters.glob("*/adapter_config.json")
            )
            names = [(BASE, None), *((name, BASE) for name in there)]
            return JSONResponse({"object": "list", "data": [
                {"id": name, "object": "model", "owned_by": "lighten", "parent": parent}
                for name, parent in names
            ]})  # fmt: skip
        if path not in ("/v1/chat/completions", "/v1/completions"):
            return JSONResponse({"error": {"message": f"there is no {path}"}}, 404)
        body = await request.body()
        try:
            model = json.loads(body)["model"]
            named = model if isinstance(model, str) and model != BASE else ""
        except (ValueError, KeyError, TypeError):
            named = ""  # the server says what is wrong with it
        handle = self._replicas.options(stream=True, multiplexed_model_id=named)
        parts = handle.answer.remote(path, body)
        status, kind, place = await anext(parts)
        return StreamingResponse(parts, status, {"X-Replica": place}, kind)


def build(base: str, adapters: str, replicas: int, words: list[str]) -> Any:
    """The application.

    Args:
        base: As of `lighten serve`.
        adapters: Folder of adapters, on every machine.
        replicas: How many servers.
        words: More of the command's words.
    """
    replica: Any = Replica  # its decorator makes a `Deployment` of it
    router: Any = Router
    servers = replica.options(num_replicas=replicas).bind(base, adapters, words)
    return router.bind(servers, adapters)


if "LIGHTEN_BASE" in os.environ:
    app = build(
        os.environ["LIGHTEN_BASE"], os.environ["LIGHTEN_ADAPTERS"],
        int(os.environ.get("LIGHTEN_REPLICAS", "2")), os.environ.get("LIGHTEN_FLAGS", "").split(),
    )  # fmt: skip
