"""HTTP to an engine over its Unix socket, as little of it as an engine's server speaks.

A general client costs a fifth of a millisecond for each token of each stream, in the process that
every answer goes through; reading the lines of a chunked body costs a tenth of that.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

from lighten.serving.engine import EngineFailed

_LARGEST_LINE = 64 * 2**20  # bytes; an event with many log-probabilities is long


class WireError(EngineFailed):
    """An engine's server answered with an error, or hung up.

    Attributes:
        status: Of HTTP; 0: it hung up, or was not there.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def available() -> bool:
    """Whether the system has Unix sockets, as Python knows them: not on Windows."""
    return hasattr(asyncio, "open_unix_connection")


async def get(socket: Path, path: str) -> tuple[int, bytes]:
    """Status and body of a GET request."""
    return await _exchange(
        socket, f"GET {path} HTTP/1.1\r\nHost: engine\r\nConnection: close\r\n\r\n"
    )


async def request(socket: Path, path: str, body: Any) -> tuple[int, str]:
    """Status of a POST request, and its body or the message of the error in it."""
    status, text = await _posted(socket, path, body)
    return status, text.decode(errors="replace") if status == 200 else _error_message(text)


async def _posted(socket: Path, path: str, body: Any) -> tuple[int, bytes]:
    content = json.dumps(body)
    return await _exchange(
        socket,
        f"POST {path} HTTP/1.1\r\nHost: engine\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n{content}",
    )


async def post(socket: Path, path: str, body: Any) -> list[Any]:
    """The `tokens` that a request is answered with."""
    status, text = await _posted(socket, path, body)
    if status != 200:
        raise WireError(status, _error_message(text))
    tokens: list[Any] = json.loads(text)["tokens"]
    return tokens


async def post_stream(socket: Path, path: str, body: Any) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a streamed answer; closing the iterator hangs up, which stops the engine.

    Raises:
        WireError: The connection broke, or the engine answered with an error.
    """
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: engine\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    reader, writer = await _connect(socket)
    try:
        writer.write(head.encode() + content)
        await writer.drain()
        status, chunked = await _head(reader)
        if status != 200:
            text = await _body(reader, chunked)
            raise WireError(status, _error_message(text))
        async for line in _lines(reader, chunked):
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                yield json.loads(line[6:])
            elif line.startswith(b"error: "):
                event = json.loads(line[7:])
                raise WireError(int(event.get("code", 500)), str(event.get("message", event)))
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        raise WireError(0, f"the engine hung up: {error}") from error
    finally:
        writer.close()


async def _connect(socket: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    try:
        return await asyncio.open_unix_connection(str(socket), limit=_LARGEST_LINE)
    except OSError as error:
        raise WireError(0, f"the engine does not answer: {error}") from error


async def _exchange(socket: Path, request: str) -> tuple[int, bytes]:
    reader, writer = await _connect(socket)
    try:
        writer.write(request.encode())
        status, chunked = await _head(reader)
        return status, await _body(reader, chunked)
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        raise WireError(0, f"the engine hung up: {error}") from error
    finally:
        writer.close()


async def _head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """Status of a response, and whether its body comes in chunks."""
    first = await reader.readline()
    if not first:
        raise WireError(0, "the engine hung up before it answered")
    status, chunked = int(first.split(b" ", 2)[1]), False
    while (line := (await reader.readline()).strip()) != b"":
        chunked |= line.lower() == b"transfer-encoding: chunked"
    return status, chunked


async def _body(reader: asyncio.StreamReader, chunked: bool) -> bytes:
    if not chunked:
        return await reader.read()
    return b"".join([chunk async for chunk in _chunks(reader)])


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readline()).split(b";")[0] or b"x", 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _lines(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    if not chunked:
        while line := await reader.readline():
            yield line.rstrip(b"\r\n")
        return
    rest = b""
    async for chunk in _chunks(reader):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r")
    if rest:
        yield rest


def _error_message(text: bytes) -> str:
    """The message of an error's body."""
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = text.decode(errors="replace")
    return str(message)
