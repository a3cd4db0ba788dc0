"""What a server is held to: answers of the named adapter, and fields that take effect."""

from __future__ import annotations

import functools
import itertools
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lighten.serving.remote import Remote, ServerError, Streamed

_QUESTIONS = ("Name a colour.", "What is two plus two?", "Write a line about rain.",
              "Name a colour and say why it is calm.")  # fmt: skip
# Rounding differs with the number of answers in a batch: of quantised weights by so much.
_ROUNDING = 0.1
# The text, and log-probabilities of its likeliest first tokens; none where the server tells none.
_Answer = tuple[str, dict[str, float]]


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
        wrong: Others that are another model's: by log-probabilities, or where the server tells none
            by the text.
        unclear: Others without log-probabilities, whose text is that of no model alone.
    """

    requests: int
    same: int
    rounding: int
    wrong: int
    unclear: int


def fields(remote: Remote, model: str) -> list[Check]:
    """Whether fields that other servers drop without a word take effect.

    Raises:
        ServerError: The server does not answer at all.
    """
    return [
        _run_check(name, check, remote, model)
        for name, check in (
            ("n", _check_n), ("max_completion_tokens", _check_max_tokens), ("stop", _check_stop),
            ("logprobs", _check_logprobs), ("stream_options", _check_stream_options),
            ("unknown model", _check_unknown_model), ("unknown field", _check_unknown_field),
        )
    ]  # fmt: skip


def _run_check(
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


def _check_n(remote: Remote, model: str) -> tuple[bool, str]:
    choices = _ask(remote, model, n=2, temperature=1.0, seed=1)["choices"]
    return len(choices) == 2, f"{len(choices)} answers to n = 2"


def _check_max_tokens(remote: Remote, model: str) -> tuple[bool, str]:
    answer = _ask(remote, model, "Count from one to a hundred.", max_completion_tokens=3)
    tokens, finish = answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]
    within_limit = tokens <= 3 and (finish == "length" or tokens < 3)
    return within_limit, f"{tokens} tokens for a limit of 3, finish_reason {finish}"


def _check_stop(remote: Remote, model: str) -> tuple[bool, str]:
    answer = _ask(remote, model)["choices"][0]["message"]["content"] or ""
    if len(answer) < 2:
        return True, "the answer is too short to stop inside"
    stop = answer[len(answer) // 2 :][:2]
    choice = _ask(remote, model, stop=[stop])["choices"][0]
    stopped_answer = choice["message"]["content"]
    passed = stopped_answer == answer[: answer.index(stop)] and choice["finish_reason"] == "stop"
    return passed, f"{stopped_answer!r} of {answer!r} with stop {stop!r}"


def _check_logprobs(remote: Remote, model: str) -> tuple[bool, str]:
    choice = _ask(remote, model, logprobs=True, top_logprobs=3)["choices"][0]
    tokens = (choice.get("logprobs") or {}).get("content") or []
    missing = (choice.get("logprobs") or {}).get("missing_tokens", 0)
    complete = all(len(token["top_logprobs"]) == 3 and token["logprob"] <= 0 for token in tokens)
    return bool(tokens) and complete, f"{len(tokens)} tokens told, {missing} not"


def _check_stream_options(remote: Remote, model: str) -> tuple[bool, str]:
    answer = Streamed()
    messages = [{"role": "user", "content": _QUESTIONS[0]}]
    try:
        for _ in remote.stream(model, messages, answer, temperature=0, max_completion_tokens=16):
            pass
    except ServerError as error:
        return False, f"{error.status or 'no stream'}: {error}"
    if not answer.counted:
        return False, "include_usage: a stream tells no counts of tokens"
    return True, f"{answer.tokens} tokens counted at the end of a stream"


def _check_unknown_model(remote: Remote, _: str) -> tuple[bool, str]:
    try:
        _ask(remote, "no-such-model-is-here")
    except ServerError as error:
        return error.status == 404, f"{error.status}: {error}"
    return False, "answered by another model"


def _check_unknown_field(remote: Remote, model: str) -> tuple[bool, str]:
    try:
        _ask(remote, model, no_such_field=1)
    except ServerError as error:
        return 400 <= error.status < 500, f"{error.status}: {error}"
    return False, "dropped without a word"


def identity(remote: Remote, models: Sequence[str], *, requests: int, clients: int = 8) -> Identity:
    """Ask each model alone, then all of them mixed with the same beginnings, and compare.

    Raises:
        ServerError: A request failed.
    """
    # Every model is asked before any is asked again, also where the requests are few.
    pairs = [(model, question) for question, model in itertools.product(_QUESTIONS, models)]
    order = (pairs * (requests // len(pairs) + 1))[:requests]
    # There may be hundreds of models: none is asked what nothing is compared with.
    alone = functools.cache(functools.partial(_answer, remote))
    for pair in order:
        alone(*pair)
    random.Random(0).shuffle(order)
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda pair: _answer(remote, *pair), order))
    kinds = Counter(
        _judge(answer, model, {name: alone(name, question) for name in models})
        if answer[0] != alone(model, question)[0]
        else "same"
        for (model, question), answer in zip(order, answers, strict=True)
    )
    return Identity(requests, kinds["same"], kinds["rounding"], kinds["wrong"], kinds["unclear"])


def _judge(answer: _Answer, model: str, alone: Mapping[str, _Answer]) -> str:
    """What an answer is whose text is not the named model's alone."""
    text, first = answer
    if not first or not alone[model][1]:
        # Nothing that rounding could be told by: the same words are another model's, or nobody's.
        return "wrong" if any(text == other for other, _ in alone.values()) else "unclear"
    distances = {name: _largest_difference(first, other) for name, (_, other) in alone.items()}
    nearest = min(distances.values())
    return "rounding" if distances[model] == nearest and nearest <= _ROUNDING else "wrong"


def _answer(remote: Remote, model: str, question: str) -> _Answer:
    choice = _ask(remote, model, question, logprobs=True, top_logprobs=5)["choices"][0]
    tokens = (choice.get("logprobs") or {}).get("content") or []
    first = {top["token"]: top["logprob"] for top in tokens[0]["top_logprobs"]} if tokens else {}
    return choice["message"]["content"] or "", first


def _largest_difference(first: dict[str, float], second: dict[str, float]) -> float:
    """Largest difference of log-probabilities; tokens that one alone names count fully."""
    if first.keys() != second.keys():
        shared = first.keys() & second.keys()
        if len(shared) < 3:
            return float("inf")
        return max(abs(first[token] - second[token]) for token in shared)
    return max(abs(first[token] - second[token]) for token in first)
