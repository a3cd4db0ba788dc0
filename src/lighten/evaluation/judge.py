"""A language model as judge: which of two answers it prefers, asked in both orders.

Any server that speaks OpenAI's chat completions can judge. A judge that changes its mind with the
order of the answers has no opinion: that counts as a tie, and is counted.
Source: Zheng et al., Judging LLM-as-a-Judge (arXiv 2306.05685), section 3.4 on position bias.
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
from dataclasses import dataclass
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
TIMEOUT_S, TOGETHER, REPLY_TOKENS = 120.0, 4, 8
# A server that is busy or counts requests is asked again, later and later unless it says when.
BUSY, TRIES, WAIT_S, LONGEST_WAIT_S = (408, 429, 502, 503, 504), 6, 1.0, 60.0
_THOUGHTS = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
# Capitals alone: "a tie" is no choice of A, and neither is an article.
_CHOICE = re.compile(r"\b(?:a\s+)?(tie)\b|\b((?-i:[AB]))\b|^\W*([ab])\W*$", re.IGNORECASE)
# An answer that is sent may be long; a judge needs no more of it.
MOST_SIGNS = 8000


@dataclass(frozen=True)
class Judge:
    """Who judges.

    Attributes:
        url: Of the API, such as `http://127.0.0.1:8000/v1`.
        model: Its name there.
    """

    url: str
    model: str

    def ask(self, question: str, reference: str, first: str, second: str) -> str | None:
        """`A`, `B` or `tie`; None for a reply that is none of them.

        Raises:
            UserError: The server cannot be reached, or refuses.
        """
        parts = (question, reference, first, second)
        names = ("question", "reference", "first", "second")
        text = PROMPT.format(**{k: v[:MOST_SIGNS] for k, v in zip(names, parts, strict=True)})
        reply = self._reply(text)
        choice = _CHOICE.search(_THOUGHTS.sub("", reply))
        if choice is None:
            return None
        word = choice[choice.lastindex or 0].lower()
        return word if word == "tie" else word.upper()

    def check(self) -> None:
        """Ask it something, before anything is measured that it is to judge.

        Raises:
            UserError: The server cannot be reached, or refuses.
        """
        self.ask("Which number is larger, 1 or 2?", "2", "2", "1")

    def _reply(self, text: str) -> str:
        body = {
            "model": self.model, "messages": [{"role": "user", "content": text}],
            "temperature": 0, "max_tokens": REPLY_TOKENS,
        }  # fmt: skip
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        address = f"{self.url.rstrip('/')}/chat/completions"
        if not address.startswith(("http://", "https://")):
            raise UserError(f"judge: {self.url} is no address; write http://127.0.0.1:8000/v1")
        try:
            request = urllib.request.Request(address, json.dumps(body).encode(), headers)
            completion = json.loads(_sent(request))
            return str(completion["choices"][0]["message"]["content"] or "")
        except urllib.error.HTTPError as error:
            raise UserError(f"judge: {address} answered {error.code}{_why(error)}") from error
        except http.client.InvalidURL as error:
            raise UserError(f"judge: {self.url} is no address: {error}") from error
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "reason", error)
            raise UserError(f"judge: {address} cannot be reached: {why}") from error
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"judge: {address} gave no chat completion") from error


def _sent(request: urllib.request.Request) -> bytes:
    """The body of an answer; a busy server is waited for.

    Raises:
        OSError: There is no answer, or (`HTTPError`) a refusal.
        HTTPException: What comes is no HTTP, or is cut off.
    """
    for trial in range(1, TRIES + 1):
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            if error.code not in BUSY or trial == TRIES:
                raise
            time.sleep(_wait_s(error.headers.get("Retry-After"), trial))
    raise AssertionError("the last trial returns or raises")


def _wait_s(asked: str | None, trial: int) -> float:
    """Seconds until the next trial: as the server asks, where it says so in seconds."""
    wait = float(asked) if asked and asked.strip().isdecimal() else WAIT_S * 2 ** (trial - 1)
    return min(wait, LONGEST_WAIT_S)


def _why(error: urllib.error.HTTPError) -> str:
    """The first line of what a server says of its refusal."""
    try:
        lines = error.read().decode(errors="replace").strip().splitlines()
    except (OSError, http.client.HTTPException):
        return ""
    return f": {lines[0][:200]}" if lines else ""


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
        order was) and `unclear` (a reply was no choice); `rate`, wins and half of the ties in
        per cent, with its interval, and a `verdict` against 50; `not judged` where no reply was
        a choice.

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
    unclear = sum(None in outcome for outcome in outcomes)
    swapped = sum(outcome in (("A", "A"), ("B", "B")) for outcome in outcomes)
    sent = sum(first.strip() != second.strip() for _, _, first, second in pairs)
    estimate = Resamples(count, samples, seed).estimate(_statistics(outcomes), percent)
    return {
        "wins": wins, "losses": losses, "ties": count - wins - losses,
        "swapped": swapped, "unclear": unclear, "rate": estimate.to_dict(),
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
