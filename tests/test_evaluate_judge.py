"""A model as judge: asked in both orders over a real HTTP server, ties counted, mistakes told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import lighten
from lighten.errors import UserError
from lighten.evaluation import judge
from lighten.evaluation.judge import Judge, judged

Opinion = Callable[[str, str], str]  # of the answers A and B, in their order


class _Server:
    """Answers chat completions with an opinion of ours, and keeps what it was asked."""

    def __init__(self) -> None:
        self.opinion: Opinion = lambda first, second: "tie"
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.retry_after: str | None = "0"
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append(body)
                server.keys.append(self.headers["Authorization"])
                text = body["messages"][0]["content"]
                first = text.split("[Answer A]\n")[1].split("\n\n[Answer B]")[0]
                second = text.split("[Answer B]\n")[1].split("\n\nReply")[0]
                verdict = server.opinion(first, second)
                ok = verdict not in ("refuse", "busy")
                answer = {"choices": [{"message": {"content": verdict}}]}
                data = json.dumps(answer if ok else {"error": "no such model"}).encode()
                if verdict.startswith("{"):
                    data = verdict.encode()
                self.send_response(200 if ok else 404 if verdict == "refuse" else 429)
                if verdict == "busy" and server.retry_after is not None:
                    self.send_header("Retry-After", server.retry_after)
                more = 9 if verdict == "cut off" else 0
                self.send_header("Content-Length", str(len(data) + more))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[_Server]:
    judge_server = _Server()
    yield judge_server
    judge_server.http.shutdown()
    judge_server.http.server_close()


def ask(server: _Server, ours: list[str], base: list[str]) -> dict[str, Any]:
    texts = ["?"] * len(ours)
    return judged(Judge(server.url, "judge"), texts, texts, ours, base, samples=500, seed=0)


def test_a_better_answer_wins_in_either_order(server: _Server) -> None:
    server.opinion = lambda first, second: "A" if len(first) > len(second) else "B"
    ours = ["long answer"] * 15 + ["x"] * 5 + ["same"] * 4
    base = ["short"] * 15 + ["longer"] * 5 + ["same"] * 4
    judgement = ask(server, ours, base)
    assert (judgement["wins"], judgement["losses"], judgement["ties"]) == (15, 5, 4)
    assert (judgement["swapped"], judgement["unclear"]) == (0, 0)
    assert judgement["rate"]["value"] == pytest.approx(100 * (15 + 2) / 24)
    assert judgement["rate"]["low"] < judgement["rate"]["value"] < judgement["rate"]["high"]
    assert len(server.requests) == 2 * 20  # answers that are the same are not sent
    assert all(
        request["temperature"] == 0 and request["model"] == "judge" for request in server.requests
    )


def test_a_judge_that_follows_the_order_has_no_opinion(server: _Server) -> None:
    server.opinion = lambda *_: "A"
    judgement = ask(server, ["x"] * 24, ["y"] * 24)
    assert (judgement["wins"], judgement["losses"], judgement["ties"], judgement["swapped"]) == (
        0,
        0,
        24,
        24,
    )
    assert judgement["verdict"] == "no difference found"
    server.opinion = lambda *_: "I cannot say"
    undecided = ask(server, ["x"] * 24, ["y"] * 24)
    assert (undecided["unclear"], undecided["verdict"]) == (24, "not judged")


@pytest.mark.parametrize(
    ("reply", "choice"),
    [("It is a tie.", "tie"), ("A tie", "tie"), ("b", "B"), ("**A**", "A"), ("Answer B.", "B"),
     ("As a judge, I prefer B", "B"), ("I cannot say", None), ("Neither is a good one", None),
     ("<think>\nIs Answer A right?", None), ("<think>A?</think>\n\nB", "B")],
)  # fmt: skip
def test_a_reply_in_words_is_read_as_it_is_meant(
    reply: str, choice: str | None, server: _Server
) -> None:
    server.opinion = lambda *_: reply
    assert Judge(server.url, "judge").ask("?", "", "x", "y") == choice


def test_a_key_is_sent_and_what_is_wrong_is_told(
    server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    ask(server, ["x"], ["y"])
    assert server.keys == ["Bearer a-key"] * 2
    server.opinion = lambda *_: "refuse"
    with pytest.raises(UserError, match=r"answered 404: .*no such model"):
        ask(server, ["x"], ["y"])
    with pytest.raises(UserError, match=r"cannot be reached: \[Errno 111\] "):
        Judge("http://127.0.0.1:9/v1", "judge").ask("", "", "", "")
    with pytest.raises(UserError, match="is no address"):
        Judge("somewhere", "judge").ask("", "", "", "")


def test_a_judge_that_counts_requests_is_waited_for(
    server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies = iter(["busy", "busy", "A"])
    server.opinion = lambda *_: next(replies)
    waits: list[float] = []
    monkeypatch.setattr(judge.time, "sleep", waits.append)
    assert Judge(server.url, "judge").ask("?", "", "x", "y") == "A"
    assert waits == [0.0, 0.0]
    # Without a word of when, later and later; in the end it is told.
    server.opinion, server.retry_after = lambda *_: "busy", None
    waits.clear()
    with pytest.raises(UserError, match="answered 429"):
        Judge(server.url, "judge").ask("?", "", "x", "y")
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0]


@pytest.mark.parametrize(
    ("reply", "message"),
    [("cut off", "cannot be reached: IncompleteRead"), ("{}", "gave no chat completion"),
     ('{"choices": [', "gave no chat completion")],
)  # fmt: skip
def test_rubbish_from_a_server_is_one_sentence(reply: str, message: str, server: _Server) -> None:
    server.opinion = lambda *_: reply
    with pytest.raises(UserError, match=message):
        Judge(server.url, "judge").ask("?", "", "x", "y")


def test_a_broken_address_is_one_sentence() -> None:
    with pytest.raises(UserError, match="is no address"):
        Judge("http://127.0.0.1:port/v1", "judge").ask("?", "", "x", "y")


def test_an_evaluation_is_judged(
    server: _Server, tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    server.opinion = lambda *_: "B"
    run = lighten.train(
        model=str(tiny_folder), dataset=str(chat_file), dtype="float32", max_steps=4, val_size=8,
        learning_rate=5e-2, output_dir=str(tmp_path / "run"), progress=False,
    )  # fmt: skip
    with pytest.raises(UserError, match="give both"):
        lighten.evaluate(run, judge=server.url)
    # A judge that is not there is told before anything is measured; one that fails later takes
    # nothing of what was measured along.
    how: Any = {"judge": server.url, "judge_model": "judge", "max_examples": 4, "max_new_tokens": 3}
    server.opinion = lambda *_: "refuse"
    with pytest.raises(UserError, match="answered 404"):
        lighten.evaluate(run, **how)
    assert not (run.folder / "evaluation.json").exists()
    replies = iter(["A"])
    server.opinion = lambda *_: next(replies, "refuse")
    with pytest.raises(UserError, match=r"answered 404: .*; all else that was measured is in"):
        lighten.evaluate(run, **how)
    assert json.loads((run.folder / "evaluation.json").read_text())["judged"] == []
    server.requests.clear()
    server.opinion = lambda *_: "B"
    evaluation = lighten.evaluate(
        run, judge=server.url, judge_model="judge", max_examples=4, max_new_tokens=3
    )
    (judgement,) = evaluation.judged
    assert judgement["adapter"] == "default"
    assert judgement["ties"] == 4
    stored = json.loads((run.folder / "evaluation.json").read_text())
    assert stored["judged"][0]["swapped"] == len(server.requests) // 2
    assert stored["settings"]["judge_model"] == "judge"
