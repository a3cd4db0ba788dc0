"""A language model as judge: which of two answers it prefers, asked in both orders.

Any server that speaks OpenAI's chat completions can judge. A judge that changes its mind with the
order of the answers has no opinion: that counts as a tie, and is counted.
Source: Zheng et al., Judging LLM-as-a-Judge (arXiv 2306.05685), section 3.4 on position bias.

A model that reasons thinks before it replies, so a reply has room; what it thinks is left out.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lighten.data import FEWEST
from lighten.errors import UserError
from lighten.evaluation.bootstrap import Array, Resamples
from lighten.evaluation.metrics import percent

# What has to be the same for two judgements to be comparable.
PROMPT = (
    "Two assistants answered a request. Judge which answer is better: correct, helpful, and as "
    "close to the reference as a good answer would be. Length and order do not matter.\n\n"
    "[Request]\n{question}\n\n[Reference]\n{reference}\n\n[Answer A]\n{first}\n\n"
    "[Answer B]\n{second}\n\nReply with one word alone: A, B or tie."
)
KEY = "OPENAI_API_KEY"
TIMEOUT_S, TOGETHER = 600.0, 4  # a reply comes whole, when all is thought
# Who does not reason needs a few of them; some hundreds up to some thousands are thought.
REPLY_TOKENS = 4096
# A server that is busy, counts requests or hangs up is asked again, later and later unless it says
# when: one of some hundred requests that fails must not cost the replies to all others.
BUSY, TRIES, WAIT_S, LONGEST_WAIT_S = (408, 429, 500, 502, 503, 504, 529), 6, 1.0, 60.0
# Where the template begins the thoughts, only their end is in the reply.
_THOUGHTS = re.compile(r"\A.*</think>|<think>.*\Z", re.DOTALL)
# Capitals alone: "a tie" is no choice of A, and neither is an article.
# Particles of Korean stand right behind a letter, so words end where ASCII's do.
_CHOICE = re.compile(
    r"\b(?:a\s+)?(tie)\b|\b((?-i:[AB]))\b|^\W*([ab])\W*$", re.IGNORECASE | re.ASCII
)
_NEITHER = re.compile(r"\bneither\b|\bnot better\b", re.IGNORECASE)
_ALONE = re.compile(r"\W*([AB])\W*")
_BETTER = re.compile(r"\b([AB]) is (?:\w+ )?better\b|([AB])(?:가|이) (?:\w+ )?(?:낫|나아|좋|우수)")
# At the beginning of a reply that never ends it was meant; "A better one" may be a thought.
_BEGINNING = re.compile(r"\W*(?:(tie)|((?-i:[AB])))\b(?![ \t]+\w)", re.IGNORECASE)
CUT_OFF = "cut off"
_ROOM = re.compile(r"max_\w*tokens|context")  # what refusals of a budget name
# An answer that is sent may be long; a judge needs no more of it.
MOST_SIGNS = 8000


@dataclass(frozen=True)
class _Manner:
    """How a server wants to be asked, which differs among those that speak OpenAI's API.

    OpenAI's reasoning models refuse `max_tokens` and any temperature but their own; Mistral refuses
    `max_completion_tokens`; vLLM and ours refuse more tokens than the context has room for, and
    take what there is where none are named.
    """

    budget: str | None = "max_tokens"
    greedy: bool = True

    def fields(self, tokens: int) -> dict[str, Any]:
        """Of a request's body."""
        fields: dict[str, Any] = {"temperature": 0} if self.greedy else {}
        return fields if self.budget is None else {**fields, self.budget: tokens}

    def after(self, refusal: str) -> _Manner | None:
        """Another one, where a refusal blames this one; None: it blames something else."""
        if self.greedy and "temperature" in refusal:
            return replace(self, greedy=False)
        if self.budget is not None and _ROOM.search(refusal):
            first = self.budget == "max_tokens"
            return replace(self, budget="max_completion_tokens" if first else None)
        return None


_MANNER = _Manner()


@dataclass
class Judge:
    """Who judges.

    Attributes:
        url: Of the API, such as `http://127.0.0.1:8000/v1`.
        model: Its name there.
        reply_tokens: Of a reply at most, with what is thought before it.
    """

    url: str
    model: str
    reply_tokens: int = REPLY_TOKENS
    _manner: _Manner = field(default=_MANNER, repr=False)

    def ask(self, question: str, reference: str, first: str, second: str) -> str | None:
        """`A`, `B` or `tie`; `CUT_OFF` where a reply had no room for one; None where it is none.

        Raises:
            UserError: The server cannot be reached, or refuses.
        """
        parts = (question, reference, first, second)
        names = ("question", "reference", "first", "second")
        text = PROMPT.format(**{k: v[:MOST_SIGNS] for k, v in zip(names, parts, strict=True)})
        reply, ended = self._reply(text)
        thought = _THOUGHTS.sub("", reply)
        if not ended and "</think>" not in reply:
            beginning = _BEGINNING.match(thought)
            choice = None if beginning is None else _word(beginning)
        else:
            choice = _choice(thought)
        return CUT_OFF if choice is None and not ended else choice

    def check(self) -> None:
        """Ask it something, before anything is measured that it is to judge.

        Raises:
            UserError: The server cannot be reached or refuses, or its reply found no room.
        """
        if self.ask("Which number is larger, 1 or 2?", "2", "2", "1") == CUT_OFF:
            raise UserError(
                f"judge: {self.model} came to no choice within its {self.reply_tokens} tokens, or "
                "within its context; raise --judge_max_tokens"
            )

    def _reply(self, text: str) -> tuple[str, bool]:
        """What it says, and whether it had said all."""
        manner = self._manner
        while True:
            try:
                completion = self._completion(text, manner)
                break
            except _Refusal as refusal:
                another = manner.after(refusal.said) if refusal.code in (400, 422) else None
                if another is None:
                    raise
                manner = another
        self._manner = manner  # of all later requests
        try:
            choice = completion["choices"][0]
            content = choice["message"]["content"] or ""
            if isinstance(content, list):  # Mistral's: blocks of thoughts and of text
                content = "".join(part["text"] for part in content if part["type"] == "text")
            return str(content), choice.get("finish_reason") != "length"
        except (LookupError, TypeError, AttributeError) as error:
            raise UserError(f"judge: {self._address} gave no chat completion") from error

    @property
    def _address(self) -> str:
        return f"{self.url.rstrip('/')}/chat/completions"

    def _completion(self, text: str, manner: _Manner) -> Any:
        """The answer to one request, as JSON."""
        body = {
            "model": self.model, "messages": [{"role": "user", "content": text}],
            **manner.fields(self.reply_tokens),
        }  # fmt: skip
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        address = self._address
        if not address.startswith(("http://", "https://")):
            raise UserError(f"judge: {self.url} is no address; write http://127.0.0.1:8000/v1")
        try:
            request = urllib.request.Request(address, json.dumps(body).encode(), headers)
            return json.loads(_sent(request))
        except urllib.error.HTTPError as error:
            raise _Refusal(address, error.code, _refusal_text(error)) from error
        except http.client.InvalidURL as error:
            raise UserError(f"judge: {self.url} is no address: {error}") from error
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "reason", error)
            raise UserError(f"judge: {address} cannot be reached: {why}") from error
        except ValueError as error:
            raise UserError(f"judge: {address} gave no chat completion") from error


def _word(match: re.Match[str]) -> str:
    word = match[match.lastindex or 0].lower()
    return word if word == "tie" else word.upper()


def _choice(text: str) -> str | None:
    """`A`, `B` or `tie` of a whole reply; None: it names none, or both and does not say which."""
    words = [_word(match) for match in _CHOICE.finditer(text)]
    if not {"A", "B"} <= set(words):
        return words[0] if words else None
    if "tie" in words:
        return "tie"
    # Both are named where one gives reasons: the first line is the choice, or the last one is.
    lines = [line for line in text.splitlines() if line.strip()]
    if (alone := _ALONE.fullmatch(lines[0])) is not None:
        return alone[1]
    last = {_word(match) for match in _CHOICE.finditer(lines[-1])}
    if len(last) == 1:
        return last.pop()
    better = {_word(match) for match in _BETTER.finditer(text)}
    return better.pop() if len(better) == 1 and _NEITHER.search(text) is None else None


class _Refusal(UserError):
    """A server refuses a request."""

    def __init__(self, address: str, code: int, said: str) -> None:
        why = f": {said[:200]}" if said else ""
        super().__init__(f"judge: {address} answered {code}{why}")
        self.code, self.said = code, said


def _sent(request: urllib.request.Request) -> bytes:
    """The body of an answer; a busy server is waited for, and one that hung up is asked again.

    Raises:
        OSError: There is no answer, or (`HTTPError`) a refusal.
        HTTPException: What comes is no HTTP, or is cut off.
    """
    for trial in range(1, TRIES + 1):
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                content: bytes = answer.read()
                return content
        except (OSError, http.client.IncompleteRead) as error:
            if trial == TRIES or not _may_pass(error):
                raise
            asked = None
            if isinstance(error, urllib.error.HTTPError):
                asked = error.headers.get("Retry-After")
            time.sleep(_wait_s(asked, trial))
    raise AssertionError("the last trial returns or raises")


def _may_pass(error: Exception) -> bool:
    """Whether asking again may help: the server is busy, or was there and has hung up."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code in BUSY
    why = getattr(error, "reason", error)
    return isinstance(why, ConnectionResetError | BrokenPipeError | http.client.IncompleteRead)


def _wait_s(asked: str | None, trial: int) -> float:
    """Seconds until the next trial: as the server asks, where it says so in seconds."""
    wait = float(asked) if asked and asked.strip().isdecimal() else WAIT_S * 2 ** (trial - 1)
    return min(wait, LONGEST_WAIT_S)


def _refusal_text(error: urllib.error.HTTPError) -> str:
    """What a server says of its refusal: the message of its JSON, or all of it, in one line."""
    try:
        text = error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""
    try:
        body = json.loads(text)
        text = str(body["error"]["message"])
    except (ValueError, LookupError, TypeError):
        pass
    return " ".join(text.split())


def judged(
    judge: Judge,
    questions: Sequence[str],
    references: Sequence[str],
    ours: Sequence[str],
    base: Sequence[str],
    *,
    samples: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """How often one model's answers are preferred to another's.

    Args:
        judge: Who is asked.
        questions: What was asked.
        references: What a good answer is.
        ours: Answers of the model.
        base: Answers of the other.
        samples: Resamples behind the interval.
        seed: Of the resampling.
        progress: Log how many are judged, and of how many.

    Returns:
        `wins`, `losses`, `ties`; of the ties, `swapped` (another answer was preferred when their
        order was) and `unclear` (a reply was no choice), of which `cut_off` (it had no room for
        one); `rate`, wins and half of the ties in per cent, with its interval, and a `verdict`
        against 50; `not judged` where no reply was a choice.

    Raises:
        UserError: The server cannot be reached, or refuses.
    """
    count, done = len(ours), 0
    pairs = list(zip(questions, references, ours, base, strict=True))

    def ask_both_orders(pair: tuple[str, str, str, str]) -> tuple[str | None, str | None]:
        question, reference, our_answer, base_answer = pair
        if our_answer.strip() == base_answer.strip():
            return "tie", "tie"  # nothing to judge
        first = judge.ask(question, reference, our_answer, base_answer)
        return first, judge.ask(question, reference, base_answer, our_answer)

    outcomes: list[tuple[str | None, str | None]] = []
    with ThreadPoolExecutor(TOGETHER) as pool:
        for outcome in pool.map(ask_both_orders, pairs):
            outcomes.append(outcome)
            done += 1
            if progress is not None:
                progress(done, count)
    wins = sum(outcome == ("A", "B") for outcome in outcomes)
    losses = sum(outcome == ("B", "A") for outcome in outcomes)
    cut_off = sum(CUT_OFF in outcome for outcome in outcomes)
    unclear = sum(None in outcome or CUT_OFF in outcome for outcome in outcomes)
    swapped = sum(outcome in (("A", "A"), ("B", "B")) for outcome in outcomes)
    sent = sum(first.strip() != second.strip() for _, _, first, second in pairs)
    estimate = Resamples(count, samples, seed).estimate(_statistics(outcomes), percent)
    return {
        "wins": wins, "losses": losses, "ties": count - wins - losses,
        "swapped": swapped, "unclear": unclear, "cut_off": cut_off, "rate": estimate.to_dict(),
        "verdict": "not judged" if 0 < sent == unclear else
                   _verdict(estimate.low, estimate.high, count),
    }  # fmt: skip


def _statistics(outcomes: Sequence[tuple[str | None, str | None]]) -> Array:
    """[examples, 2]: 1 for a win, ½ for a tie; and 1."""
    points = [
        1.0 if outcome == ("A", "B") else 0.0 if outcome == ("B", "A") else 0.5
        for outcome in outcomes
    ]
    return np.stack([np.asarray(points), np.ones(len(points))], axis=1)


def _verdict(low: float | None, high: float | None, count: int) -> str:
    if low is None or high is None or count < FEWEST:
        return "too few examples"
    return "better" if low > 50 else "worse" if high < 50 else "no difference found"
