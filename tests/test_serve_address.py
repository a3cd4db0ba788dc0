"""A port is looked at before the base is: another program's is told at once, in one sentence."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("xllamacpp")
pytest.importorskip("uvicorn")

import lighten.api
from lighten.errors import UserError
from lighten.serving import address


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
