"""A real server over a tiny model for tests, and adapters that answer differently."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn

from lighten import adapters, models, runs
from lighten.adapters import AdapterSpec
from lighten.adapters.files import contents
from lighten.serving.answering import Front
from lighten.serving.front import application
from lighten.serving.options import Options
from lighten.serving.running import prepare

ADMIN = "admin-key-of-tests"


def save_adapter(
    base: Path, folder: Path, *, seed: int, r: int = 4, std: float = 0.3, **settings: Any
) -> Path:
    """An adapter with random factors in PEFT's format."""
    loaded = models.load(str(base))
    cohort = adapters.attach(loaded.model, [AdapterSpec(name="own", r=r, alpha=2 * r, **settings)])
    torch.manual_seed(seed)
    for parameter in cohort.parameters("own").values():
        parameter.data.normal_(std=std)
    for name, data in contents(cohort, "own", base_model=str(base)).items():
        runs.write_bytes(folder / name, data)
    return folder


def save_adapters(base: Path, root: Path) -> Path:
    """Adapters `one`, `two` and `spare`; and what cannot be served, and a way out."""
    for seed, name in enumerate(("one", "two", "spare")):
        save_adapter(base, root / "inside" / name, seed=seed + 1)
    # As a run's adapters are: with the tokenizer beside them.
    models.load_tokenizer(str(base)).save_pretrained(root / "inside" / "two")
    shutil.copytree(root / "inside" / "spare", root / "outside")
    (root / "inside" / "link").symlink_to(root / "outside")
    dora = shutil.copytree(root / "inside" / "spare", root / "inside" / "dora")
    config = json.loads((dora / "adapter_config.json").read_text())
    (dora / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    return root


@dataclass
class Server:
    """A server process."""

    process: subprocess.Popen[str]
    url: str = ""
    lines: list[str] = field(default_factory=list)

    def client(self, key: str = "none") -> openai.OpenAI:
        """OpenAI's own client."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def http(self, key: str | None = None) -> httpx.Client:
        """Plain HTTP."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)


@contextmanager
def in_process(base: str, options: Options) -> Iterator[str]:
    """The same server in a thread, which needs no second start of Python; its address."""
    registry, engine = prepare(base, options, lambda _: None)
    front = Front(registry, engine, admin_keys=(ADMIN,))

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        await engine.start(registry.adapters)
        await front.warm_up()
        yield
        await engine.stop()

    app = application(front, lifespan)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="on"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.02)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)


@contextmanager
def client_of(base: Path, cache: Path, options: Options) -> Iterator[httpx.Client]:
    """A client of that server, which converts into a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTEN_CACHE", str(cache))
        with (
            in_process(str(base), options) as url,
            httpx.Client(base_url=url, timeout=60) as http,
        ):
            yield http


@contextmanager
def client_of_two(base: Path, adapters: Path, cache: Path) -> Iterator[httpx.Client]:
    """The same of our engine in float32, with the adapters `one` and `two` of a folder."""
    options = Options(
        adapters={name: str(adapters / name) for name in ("one", "two")}, engine="lighten",
        served_name="base", storage="f32", slots=3, threads=1, context=128,
    )  # fmt: skip
    with client_of(base, cache, options) as http:
        yield http


@contextmanager
def serving(
    *words: str,
    cache: Path,
    env: dict[str, str] | None = None,
    threads: int | None = 1,
    cwd: Path | None = None,
) -> Iterator[Server]:
    """`lighten serve` as a process of its own, ready."""
    thread_flags = [] if threads is None else ["--threads", str(threads)]
    process = subprocess.Popen(
        [sys.executable, "-m", "lighten", "serve", *words, "--port", "0", *thread_flags],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=cwd,
        env={**os.environ, "LIGHTEN_CACHE": str(cache), "LIGHTEN_ADMIN_KEY": ADMIN, **(env or {})},
    )
    server = Server(process)

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            server.lines.append(line.rstrip())

    threading.Thread(target=read, daemon=True).start()
    try:
        deadline = time.monotonic() + 300
        while not any("ready after" in line for line in server.lines):
            assert process.poll() is None, server.lines
            assert time.monotonic() < deadline, server.lines
            time.sleep(0.05)
        address = re.search(r"listening at (http://\S+)", "\n".join(server.lines))
        assert address is not None
        server.url = address[1]
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=40)


def ask(server: Server, model: str, question: str, **options: Any) -> Any:
    """One greedy answer."""
    settings: dict[str, Any] = {"max_completion_tokens": 8, "temperature": 0, **options}
    messages: Any = [{"role": "user", "content": question}]
    return server.client().chat.completions.create(model=model, messages=messages, **settings)


def by_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """The `response_format` of answers that follow a JSON schema."""
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}


def text(server: Server, model: str, question: str, **options: Any) -> str:
    return str(ask(server, model, question, **options).choices[0].message.content)
