"""Where a server listens: a port is looked at before the base; and from where it may be started."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("xllamacpp")
pytest.importorskip("uvicorn")

import lighten.api
from lighten.errors import UserError
from lighten.serving import address, running
from lighten.serving.options import Options
from tests.processes import Forked


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def test_a_port_in_use_is_told_before_the_base_is_read(taken_port: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")  # what it would stumble over, were it read first
    lines: list[str] = []
    with pytest.raises(UserError, match=rf"port {taken_port} of 127\.0\.0\.1 is in use"):
        lighten.api.serve(str(tmp_path), port=taken_port, log=lines.append)
    assert lines == []


def test_a_free_port_is_the_same_at_all_addresses_of_a_name() -> None:
    with address.bound("localhost", 0) as sockets:
        assert len({opened.getsockname()[1] for opened in sockets}) == 1
        assert sockets[0].getsockname()[1] > 0
        assert "127.0.0.1" in {opened.getsockname()[0] for opened in sockets}


def test_no_port_is_shared_where_a_used_address_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere the option frees what a server that ended held; on Windows it shares the port."""
    for system, reused in (("posix", True), ("nt", False)):
        monkeypatch.setattr(address, "os", SimpleNamespace(name=system))
        with address.bound("127.0.0.1", 0) as (opened,):
            assert bool(opened.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)) == reused


def test_clients_are_refused_until_it_listens_and_whoever_is_second_then() -> None:
    with address.bound("127.0.0.1", 0) as sockets:
        port = sockets[0].getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        with address.bound("127.0.0.1", port) as begun_together:
            address.listen(sockets, "127.0.0.1", port)
            socket.create_connection(("127.0.0.1", port)).close()
            with pytest.raises(UserError, match="is in use by another program"):
                address.listen(begun_together, "127.0.0.1", port)
    with address.bound("127.0.0.1", port):  # it was given back
        pass


@pytest.mark.parametrize(
    ("host", "message"),
    [("192.0.2.1", "--host 192.0.2.1 is no address of this machine"),  # of RFC 5737, nobody's
     ("no host", "--host no host is no address")],
)  # fmt: skip
def test_a_host_that_is_not_this_machine_is_told(host: str, message: str) -> None:
    with pytest.raises(UserError, match=message), address.bound(host, 0):
        pass


def test_a_program_serves_in_a_thread(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no signal comes."""
    servers: list[Any] = []
    listening, ready, lines = running._listening, threading.Event(), list[str]()

    def kept(*words: Any) -> Any:
        servers.append(listening(*words))
        return servers[0]

    def log(line: str) -> None:
        lines.append(line)
        if line.startswith("ready"):
            ready.set()

    monkeypatch.setattr(running, "_listening", kept)
    options = Options(engine="lighten", storage="f32", port=0, threads=1)
    thread = threading.Thread(
        target=running.serve, args=(str(tiny_folder), options, log), daemon=True
    )
    thread.start()
    assert ready.wait(60), lines
    (url,) = (line.split()[-1] for line in lines if line.startswith("listening"))
    assert httpx.get(f"{url}/ready").json() == {"ready": True}
    servers[0].should_exit = True
    thread.join(60)
    assert not thread.is_alive()


BEGINS = """
import sys, time
from lighten.serving import running
from lighten.serving.options import Options
def prepare(*_):
    try:
        print("converting", flush=True)
        time.sleep(60)
    finally:
        print("cleared away", flush=True)
running.prepare = prepare
running.serve("base", Options(port=0), print)
"""


def test_a_server_that_is_stopped_before_it_serves_clears_away() -> None:
    """By SIGTERM: unhandled, it does not end a container's first process, and clears nothing."""
    process = subprocess.Popen([sys.executable, "-c", BEGINS], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "converting\n"
    process.terminate()
    assert process.communicate(timeout=60)[0] == "cleared away\n"
    assert process.returncode == 0


def test_a_notebooks_cell_serves_until_it_is_interrupted(tiny_folder: Path) -> None:
    """An event loop runs there already."""
    process = Forked(serve_in_a_cell, (str(tiny_folder),))
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def serve_in_a_cell(base: str) -> None:
    def log(line: str) -> None:
        if line.startswith("ready"):
            os.kill(os.getpid(), signal.SIGINT)

    async def cell() -> None:
        lighten.api.serve(base, engine="lighten", storage="f32", port=0, threads=1, log=log)

    asyncio.run(cell())
