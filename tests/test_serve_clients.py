"""`chat --url` and `bench serve` at servers that break off, or do not answer as OpenAI's."""

from __future__ import annotations

import http.server
import io
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

import lighten.api
from lighten.cli.serve import _client_key, _flags
from lighten.errors import UserError
from lighten.serving.checks import identity
from lighten.serving.load import Load, lengths, run, series
from lighten.serving.remote import Remote, ServerError, Streamed
from lighten.serving.talk import talk
from tests import local_server

EVENT = b'data: {"choices": [{"index": 0, "delta": {"content": "begun"}}]}\n\n'
MODELS = {"data": [{"id": "it"}]}
ADAPTERS = {"data": [{"id": "it"}, {"id": "one", "parent": "it"}, {"id": "two", "parent": "it"}]}


@contextmanager
def answering(answer: Callable[[bytes, Any], bytes]) -> Iterator[str]:
    """A server that writes what it is told for each request, and hangs up."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as reader:
                path, size = reader.readline().split()[1], 0
                while (line := reader.readline().strip()) != b"":
                    if line.lower().startswith(b"content-length:"):
                        size = int(line.split()[1])
                connection.sendall(answer(path, json.loads(reader.read(size) or b"null")))

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()


def refused(message: str) -> bytes:
    text = json.dumps({"error": {"message": message}}).encode()
    return b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text)


def whole(body: Any) -> bytes:
    text = json.dumps(body).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text)


def spoken(content: str) -> bytes:
    """A whole answer."""
    message = {"role": "assistant", "content": content}
    return whole({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                  "usage": {"prompt_tokens": 1, "completion_tokens": 2}})  # fmt: skip


def streamed(parts: int = 1, finish: str = "stop", **usage: int) -> bytes:
    """A stream of so many parts, with its counts where there are some."""
    choice = {"index": 0, "delta": {}, "finish_reason": finish}
    ends = [{"choices": [choice]}, *([{"choices": [], "usage": usage}] if usage else [])]
    end = b"".join(b"data: %b\n\n" % json.dumps(event).encode() for event in ends)
    text = EVENT * parts + end + b"data: [DONE]\n\n"
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text)


def broken_off(path: bytes, _: Any) -> bytes:
    """Its models; and of a stream the first event and the beginning of another."""
    if path == b"/v1/models":
        return whole(MODELS)
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"%x\r\n%b\r\n40\r\ndata: " % (len(EVENT), EVENT)


@pytest.mark.parametrize(
    "answer",
    [
        broken_off,
        lambda path, _: whole(MODELS) if path == b"/v1/models" else whole({})[:-2] + b"x",
        lambda path, _: whole(MODELS) if path == b"/v1/models"
        else b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\ndata: [1,2]\n",
    ],
    ids=["broken off", "no end", "another form"],
)  # fmt: skip
def test_a_stream_that_breaks_is_told(answer: Callable[[bytes, Any], bytes]) -> None:
    with answering(answer) as url:
        with pytest.raises(ServerError):
            for _ in Remote(url).stream("it", [], Streamed()):
                pass
        out = io.StringIO()
        talk(url, lines=io.StringIO("hello\n/exit\n"), out=out)
    assert url in out.getvalue() or "broke off" in out.getvalue()


def test_events_of_a_stream_may_stand_close_to_their_name() -> None:
    """The space after `data:` is a server's to leave out."""
    stream = EVENT.replace(b"data: ", b"data:") + b"data:[DONE]\n\n"
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(stream)
    with answering(lambda *_: head + stream) as url:
        assert list(Remote(url).stream("it", [], Streamed())) == ["begun"]


@pytest.mark.parametrize("url", ["http://here:80a", "http://[::1", "ftp://here", "http://:80", ""])
def test_an_address_that_is_none_is_told(url: str) -> None:
    with pytest.raises(UserError, match="is no address of a server"):
        Remote(url)


@pytest.mark.parametrize(
    ("user", "key", "sent"),
    [
        ("", "한글", "Bearer 한글"),
        ("", "abc\r\n", "Bearer abc"),
        ("", " \n", None),
        ("", None, None),
        ("me:p%40ss@", None, "Basic bWU6cEBzcw=="),  # a proxy's before the server
        ("me:p%40ss@", "abc", "Bearer abc"),
    ],
)
def test_a_key_of_any_letters_is_sent_as_the_server_reads_it(
    user: str, key: str | None, sent: str | None
) -> None:
    came: list[str | None] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            words = self.headers["Authorization"]
            came.append(words and words.encode("latin-1").decode())
            self.wfile.write(whole(MODELS))

        def log_message(self, *_: Any) -> None: ...

    with local_server.serving(Handler) as url:
        remote = Remote(url.replace("//", f"//{user}"), key)
        assert remote.models() == {"it": None}
    assert came == [sent]
    assert remote.url == url


def test_a_key_that_no_header_holds_is_told_and_not_shown() -> None:
    with pytest.raises(UserError, match="control sign") as refusal:
        Remote("http://127.0.0.1:9", "first\nsecond")
    assert "first" not in str(refusal.value)


def test_the_first_of_several_keys_is_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the server's own environment, where each of them is one."""
    monkeypatch.setenv("LIGHTEN_API_KEY", " old, new\n")
    assert _client_key() == "old"
    monkeypatch.delenv("LIGHTEN_API_KEY")
    assert _client_key() is None


def test_an_address_of_any_letters_is_asked_or_told() -> None:
    paths: list[bytes] = []

    def answer(path: bytes, _: Any) -> bytes:
        paths.append(path)
        return whole(MODELS)

    with answering(answer) as url:
        assert Remote(f"{url}/한 글%20/v1").models() == {"it": None}
    assert paths == [b"/%ED%95%9C%20%EA%B8%80%20/v1/models"]
    with pytest.raises(UserError, match="does not answer"):
        Remote(f"http://{'a' * 70}.invalid").models()  # of 63 letters at most, says DNS


def test_where_a_missing_key_belongs_is_told() -> None:
    body = json.dumps({"error": {"message": "a key is missing"}}).encode()
    head = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: %d\r\n\r\n" % len(body)
    with (
        answering(lambda *_: head + body) as url,
        pytest.raises(UserError, match="LIGHTEN_API_KEY"),
    ):
        Remote(url).models()
    with answering(lambda *_: head) as url, pytest.raises(UserError, match="broke off"):
        Remote(url).models()


def test_a_load_ends_though_every_stream_breaks() -> None:
    with answering(broken_off) as url:
        outcomes: list[Any] = []
        load = Load(requests=4, clients=2, prompt_words=1, max_tokens=1)
        thread = threading.Thread(
            target=lambda: outcomes.append(run(Remote(url), "base", ["it"], load)), daemon=True
        )
        thread.start()
        thread.join(20)
    (outcome,) = outcomes
    assert (outcome.answered, sum(outcome.errors.values())) == (0, 4)


def test_a_server_that_drops_log_probabilities_fails_that_check(tmp_path: Path) -> None:
    """As many do: the answer is 200 and says nothing of what was asked for."""

    def careless(path: bytes, body: Any) -> bytes:
        if path == b"/v1/models":
            return whole(MODELS)
        if body.get("stream"):
            return streamed(completion_tokens=1, prompt_tokens=1)
        return spoken("the same")

    with answering(careless) as url:
        result = lighten.api.bench_serve(
            url, requests=2, clients=1, prompt_words=1, max_tokens=1, identity_requests=2
        )
    passed = {check["name"]: check["passed"] for check in result["checks"]}
    assert not passed["logprobs"]
    assert passed["stream_options"]
    assert result["identity"]["same"] == 2


def test_no_prompt_of_a_load_begins_as_one_before() -> None:
    """A server's cache of prompts would answer the later ones; their words stay the same."""
    prompts: list[str] = []

    def listening(path: bytes, body: Any) -> bytes:
        if path == b"/v1/models":
            return whole(ADAPTERS)
        prompts.append(body["messages"][0]["content"])
        return streamed(completion_tokens=1, prompt_tokens=1)

    loads, load = 4, Load(requests=3, clients=1, prompt_words=4, max_tokens=1)
    with answering(listening) as url:
        for _ in range(2):
            assert len(series(Remote(url), load)) == loads
    sent = [prompt for prompt in prompts if ": " in prompt]
    assert len({prompt[:8] for prompt in sent}) == 2 * loads
    assert len({prompt.split(": ")[0] for prompt in sent}) == len(sent) == 2 * loads * 3
    assert len({prompt.split(": ")[1] for prompt in sent}) == 3


def test_a_server_that_counts_no_tokens_in_streams_is_told(tmp_path: Path) -> None:
    """No rate is 0 for that: parts of streams are counted, and called so."""

    def uncounted(_: bytes, body: Any) -> bytes:
        if body is None:
            return whole(MODELS)
        if body.get("stream"):
            return streamed(parts=3)
        return spoken("begun")

    lines: list[str] = []
    with answering(uncounted) as url:
        result = lighten.api.bench_serve(
            url, requests=2, clients=1, prompt_words=1, max_tokens=3, identity_requests=2,
            output_dir=tmp_path, log=lines.append,
        )  # fmt: skip
    (load,) = result["loads"]
    assert (load["tokens"], load["prompt_tokens"], load["tokens_per_s"]) == (None, None, None)
    assert load["parts"] == 6
    assert load["parts_per_s"] == 6 / load["seconds"]
    passed = {check["name"]: check["passed"] for check in result["checks"]}
    assert not passed["stream_options"]
    assert "parts of streams/s (the server counts no tokens)" in lines[-1]
    assert "parts of streams/s" in (tmp_path / "bench-serve.svg").read_text()


def test_another_models_answer_is_told_without_log_probabilities_too() -> None:
    """By its text; what is no model's text is not taken for rounding either."""
    requests = itertools.count()
    mixed = {"one": "two's", "two": "nobody's", "it": "it's"}

    def mixed_up(_: bytes, body: Any) -> bytes:
        # The first twelve are each model alone: four questions of three.
        return spoken(f"{body['model']}'s" if next(requests) < 12 else mixed[body["model"]])

    with answering(mixed_up) as url:
        report = identity(Remote(url), ["it", "one", "two"], requests=12, clients=1)
    assert (report.same, report.rounding, report.wrong, report.unclear) == (4, 0, 4, 4)


@pytest.mark.parametrize(
    ("popularity", "loads"),
    [("uniform", {"base": 0, "1 adapter": 1, "2 adapters": 2, "base and adapters": 2}),
     ("one", {"base": 0, "1 adapter": 1})],
)  # fmt: skip
def test_a_load_tells_how_many_adapters_it_asks(
    popularity: Literal["uniform", "one"], loads: dict[str, int]
) -> None:
    """The base is none of them; and where one alone is asked, no load is called one of several."""
    load = Load(requests=1, clients=1, prompt_words=1, max_tokens=1, popularity=popularity)
    with answering(immediate) as url:
        outcomes = series(Remote(url), load)
    assert {outcome.what: outcome.adapters for outcome in outcomes} == loads


@pytest.mark.parametrize("field", ["applied", "dropped", "refused"])
def test_answers_of_all_loads_are_of_one_length_or_are_told_not_to_be(field: str) -> None:
    """`ignore_eos` is sent where a server takes it: one adapter's short answers are no speed."""
    streams: list[Any] = []

    def ending(_: bytes, body: Any) -> bytes:
        if body is None:
            return whole(ADAPTERS)
        if body.get("stream"):
            streams.append(body)
        if body.get("ignore_eos") and field == "refused":
            return refused("ignore_eos is not known")
        if body.get("ignore_eos") and field == "applied":
            return streamed(finish="length", completion_tokens=8, prompt_tokens=1)
        count = 2 if body["model"] == "it" else 5
        return streamed(completion_tokens=count, prompt_tokens=1)

    load = Load(requests=2, clients=1, prompt_words=1, max_tokens=8)
    with answering(ending) as url:
        outcomes = series(Remote(url), load)
    assert all(body["temperature"] == 0 for body in streams)
    sent = [bool(body.get("ignore_eos")) for body in streams[1:]]  # after the one that tries it
    assert sent == [field == "applied"] * len(outcomes) * 2
    assert [outcome.ignore_eos for outcome in outcomes] == [field == "applied"] * len(outcomes)
    if field == "applied":
        assert {outcome.tokens_per_answer for outcome in outcomes} == {8}
        assert lengths(outcomes) is None
    else:
        assert lengths(outcomes) == (2, 5)


def test_rates_of_answers_of_other_lengths_are_told_not_to_be_comparable() -> None:
    def ending(_: bytes, body: Any) -> bytes:
        if body is None:
            return whole(ADAPTERS)
        count = 2 if body["model"] == "it" else 5
        if body.get("stream"):
            return streamed(completion_tokens=count, prompt_tokens=1)
        return spoken(body["model"])

    lines: list[str] = []
    with answering(ending) as url:
        result = lighten.api.bench_serve(
            url, requests=2, clients=1, prompt_words=1, max_tokens=8, identity_requests=0,
            log=lines.append,
        )  # fmt: skip
    assert not result["comparable"]
    assert "answers are 2.0 to 5.0 tokens long on average" in lines[-1]
    assert "tokens/s (2.0 an answer)" in next(line for line in lines if line.startswith("base:"))


def immediate(_: bytes, body: Any) -> bytes:
    """Its models, and answers of one token at once."""
    return whole(ADAPTERS) if body is None else streamed(completion_tokens=1, prompt_tokens=1)


def test_a_rate_is_reached_though_every_sleep_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(max(seconds, 0.05)))
    load = Load(requests=40, rate=100, prompt_words=1, max_tokens=1)
    with answering(immediate) as url:
        outcome = run(Remote(url), "base", ["it"], load)
    assert outcome.answered == 40
    assert outcome.seconds < 1.2  # one after another they take 2
    assert outcome.sent_per_s is not None
    assert 35 < outcome.sent_per_s < 101


def test_the_first_text_of_a_request_that_waits_for_another_counts_its_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where it waits here, because so many are under way that no client is left for it."""

    def slow(*_: Any) -> bytes:
        time.sleep(0.1)
        return streamed(completion_tokens=1, prompt_tokens=1)

    monkeypatch.setattr("lighten.serving.load._MOST_UNDER_WAY", 1)
    load = Load(requests=5, rate=1000, prompt_words=1, max_tokens=1)
    with answering(slow) as url:
        outcome = run(Remote(url), "base", ["it"], load)
    assert (outcome.first_token_s["p99"] or 0) > 0.45
    assert outcome.sent_per_s is not None
    assert outcome.sent_per_s < 11


def test_a_server_without_models_is_told() -> None:
    with answering(lambda *_: whole({"data": []})) as url, pytest.raises(UserError, match="models"):
        lighten.api.bench_serve(url)


def test_an_engine_flag_that_is_no_yaml_is_told() -> None:
    assert _flags(["n-batch=5"]) == {"n_batch": 5}
    with pytest.raises(UserError, match="YAML"):
        _flags(["n_batch=["])
