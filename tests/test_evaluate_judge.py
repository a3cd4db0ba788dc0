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
from lighten import data
from lighten.errors import UserError
from lighten.evaluation import judge
from lighten.evaluation.evaluation import _question
from lighten.evaluation.judge import MOST_SIGNS, Judge, judged

Opinion = Callable[[str, str], str]  # of the answers A and B, in their order
Refusing = Callable[[dict[str, Any]], str | None]  # of a request's body: the message, or None


class _Server:
    """Answers chat completions with an opinion of ours, and keeps what it was asked."""

    def __init__(self) -> None:
        self.opinion: Opinion = lambda first, second: "tie"
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.retry_after: str | None = "0"
        self.busy = 429
        self.refusing: Refusing = lambda body: None
        self.context = 1000  # words of a reply, where no fewer are asked for
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append(body)
                server.keys.append(self.headers["Authorization"])
                text = body["messages"][0]["content"]
                first = text.split("[Answer A]\n")[1].split("\n\n[Answer B]")[0]
                second = text.split("[Answer B]\n")[1].split("\n\nReply")[0]
                message = server.refusing(body)
                if message is not None:
                    self.send_error_of(message)
                    return
                verdict = server.opinion(first, second)
                if verdict == "hang up":
                    self.close_connection = True
                    return
                ok = verdict not in ("refuse", "busy")
                room = body.get("max_completion_tokens", body.get("max_tokens", server.context))
                words = verdict.split(" ")
                choice = {
                    "message": {"content": " ".join(words[:room])},
                    "finish_reason": "length" if len(words) > room else "stop",
                }
                answer = {"choices": [choice]}
                data = json.dumps(answer if ok else {"error": "no such model"}).encode()
                if verdict.startswith("{"):
                    data = verdict.encode()
                self.send_response(200 if ok else 404 if verdict == "refuse" else server.busy)
                if verdict == "busy" and server.retry_after is not None:
                    self.send_header("Retry-After", server.retry_after)
                more = 9 if verdict == "cut off" else 0
                self.send_header("Content-Length", str(len(data) + more))
                self.end_headers()
                self.wfile.write(data)

            def send_error_of(self, message: str) -> None:
                data = json.dumps({"error": {"message": message, "code": 400}}, indent=2).encode()
                self.send_response(400)
                self.send_header("Content-Length", str(len(data)))
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
     ("<think>\nIs Answer A right?", None), ("<think>A?</think>\n\nB", "B"),
     ("Is Answer A right? No.\n</think>\n\nB", "B"),
     ("B입니다.", "B"), ("B가 더 좋습니다", "B"), ("답: A", "A"), ("무승부", None),
     ("Answer A is wrong and answer B is right.\n\nB", "B"), ("B\n\nAnswer A is wrong.", "B"),
     ("B is better than A", "B"), ("Answer A is worse than answer B.", None),
     ("A보다 B가 더 좋습니다", "B"), ("Neither A nor B is better.", None),
     ("A and B are equal: a tie", "tie")],
)  # fmt: skip
def test_a_reply_in_words_is_read_as_it_is_meant(
    reply: str, choice: str | None, server: _Server
) -> None:
    server.opinion = lambda *_: reply
    assert Judge(server.url, "judge").ask("?", "", "x", "y") == choice


THOUGHTS = "<think>\nAnswer A says one thing. " + "Is it right? " * 60 + "\n</think>\n\n"


def test_a_model_that_thinks_first_has_room_for_its_choice(server: _Server) -> None:
    def longer(first: str, second: str) -> str:
        return THOUGHTS + ("A" if len(first) > len(second) else "B")

    server.opinion = longer
    judgement = ask(server, ["long answer"] * 20, ["short"] * 20)
    assert (judgement["wins"], judgement["unclear"], judgement["verdict"]) == (20, 0, "better")
    # With less than it thinks of there is no choice: the A that it thinks of is none.
    texts = ["?"] * 20
    for thoughts in (THOUGHTS, THOUGHTS.removeprefix("<think>\n")):
        server.opinion = lambda *_, begun=thoughts: begun + "B"  # type: ignore[misc]
        judgement = judged(
            Judge(server.url, "judge", 8), texts, texts, ["x"] * 20, ["y"] * 20, samples=9, seed=0
        )
        assert (judgement["unclear"], judgement["cut_off"]) == (20, 20)
        assert judgement["verdict"] == "not judged"
    with pytest.raises(UserError, match=r"no choice within its 8 tokens.*--judge_max_tokens"):
        Judge(server.url, "judge", 8).check()
    # One that never ends says its choice first.
    server.opinion = lambda *_: "B\n\n[Request] " + "and so on " * 400
    assert Judge(server.url, "judge", 8).ask("?", "", "x", "y") == "B"


def test_a_judge_whose_thoughts_are_blocks_is_read(server: _Server) -> None:
    blocks = [{"type": "thinking", "thinking": [{"type": "text", "text": "A?"}]},
              {"type": "text", "text": "B"}]  # fmt: skip
    server.opinion = lambda *_: json.dumps({"choices": [{"message": {"content": blocks}}]})
    assert Judge(server.url, "judge").ask("?", "", "x", "y") == "B"


def reasoning_of_openai(body: dict[str, Any]) -> str | None:
    if "max_tokens" in body:
        return "Unsupported parameter: 'max_tokens' is not supported with this model."
    if body.get("temperature", 1) != 1:
        return "Unsupported value: 'temperature' does not support 0 with this model."
    return None


def of_little_context(body: dict[str, Any]) -> str | None:
    asked = body.get("max_tokens", body.get("max_completion_tokens", 0))
    return f"max_tokens: {asked} are more than the context leaves" if asked > 1000 else None


@pytest.mark.parametrize(
    ("refusing", "wanted"),
    [
        (lambda body: None, {"temperature": 0, "max_tokens": 4096}),
        (lambda body: "extra_forbidden" if "max_completion_tokens" in body else None,
         {"temperature": 0, "max_tokens": 4096}),
        (reasoning_of_openai, {"max_completion_tokens": 4096}),
        (of_little_context, {"temperature": 0}),
    ],
    ids=["most", "Mistral's", "OpenAI's that reason", "little context"],
)  # fmt: skip
def test_each_server_is_asked_as_it_wants(
    refusing: Refusing, wanted: dict[str, Any], server: _Server
) -> None:
    server.refusing, server.opinion = refusing, lambda *_: "A"
    asking = Judge(server.url, "judge")
    asking.check()
    server.requests.clear()
    assert asking.ask("?", "", "x", "y") == "A"
    (request,) = server.requests  # what was learnt at first is kept
    assert {name: request[name] for name in set(request) - {"model", "messages"}} == wanted


def test_what_no_manner_helps_is_told_as_the_server_says_it(server: _Server) -> None:
    server.refusing = lambda _: "The prompt does not fit the context."
    with pytest.raises(UserError, match=r"answered 400: The prompt does not fit the context\.$"):
        Judge(server.url, "judge").ask("?", "", "x", "y")
    assert len(server.requests) == 3


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


def test_a_judge_that_hangs_up_or_fails_once_costs_no_other_reply(
    server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies = iter(["hang up", "busy", "cut off", "A"])
    server.opinion, server.retry_after, server.busy = lambda *_: next(replies), None, 500
    waits: list[float] = []
    monkeypatch.setattr(judge.time, "sleep", waits.append)
    assert Judge(server.url, "judge").ask("?", "", "x", "y") == "A"
    assert waits == [1.0, 2.0, 4.0]
    with pytest.raises(UserError, match="cannot be reached"):
        Judge("http://127.0.0.1:9/v1", "judge").ask("", "", "", "")
    assert waits == [1.0, 2.0, 4.0], "nobody is there to wait for"


@pytest.mark.parametrize(
    ("reply", "message"),
    [("cut off", "cannot be reached: IncompleteRead"), ("{}", "gave no chat completion"),
     ('{"choices": [', "gave no chat completion")],
)  # fmt: skip
def test_rubbish_from_a_server_is_one_sentence(
    reply: str, message: str, server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge.time, "sleep", lambda _: None)
    server.opinion = lambda *_: reply
    with pytest.raises(UserError, match=message):
        Judge(server.url, "judge").ask("?", "", "x", "y")


def test_a_broken_address_is_one_sentence() -> None:
    with pytest.raises(UserError, match="is no address"):
        Judge("http://127.0.0.1:port/v1", "judge").ask("?", "", "x", "y")


def test_a_judge_is_told_the_turns_before_a_question() -> None:
    turns = [("system", "Answer in Korean."), ("user", "Name a city."), ("assistant", "서울"),
             ("user", "And a second one?"), ("assistant", "부산")]  # fmt: skip
    messages = tuple(data.Message(*turn) for turn in turns)
    assert _question(data.Example("f", 1, messages)) == (
        "system: Answer in Korean.\n\nuser: Name a city.\n\nassistant: 서울\n\n"
        "user: And a second one?"
    )
    assert _question(data.Example("f", 1, messages[1:3])) == "Name a city."
    long = data.Message("user", "long " * MOST_SIGNS)
    assert _question(data.Example("f", 1, (long, *messages[2:]))) == (
        "assistant: 서울\n\nuser: And a second one?"
    )


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
