"""A client of OpenAI-compatible servers, ours or another, with Python's own HTTP."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lighten.errors import UserError

# What stands for itself in a path, a letter that is written by its number among it (RFC 3986).
_IN_PATHS = "/%:@!$&'()*+,;=~"


class ServerError(Exception):
    """The server answered with an error.

    Attributes:
        status: Of HTTP; 0 where it did not answer at all.
        code: What OpenAI's servers call it.
        param: The field that it is about.
    """

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


@dataclass
class Streamed:
    """What came of one streamed answer.

    Attributes:
        text: The answer.
        began: `time.perf_counter()` when it was asked.
        arrivals: The same, of each part that held text.
        tokens: Tokens generated, as the server counts.
        prompt_tokens: Tokens of the prompt, as the server counts.
        counted: Whether it told these counts.
        finish: Why it ended.
    """

    text: str = ""
    began: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0
    counted: bool = False
    finish: str | None = None


class Remote:
    """A server at an address.

    Args:
        url: `http://host:port`, with or without `/v1`; of `user:password@` before the host, basic
            authentication (RFC 7617), which a key takes the place of.
        key: Sent as a bearer token.
        timeout_s: For each answer.

    Raises:
        UserError: No address, or a key that no header holds.
    """

    def __init__(self, url: str, key: str | None = None, timeout_s: float = 600.0) -> None:
        try:
            parts = urllib.parse.urlsplit(url if "//" in url else f"http://{url}")
            named = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port that is no number, half of a bracket
            named = False
        if not named:
            raise UserError(f"{url!r} is no address of a server; write http://127.0.0.1:8000")
        user, _, place = parts.netloc.rpartition("@")
        self.url = f"{parts.scheme}://{place}"  # it is shown and written down, without a password
        self._parts, self._timeout_s = parts, timeout_s
        path = urllib.parse.quote(parts.path, safe=_IN_PATHS)
        self._path = path.rstrip("/").removesuffix("/v1")
        self._headers: dict[str, str | bytes] = {"Content-Type": "application/json"}
        if key and (key := key.strip()):  # a file's last line may end as on Windows
            if not key.isprintable():
                raise UserError("the server's key holds an end of line or another control sign")
            self._headers["Authorization"] = f"Bearer {key}".encode()
        elif user:
            credentials = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
            self._headers["Authorization"] = f"Basic {credentials}"

    def models(self) -> dict[str, str | None]:
        """Parent by name; that of the base is None.

        Raises:
            UserError: It does not answer, or not so.
        """
        try:
            listed = self.request("GET", "/v1/models")["data"]
            return {model["id"]: model.get("parent") for model in listed}
        except (ServerError, LookupError, TypeError, ValueError) as error:
            key = "; set LIGHTEN_API_KEY" if getattr(error, "status", 0) in (401, 403) else ""
            raise UserError(f"{self.url} does not list its models: {error}{key}") from error

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON that a request is answered with.

        Raises:
            ServerError: It is an error.
        """
        with self._open(method, path, body) as response, self._telling():
            return json.loads(response.read())

    def chat(self, model: str, messages: Sequence[dict[str, str]], **options: Any) -> Any:
        """A whole answer.

        Raises:
            ServerError: It is an error.
        """
        body = {"model": model, "messages": list(messages), **options}
        return self.request("POST", "/v1/chat/completions", body)

    def stream(
        self, model: str, messages: Sequence[dict[str, str]], answer: Streamed, **options: Any
    ) -> Iterator[str]:
        """An answer's parts as they come.

        Args:
            model: Who answers.
            messages: The conversation.
            answer: Filled on the way.
            options: More of the request's fields.

        Raises:
            ServerError: It is an error.
        """
        body = {"model": model, "messages": list(messages), "stream": True,
                "stream_options": {"include_usage": True}, **options}  # fmt: skip
        answer.began = time.perf_counter()
        with self._open("POST", "/v1/chat/completions", body) as response, self._telling():
            ended = False
            while line := response.readline():
                if not line.startswith(b"data:"):
                    continue
                if (data := line[5:].strip()) == b"[DONE]":
                    ended = True
                    break
                event = json.loads(data)
                if "error" in event:
                    raise ServerError(500, str(event["error"].get("message", event["error"])))
                if usage := event.get("usage"):
                    answer.tokens = usage["completion_tokens"]
                    answer.prompt_tokens = usage["prompt_tokens"]
                    answer.counted = True
                for choice in event["choices"]:
                    answer.finish = choice.get("finish_reason") or answer.finish
                    if text := choice["delta"].get("content"):
                        answer.arrivals.append(time.perf_counter())
                        answer.text += text
                        yield text
            if not ended:
                raise ServerError(0, "the stream broke off")

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Tell a connection that breaks, and an answer that is not as OpenAI's, as an error."""
        try:
            yield
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(0, f"{self.url} broke off its answer: {error!r}") from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ServerError(
                0, f"{self.url} does not answer as OpenAI's server: {error!r}"
            ) from error

    def _open(self, method: str, path: str, body: Any) -> http.client.HTTPResponse:
        connection_class = (
            http.client.HTTPSConnection
            if self._parts.scheme == "https"
            else http.client.HTTPConnection
        )
        connection = connection_class(
            str(self._parts.hostname), self._parts.port, timeout=self._timeout_s
        )
        content = None if body is None else json.dumps(body).encode()
        headers = {**self._headers, "Connection": "close"}
        try:
            connection.request(method, self._path + path, content, headers)
            response = connection.getresponse()
        # The last of a name that DNS has no form for.
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            connection.close()
            raise ServerError(0, f"{self.url} does not answer: {error}") from error
        if response.status != 200:
            with self._telling(), response:
                error_body = response.read()
            raise _error(response.status, error_body)
        return response


def _error(status: int, body: bytes) -> ServerError:
    try:
        error = json.loads(body)["error"]
        return ServerError(
            status, str(error["message"]), code=error.get("code"), param=error.get("param")
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return ServerError(status, body.decode(errors="replace")[:500])
