"""One round of load on a server: tokens, seconds, and the processor seconds of its processes."""

from __future__ import annotations

import queue
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from lighten.serving.remote import Remote, ServerError, Streamed

_TEXT = (
    "the river town answer colour stone music winter bread letter garden number evening mountain "
    "window silver question harbour apple morning"
)
_WORDS = _TEXT.split()
# What a model alone says of a request; a server that is told more says more.
ExtraFields = Callable[[str], dict[str, Any]]


@dataclass(frozen=True)
class Shape:
    """What is asked.

    Attributes:
        requests: How many.
        clients: At the same time.
        words: Of a prompt.
        tokens: Of an answer at most.
    """

    requests: int
    clients: int
    words: int
    tokens: int


@dataclass
class Round:
    """What one round took.

    Attributes:
        seconds: From the first request to the last answer.
        cpu_seconds: Of the server's processes meanwhile; None where they are not known.
        tokens: Generated.
        prompt_tokens: Of prompts.
        errors: Words of errors, and how often.
        latencies: Seconds of each answer.
    """

    seconds: float = 0.0
    cpu_seconds: float | None = None
    tokens: int = 0
    prompt_tokens: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    latencies: list[float] = field(default_factory=list)

    def rate(self, what: str, per: str) -> float | None:
        """Tokens per second.

        Args:
            what: `decode` (generated tokens) or `prefill` (prompts').
            per: `wall` or `cpu`.
        """
        tokens = self.tokens if what == "decode" else self.prompt_tokens
        seconds = self.seconds if per == "wall" else self.cpu_seconds
        return tokens / seconds if seconds else None


def cpu_seconds(pid: int | None) -> float | None:
    """Processor seconds of a process and those below it so far."""
    if pid is None:
        return None
    total = 0.0
    root = psutil.Process(pid)
    for process in (root, *root.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def planned(
    models: Sequence[Any], shape: Shape, seed: int
) -> list[tuple[Any, str]]:  # fmt: skip
    """Who is asked what: each model as often as any other, and no prompt twice."""
    rng = random.Random(seed)
    order = [models[number % len(models)] for number in range(shape.requests)]
    rng.shuffle(order)
    return [
        (model, f"{seed}.{number}: write a very long story of "
                + " ".join(rng.choices(_WORDS, k=shape.words)))
        for number, model in enumerate(order)
    ]  # fmt: skip


def one_round(
    remote: Remote, models: Sequence[str], shape: Shape, *, pid: int | None, seed: int,
    extra_fields: ExtraFields | None = None, streamed: bool = False,
) -> Round:  # fmt: skip
    """Send requests that name models at random and wait for the answers.

    Answers come whole, so that reading them takes next to nothing from the server's cores; unless
    the cost of streams is what is measured.

    Args:
        remote: The server.
        models: Who is asked.
        shape: What.
        pid: Of the server's first process; None: it is not of this machine.
        seed: Of models and prompts; a prompt never comes twice, so no cache answers it.
        extra_fields: More fields of a request, by model.
        streamed: Read the answers as streams.
    """
    waiting: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
    for pair in planned(models, shape, seed):
        waiting.put(pair)
    for _ in range(shape.clients):
        waiting.put(None)
    result, lock = Round(), threading.Lock()

    def client() -> None:
        while (request := waiting.get()) is not None:
            model, question = request
            began = time.perf_counter()
            try:
                tokens, prompt = _ask(
                    remote,
                    model,
                    question,
                    shape.tokens,
                    extra_fields(model) if extra_fields else {},
                    streamed,
                )
            except ServerError as error:
                with lock:
                    result.errors[str(error)[:200]] = result.errors.get(str(error)[:200], 0) + 1
                continue
            with lock:
                result.tokens += tokens
                result.prompt_tokens += prompt
                result.latencies.append(time.perf_counter() - began)

    before, began = cpu_seconds(pid), time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(shape.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    result.seconds = time.perf_counter() - began
    after = cpu_seconds(pid)
    result.cpu_seconds = None if before is None or after is None else after - before
    return result


def _ask(
    remote: Remote,
    model: str,
    question: str,
    tokens: int,
    extra_fields: dict[str, Any],
    streamed: bool,
) -> tuple[int, int]:
    """Tokens of the answer and of the prompt."""
    messages = [{"role": "user", "content": question}]
    if streamed:
        into = Streamed()
        for _ in remote.stream(
            model, messages, into, temperature=0, max_tokens=tokens, **extra_fields
        ):
            pass
        return into.tokens, into.prompt_tokens
    answer = remote.chat(model, messages, temperature=0, max_tokens=tokens, **extra_fields)
    return answer["usage"]["completion_tokens"], answer["usage"]["prompt_tokens"]


@dataclass(frozen=True)
class Compared:
    """Rounds of two kinds, in turns.

    Attributes:
        what: `decode` or `prefill`.
        rounds: By kind.
    """

    what: str
    rounds: dict[str, list[Round]]

    def rates(self, kind: str, per: str) -> list[float]:
        """Of each round; empty where they are not known."""
        values = [turn.rate(self.what, per) for turn in self.rounds[kind]]
        return [rate for rate in values if rate is not None]

    def ratio(self, kind: str, other: str, per: str) -> dict[str, float] | None:
        """Median, smallest and largest of one kind's rate over the other's, round by round."""
        pairs = list(zip(self.rates(kind, per), self.rates(other, per), strict=True))
        if not pairs:
            return None
        ratios = [a / b for a, b in pairs]
        return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}

    def to_dict(self) -> dict[str, Any]:
        """Medians and spreads, for JSON."""
        figures: dict[str, Any] = {}
        for kind, rounds in self.rounds.items():
            for per in ("cpu", "wall"):
                if rates := self.rates(kind, per):
                    figures[f"{kind}_per_{per}_s"] = [round(rate, 1) for rate in rates]
            errors: Counter[str] = sum((Counter(turn.errors) for turn in rounds), Counter())
            if errors:
                figures[f"{kind}_errors"] = dict(errors)
        return figures


def in_turns(
    what: str, kinds: dict[str, Callable[[int], Round]], rounds: int
) -> Compared:  # fmt: skip
    """Rounds of each kind, one after another, so that a busy minute meets all of them.

    Args:
        what: `decode` or `prefill`.
        kinds: A round of each, by the round's seed.
        rounds: Of each; one more before them warms up.
    """
    results: dict[str, list[Round]] = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        for place, (kind, run) in enumerate(kinds.items()):
            result = run(1000 * number + place)
            if number:
                results[kind].append(result)
    return Compared(what, results)
