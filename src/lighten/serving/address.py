"""The address that a server listens at: taken before anything that takes long."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from lighten.errors import UserError

_BACKLOG = 2048  # uvicorn's


@contextmanager
def bound(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Sockets at every address of a host, as asyncio opens them: bound, and not listening yet.

    Until they listen clients are refused, which they understand, and not kept waiting.

    Args:
        host: A name or an address.
        port: 0 for one that is free, the same at all addresses.

    Yields:
        The sockets, which are closed in the end.

    Raises:
        UserError: The port is another program's, or the host is not this machine.
    """
    try:
        found = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise UserError(f"--host {host} is no address: {error.strerror}") from error
    with ExitStack() as stack:
        sockets: list[socket.socket] = []
        for family, kind, protocol, _, address in dict.fromkeys(found):
            number = sockets[0].getsockname()[1] if sockets else port
            try:
                opened = stack.enter_context(socket.socket(family, kind, protocol))
                if os.name == "posix":  # Windows would let two programs have one port by it
                    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:  # IPv4 has a socket of its own
                    opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                opened.bind((address[0], number, *address[2:]))
            except OSError as error:
                # A name may have addresses of a family that this machine is set up without.
                if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    continue
                raise _refused(host, number, error) from error
            sockets.append(opened)
        if not sockets:
            raise UserError(f"--host {host} is no address of this machine")
        yield sockets


def listen(sockets: list[socket.socket], host: str, port: int) -> None:
    """Begin to listen; requests wait until they are answered.

    Raises:
        UserError: Another program began to since the sockets were bound.
    """
    for opened in sockets:
        try:
            opened.listen(_BACKLOG)
        except OSError as error:
            raise _refused(host, port, error) from error


def _refused(host: str, port: int, error: OSError) -> UserError:
    if error.errno == errno.EADDRINUSE:
        return UserError(
            f"port {port} of {host} is in use by another program; choose another --port"
        )
    if error.errno == errno.EACCES:
        return UserError(f"port {port} of {host} is not this user's to take; choose another --port")
    return UserError(f"port {port} of {host} cannot be listened at: {error.strerror}")
