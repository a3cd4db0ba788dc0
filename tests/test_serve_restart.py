"""An engine's server process that dies, is slow or does not start; for real, in one event loop."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

pytest.importorskip("xllamacpp")
pytest.importorskip("uvicorn")

from lighten import models, streams
from lighten.errors import UserError
from lighten.serving.answering import Front, Limits
from lighten.serving.cohort import CohortEngine
from lighten.serving.engine import EngineFailed
from lighten.serving.front import application
from lighten.serving.options import Options
from lighten.serving.running import prepare
from lighten.serving.server_process import ServerProcess, Supervisor
from tests.processes import run_async
from tests.serving import ADMIN, save_adapter

# A server that answers /health at the socket it is told, and ends when its standard input does; or
# that ends by itself, with what it wrote, or is never ready.
SERVER = """
import http.server, os, socketserver, sys, threading
path, how = sys.stdin.readline().split()
if how == "fails":
    print("loading", "ValueError: no such model", "a last line", sep="\\n")
    sys.exit(3)
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0))).start()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if how == "never" else 200)
        self.end_headers()
    def address_string(self):
        return "it"
if how == "talks":
    print("x" * 2_000_000, flush=True)
socketserver.UnixStreamServer(path, Handler).serve_forever()
"""


async def started(how: str, within_s: float = 60) -> ServerProcess:
    process = ServerProcess("it")
    await process.start(
        [sys.executable, "-c", SERVER], environment=os.environ,
        first_line=f"{process.socket} {how}\n", within_s=within_s,
    )  # fmt: skip
    return process


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def children(word: str) -> list[psutil.Process]:
    """That run: of a process that has ended and was not waited for yet no words are known."""
    return [
        process for process in psutil.Process().children()
        if process.status() != psutil.STATUS_ZOMBIE and word in " ".join(process.cmdline())
    ]  # fmt: skip


def test_what_a_process_said_last_is_told_when_it_does_not_start() -> None:
    with pytest.raises(UserError, match=r"it could not be started: ValueError: no such model$"):
        run_async(started("fails"))
    with pytest.raises(UserError, match="it was not ready after 1 s"):
        run_async(started("never", within_s=1))
    assert children("socketserver") == []


def test_a_process_starts_where_temporary_files_lie_deep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a cluster, whose jobs have folders of their own: a socket's path has a limit."""
    deep = tmp_path / "job-of-a-user-with-a-long-name.12345678.of-a-cluster" / ("x" * 60)
    deep.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(deep))

    async def run() -> None:
        process = await started("ready")
        assert process.alive
        await process.end()
        assert not process.socket.parent.exists()

    run_async(run())


def test_a_process_that_writes_without_end_of_line_goes_on() -> None:
    async def run() -> Path:
        process = await started("talks")
        folder = process.socket.parent
        assert folder.stat().st_mode & 0o077 == 0
        await process.end()
        return folder

    assert not run_async(run()).exists()


def test_one_that_crashes_again_and_again_is_left_down_until_it_is_exchanged() -> None:
    async def run() -> None:
        how = ["ready"]

        async def start() -> ServerProcess:
            return await started(how[0])

        supervisor = Supervisor("it", start, pause_s=0.01)
        assert supervisor.obstacle() == "it is being started"
        async with supervisor.exchanging:
            await supervisor.exchange()
        for restarts in (1, 2):
            children("socketserver")[0].kill()
            await until(lambda count=restarts: supervisor.restarts == count)  # type: ignore[misc]
            assert supervisor.obstacle() is None
        how[0] = "fails"
        children("socketserver")[0].kill()
        await until(lambda: supervisor.given_up)
        assert "left down" in str(supervisor.obstacle())
        with pytest.raises(EngineFailed, match="left down"):
            supervisor.running()
        how[0] = "ready"
        async with supervisor.exchanging:
            await supervisor.exchange()
        assert supervisor.obstacle() is None
        assert not supervisor.given_up
        await supervisor.stop()
        assert supervisor.processes == 0

    run_async(run())
    assert children("socketserver") == []


def test_a_server_that_is_stopped_while_it_loads_its_base_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loading takes minutes; its progress is where it is called off."""
    begun = threading.Event()

    def load(*_: Any, **__: Any) -> Any:
        begun.set()
        for _ in streams.counted(range(100), "loading weights", 100):
            time.sleep(0.5)

    monkeypatch.setattr(models, "load", load)
    engine = CohortEngine("base", context=16, slots=1)

    async def stopped() -> None:
        starting = asyncio.create_task(engine.start([]))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await engine.stop()

    began = time.monotonic()
    run_async(stopped())
    assert time.monotonic() - began < 20


def test_a_process_that_is_exchanged_ends_after_its_last_answer() -> None:
    async def run() -> None:
        supervisor = Supervisor("it", lambda: started("ready"))
        async with supervisor.exchanging:
            await supervisor.exchange()
            old_process = supervisor.running()
            with old_process.answering():
                await supervisor.exchange()
                await asyncio.sleep(0.05)
                assert supervisor.running() is not old_process
                assert old_process.alive
                assert supervisor.processes == 2
            assert await old_process.ended() == 0
        await until(lambda: supervisor.processes == 1)
        assert supervisor.restarts == 0
        await supervisor.stop()

    run_async(run())


@pytest.mark.parametrize("killed", [True, False])
@pytest.mark.skipif(sys.platform != "linux", reason="the system ends it on Linux alone")
def test_a_command_never_outlives_its_tether(killed: bool) -> None:
    command = [sys.executable, "-m", "lighten.serving.tether", "sleep", "1000"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as tether:
        while not (children := psutil.Process(tether.pid).children()):
            time.sleep(0.01)
        (child,) = children
        while child.name() != "sleep":
            time.sleep(0.01)
        if killed:
            tether.kill()
        else:
            assert tether.stdin is not None
            tether.stdin.close()
        code = tether.wait()
        assert child.wait(timeout=60) is None or not child.is_running()
    assert code == (-signal.SIGKILL if killed else 128 + signal.SIGTERM)


def serve(base: Path, options: Options, work: Callable[..., Awaitable[None]]) -> None:
    """Work with a client of the whole front, and the real engine behind it."""

    async def run() -> None:
        registry, engine = prepare(str(base), options, lambda _: None)
        front = Front(registry, engine, admin_keys=(ADMIN,))
        transport = httpx.ASGITransport(application(front))
        async with httpx.AsyncClient(transport=transport, base_url="http://it") as client:
            assert (await client.get("/ready")).json()["reason"] == "the engine is being started"
            await engine.start(registry.adapters)
            try:
                await front.warm_up()
                await work(client, front)
            finally:
                await engine.stop()

    run_async(run())


def test_llama_cpp_that_is_killed_comes_back_with_its_adapters(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTEN_CACHE", str(tmp_path / "cache"))
    for seed, name in enumerate(("first", "later")):
        save_adapter(tiny_folder, tmp_path / "adapters" / name, seed=seed + 1)

    async def work(client: httpx.AsyncClient, front: Front) -> None:
        async def ask(model: str) -> httpx.Response:
            body: dict[str, Any] = {"model": model, "prompt": "the answer", "temperature": 0}
            return await client.post("/v1/completions", json=body)

        key = {"Authorization": f"Bearer {ADMIN}"}
        body = {"lora_name": "later", "lora_path": "later"}
        loaded = await client.post("/v1/load_lora_adapter", json=body, headers=key)
        assert loaded.status_code == 200, loaded.text
        before = {name: (await ask(name)).json()["choices"] for name in front.registry.models}
        assert len({choices[0]["text"] for choices in before.values()}) == 3
        await until(lambda: len(children("lighten.serving.child")) == 1)
        (child,) = children("lighten.serving.child")
        child.suspend()
        asking = asyncio.create_task(ask("later"))
        await until(lambda: front.answering == 1)
        front.limits = Limits(waiting=1)
        waiting = await ask("later")
        assert (waiting.status_code, waiting.headers["Retry-After"]) == (429, "1")
        child.kill()
        answer = await asking
        assert answer.status_code == 503
        assert "ended while it answered" in answer.json()["error"]["message"]
        await until(lambda: front.engine.facts()["processes"] == 0)
        # Nothing of the start again happens unless this loop lets it: it is down all this while.
        ready, refused = await client.get("/ready"), await ask("later")
        assert ready.status_code == refused.status_code == 503
        assert "code -9 and is being started again" in ready.json()["reason"]
        assert ready.json()["reason"] in refused.json()["error"]["message"]
        assert (await client.get("/health")).status_code == 200  # it comes back by itself
        await until(lambda: front.obstacle() is None)
        assert front.engine.facts()["restarts"] == 1
        after = {name: (await ask(name)).json()["choices"] for name in before}
        assert after == before
        several = await asyncio.gather(*(ask("later") for _ in range(3)))  # one may wait
        assert sorted(answer.status_code for answer in several) == [200, 429, 429]

    options = Options(
        adapters=[str(tmp_path / "adapters" / "first")], engine="llamacpp", served_name="base",
        storage="f32", slots=2, threads=1, adapter_dir=tmp_path / "adapters",
    )  # fmt: skip
    serve(tiny_folder, options, work)
