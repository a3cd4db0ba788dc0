"""The load generator: many clients, arrivals, popularity of adapters, and what they felt."""

from __future__ import annotations

import itertools
import math
import queue
import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lighten.errors import UserError
from lighten.serving.remote import Remote, ServerError, Streamed

Popularity = Literal["one", "uniform", "zipf"]
_WORDS = ("river", "stone", "answer", "light", "paper", "north", "seven", "garden", "metal",
          "reason", "glass", "winter", "doubt", "market", "signal", "bread")  # fmt: skip
_PERCENTILES = (50, 90, 99)
# Longer answers share a prompt's work among more tokens, and keep more of them under way.
_SAME_LENGTH = 1.05
# Each is a thread here; what comes when so many are under way waits, and its wait is measured.
_MOST_UNDER_WAY = 512


@dataclass(frozen=True)
class Load:
    """What is sent.

    Attributes:
        requests: How many.
        clients: At the same time; each asks again when it is answered.
        rate: Arrivals per second, at random intervals, whatever is answered; None: as clients do.
        prompt_words: Words of a prompt.
        max_tokens: Tokens of an answer.
        popularity: Which adapter a request names: always the first, for which there are no loads
            of several, all alike, or Zipf's law.
        seed: Of the prompts' words, arrivals and adapters; what a prompt begins with is new in each
            load, so that no cache of prompts answers it.
    """

    requests: int = 64
    clients: int = 16
    rate: float | None = None
    prompt_words: int = 32
    max_tokens: int = 64
    popularity: Popularity = "uniform"
    seed: int = 0

    def check(self) -> None:
        """Refuse a load that cannot be sent.

        Raises:
            UserError: Names the flag.
        """
        for name in ("requests", "clients", "prompt_words", "max_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is at least 1")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise UserError("--rate is a number of requests per second, above 0")
        if self.popularity not in ("one", "uniform", "zipf"):
            raise UserError(f"--popularity {self.popularity} is not known; one, uniform or zipf")


@dataclass(frozen=True)
class Outcome:
    """What a load met.

    Attributes:
        what: Which models were asked: `base`, a number of adapters, or `base and adapters`.
        adapters: How many different ones requests could name, the base not counted.
        seconds: From the first request to the last answer.
        sent_per_s: The rate that was reached; None: no rate was asked for, or of one request.
        answered: Whole answers.
        errors: Errors by what was said.
        tokens: Tokens generated; None: the server does not count them in streams.
        parts: Parts of streams that held text: with many servers one for each token.
        prompt_tokens: Tokens of prompts; None as above.
        ignore_eos: Whether `ignore_eos` was sent, by which all answers have `max_tokens` tokens.
        first_token_s: Percentiles of the time to the first text, from when the request was to be
            sent: at a rate, what waits for one before it waits as its user would.
        between_tokens_s: Percentiles of the time between parts of a stream.
        by_model: Answers by model.
    """

    what: str
    adapters: int
    seconds: float
    sent_per_s: float | None
    answered: int
    errors: dict[str, int]
    tokens: int | None
    parts: int
    prompt_tokens: int | None
    ignore_eos: bool
    first_token_s: dict[str, float | None]
    between_tokens_s: dict[str, float | None]
    by_model: dict[str, int] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float | None:
        """Generated tokens of all answers; None where they are not counted."""
        return None if self.tokens is None else self.tokens / self.seconds

    @property
    def parts_per_s(self) -> float:
        """Parts of all streams."""
        return self.parts / self.seconds

    @property
    def tokens_per_answer(self) -> float | None:
        """Mean length of an answer; None where nothing is counted or answered."""
        return self.tokens / self.answered if self.tokens is not None and self.answered else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            **asdict(self),
            "tokens_per_s": self.tokens_per_s,
            "parts_per_s": self.parts_per_s,
            "tokens_per_answer": self.tokens_per_answer,
            "requests_per_s": self.answered / self.seconds,
        }


@dataclass(frozen=True)
class _Result:
    """A request: whom it named, when it was to be sent and when it was, and what came."""

    model: str
    due: float
    sent: float
    answer: Streamed | str


def run(
    remote: Remote, what: str, models: Sequence[str], load: Load, *, adapters: int = 0,
    ignore_eos: bool = False,
) -> Outcome:  # fmt: skip
    """Send a load and measure.

    Args:
        remote: The server.
        what: What the outcome is called.
        models: Who is asked, the most popular first.
        load: How.
        adapters: How many of them are no base.
        ignore_eos: Whether answers are to go on past their end.
    """
    rng = random.Random(load.seed)
    requests = list(_requests(models, load, rng))
    waiting: queue.SimpleQueue[tuple[str, str, float | None] | None] = queue.SimpleQueue()
    results: queue.SimpleQueue[_Result] = queue.SimpleQueue()

    def client() -> None:
        while (request := waiting.get()) is not None:
            model, question, due = request
            sent = time.perf_counter()
            answer = _ask(remote, model, question, load.max_tokens, ignore_eos)
            results.put(_Result(model, sent if due is None else due, sent, answer))

    # Arrivals do not wait for answers: as many clients as there may be requests under way.
    number = load.clients if load.rate is None else min(load.requests, _MOST_UNDER_WAY)
    threads = [threading.Thread(target=client, daemon=True) for _ in range(number)]
    for thread in threads:
        thread.start()
    began = time.perf_counter()
    if load.rate is None:
        for request in requests:
            waiting.put((*request, None))
    else:
        arrivals = _arrivals(load.requests, load.rate, rng)
        for request, due in zip(requests, arrivals, strict=True):
            # Until a time, not for a time: sleeping too long does not add up.
            while (left_s := began + due - time.perf_counter()) > 0:
                time.sleep(left_s)
            waiting.put((*request, began + due))
    for _ in threads:
        waiting.put(None)
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    gathered = [results.get() for _ in requests]
    return _outcome(what, adapters, load, ignore_eos, seconds, gathered)


def series(
    remote: Remote, load: Load, log: Callable[[Outcome], None] | None = None
) -> list[Outcome]:
    """The base, one adapter, and twice as many adapters each time up to all of them, mixed.

    Where popularity is `one`, requests would name the first alone: the base and one adapter.

    Raises:
        UserError: The server does not answer.
    """
    load.check()
    parents = remote.models()
    base = next((name for name, parent in parents.items() if parent is None), None)
    adapters = [name for name, parent in parents.items() if parent is not None]
    if base is None:
        raise UserError(f"{remote.url} lists no base among its models")
    if load.popularity == "one":
        adapters = adapters[:1]
    numbers = [2**power for power in range(len(adapters).bit_length())]
    steps = sorted({*numbers, len(adapters)} - {0})
    outcomes = []
    planned = [("base", [base], 0)]
    planned += [(f"{n} adapter{'s' * (n > 1)}", adapters[:n], n) for n in steps]
    if adapters and load.popularity != "one":
        planned.append(("base and adapters", [base, *adapters], len(adapters)))
    # Servers that do not know the field refuse or drop it; of the others this is the warm-up.
    probe = _ask(remote, base, "Say yes.", load.max_tokens, ignore_eos=True)
    ignore_eos = isinstance(probe, Streamed) and probe.finish == "length"
    for what, models, number in planned:
        outcomes.append(run(remote, what, models, load, adapters=number, ignore_eos=ignore_eos))
        if log is not None:
            log(outcomes[-1])
    return outcomes


def lengths(outcomes: Sequence[Outcome]) -> tuple[float, float] | None:
    """Mean tokens of an answer in the loads with the shortest and the longest answers.

    Returns:
        In parts of streams where a server does not count tokens; None: they are alike, to some per
        cent, and rates of these loads may be compared.
    """
    counted = all(outcome.tokens is not None for outcome in outcomes)
    means = [
        ((outcome.tokens or 0) if counted else outcome.parts) / outcome.answered
        for outcome in outcomes
        if outcome.answered
    ]
    if not means or max(means) <= _SAME_LENGTH * min(means):
        return None
    return min(means), max(means)


def _requests(models: Sequence[str], load: Load, rng: random.Random) -> Iterator[tuple[str, str]]:
    weights = [1.0 / rank if load.popularity == "zipf" else 1.0
               for rank in range(1, len(models) + 1)]  # fmt: skip
    # Servers keep prompts by how they begin: no load, and no second run, begins as one before.
    beginning = secrets.token_hex(4)
    for number in range(load.requests):
        chosen = models[0] if load.popularity == "one" else rng.choices(models, weights)[0]
        words = " ".join(rng.choices(_WORDS, k=load.prompt_words))
        yield chosen, f"{beginning}.{number}: {words}"


def _arrivals(number: int, rate: float, rng: random.Random) -> list[float]:
    """Seconds after the first, at random intervals that make the rate on the whole."""
    gaps = [rng.expovariate(rate) for _ in range(number - 1)]
    # A few random intervals add up to another rate than was asked for.
    scale = len(gaps) / rate / sum(gaps) if gaps else 0.0
    return list(itertools.accumulate((gap * scale for gap in gaps), initial=0.0))


def _ask(
    remote: Remote, model: str, question: str, max_tokens: int, ignore_eos: bool
) -> Streamed | str:
    """What came, or the error's words."""
    answer = Streamed()
    messages = [{"role": "user", "content": question}]
    options = {"max_completion_tokens": max_tokens, "temperature": 0}
    if ignore_eos:
        options["ignore_eos"] = True
    try:
        for _ in remote.stream(model, messages, answer, **options):
            pass
    except (ServerError, OSError, ValueError) as error:
        return f"{getattr(error, 'status', 0) or 'no answer'}: {error}"[:200]
    return answer


def _outcome(
    what: str, adapters: int, load: Load, ignore_eos: bool, seconds: float,
    results: Sequence[_Result],
) -> Outcome:  # fmt: skip
    answers = [result.answer for result in results if isinstance(result.answer, Streamed)]
    first = [
        result.answer.arrivals[0] - result.due
        for result in results
        if isinstance(result.answer, Streamed) and result.answer.arrivals
    ]
    between = [
        later - earlier
        for answer in answers
        for earlier, later in itertools.pairwise(answer.arrivals)
    ]
    counted = all(answer.counted for answer in answers)
    sent = sorted(result.sent for result in results)
    return Outcome(
        what, adapters, seconds,
        (len(sent) - 1) / (sent[-1] - sent[0]) if load.rate is not None and sent[1:] else None,
        len(answers), dict(Counter(r.answer for r in results if isinstance(r.answer, str))),
        sum(answer.tokens for answer in answers) if counted else None,
        sum(len(answer.arrivals) for answer in answers),
        sum(answer.prompt_tokens for answer in answers) if counted else None,
        ignore_eos, _percentiles(first), _percentiles(between),
        dict(Counter(r.model for r in results if isinstance(r.answer, Streamed))),
    )  # fmt: skip


def _percentiles(values: Sequence[float]) -> dict[str, float | None]:
    ordered = sorted(values)
    return {
        f"p{share}": ordered[math.ceil(share / 100 * len(ordered)) - 1] if ordered else None
        for share in _PERCENTILES
    }
