"""What a server is held to: answers of the named adapter, and fields that take effect."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lighten.serving.remote import Remote, ServerError

_QUESTIONS = ("Name a colour.", "What is two plus two?", "Write a line about rain.",
              "Name a colour and say why it is calm.")  # fmt: skip
# Rounding differs with the number of answers in a batch: of quantised weights by so much.
_ROUNDING = 0.1


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        passed: Whether it holds.
        detail: What was seen.
    """

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Identity:
    """Whether each answer was that of the adapter it names.

    Attributes:
        requests: How many were compared.
        same: Answers equal to those of the same model asked alone.
        rounding: Others whose first token's log-probabilities are that model's, to rounding.
        wrong: The rest: another model answered.
    """

    requests: int
    same: int
    rounding: int
    wrong: int


def fields(remote: Remote, model: str) -> list[Check]:
    """Whether fields that other servers drop without a word take effect.

    Raises:
        ServerError: The server does not answer at all.
    """
    return [
        _one(name, check, remote, model)
        for name, check in (
            ("n", _several), ("max_completion_tokens", _limited), ("stop", _stopped),
            ("logprobs", _probable), ("unknown model", _unknown_model),
            ("unknown field", _unknown_field),
        )
    ]  # fmt: skip


def _one(
    name: str, check: Callable[[Remote, str], tuple[bool, str]], remote: Remote, model: str
) -> Check:
    try:
        return Check(name, *check(remote, model))
    except ServerError as error:
        if error.status == 0:
            raise
        return Check(name, False, f"{error.status}: {error}")
    except (KeyError, TypeError, IndexError) as error:
        return Check(name, False, f"the answer has another form: {error!r}")


def _ask(remote: Remote, model: str, question: str = _QUESTIONS[0], **options: Any) -> Any:
    settings = {"temperature": 0, "max_completion_tokens": 16, **options}
    return remote.chat(model, [{"role": "user", "content": question}], **settings)


def _several(remote: Remote, model: str) -> tuple[bool, str]:
    choices = _ask(remote, model, n=2, temperature=1.0, seed=1)["choices"]
    return len(choices) == 2, f"{len(choices)} answers to n = 2"


def _limited(remote: Remote, model: str) -> tuple[bool, str]:
    answer = _ask(remote, model, "Count from one to a hundred.", max_completion_tokens=3)
    tokens, finish = answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]
    ended = tokens <= 3 and (finish == "length" or tokens < 3)
    return ended, f"{tokens} tokens for a limit of 3, finish_reason {finish}"


def _stopped(remote: Remote, model: str) -> tuple[bool, str]:
    whole = _ask(remote, model)["choices"][0]["message"]["content"]
    if len(whole) < 2:
        return True, "the answer is too short to stop inside"
    stop = whole[len(whole) // 2 :][:2]
    choice = _ask(remote, model, stop=[stop])["choices"][0]
    got = choice["message"]["content"]
    right = got == whole[: whole.index(stop)] and choice["finish_reason"] == "stop"
    return right, f"{got!r} of {whole!r} with stop {stop!r}"


def _probable(remote: Remote, model: str) -> tuple[bool, str]:
    choice = _ask(remote, model, logprobs=True, top_logprobs=3)["choices"][0]
    told = (choice.get("logprobs") or {}).get("content") or []
    missing = (choice.get("logprobs") or {}).get("missing_tokens", 0)
    whole = all(len(own["top_logprobs"]) == 3 and own["logprob"] <= 0 for own in told)
    return bool(told) and whole, f"{len(told)} tokens told, {missing} not"


def _unknown_model(remote: Remote, _: str) -> tuple[bool, str]:
    try:
        _ask(remote, "no-such-model-is-here")
    except ServerError as error:
        return error.status == 404, f"{error.status}: {error}"
    return False, "answered by another model"


def _unknown_field(remote: Remote, model: str) -> tuple[bool, str]:
    try:
        _ask(remote, model, no_such_field=1)
    except ServerError as error:
        return 400 <= error.status < 500, f"{error.status}: {error}"
    return False, "dropped without a word"


def identity(
    remote: Remote, models: Sequence[str], *, requests: int, clients: int = 8, seed: int = 0
) -> Identity:
    """Ask each model alone, then all of them mixed with the same beginnings, and compare.

    Raises:
        ServerError: A request failed.
    """
    pairs = list(itertools.product(models, _QUESTIONS))
    alone = {pair: _answer(remote, *pair) for pair in pairs}
    order = (pairs * (requests // len(pairs) + 1))[:requests]
    random.Random(seed).shuffle(order)
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda pair: _answer(remote, *pair), order))
    same = rounding = 0
    for (model, question), got in zip(order, answers, strict=True):
        if got[0] == alone[model, question][0]:
            same += 1
            continue
        apart = {own: _apart(got[1], alone[own, question][1]) for own in models}
        nearest = min(apart.values())
        rounding += apart[model] == nearest and nearest <= _ROUNDING
    return Identity(requests, same, rounding, requests - same - rounding)


def _answer(remote: Remote, model: str, question: str) -> tuple[str, dict[str, float]]:
    choice = _ask(remote, model, question, logprobs=True, top_logprobs=5)["choices"][0]
    told = choice["logprobs"]["content"]
    first = {own["token"]: own["logprob"] for own in told[0]["top_logprobs"]} if told else {}
    return choice["message"]["content"], first


def _apart(one: dict[str, float], other: dict[str, float]) -> float:
    """Largest difference of log-probabilities; tokens that one alone names count fully."""
    if one.keys() != other.keys():
        shared = one.keys() & other.keys()
        if len(shared) < 3:
            return float("inf")
        return max(abs(one[token] - other[token]) for token in shared)
    return max((abs(one[token] - other[token]) for token in one), default=0.0)
