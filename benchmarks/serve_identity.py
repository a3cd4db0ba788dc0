"""Whether each answer is that of the adapter it names, while adapters are loaded anew.

The reference is a server that holds one adapter at a time, answers one request at a time and keeps
no state between requests. The server under test has its caches warm, many clients, prompts that
begin alike, and adapters that are trained anew in their folders, or unloaded and loaded again under
their names, all the while.

An answer is compared token by token. It is *equal* if all tokens are the reference's; it is a *tie*
if at its first other token the reference gives it a log-probability within a bound of its choice's
(kernels add in another order for other batches); all else is *wrong*. An answer whose
log-probabilities up to there are off by more than the bound is wrong. The bound is told with the
result.
"""

from __future__ import annotations

import itertools
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lighten.serving.remote import Remote, ServerError

TIE = 0.01  # of llama.cpp in float32; our engine is held to equal numbers
_TOKENS, _TOP = 16, 5
_WAIT_S = 0.05


@dataclass(frozen=True)
class Answer:
    """What came back, and when it was under way (`time.perf_counter()`)."""

    text: str
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    top: tuple[dict[str, float], ...]
    began: float = 0.0
    ended: float = 0.0


@dataclass
class Report:
    """What was compared.

    Attributes:
        tie: Bound of log-probabilities.
        equal: Answers that are the reference's, token by token.
        ties: Answers whose first other token was as likely as the reference's, within `tie`.
        wrong: The rest, in words.
        waited: Requests that were sent again since their adapter was unloaded just then (404).
        either: Answers while their adapter was loaded anew: the old one's or the new one's.
        reloads: Adapters loaded meanwhile.
        largest: Largest difference of log-probabilities in equal answers.
    """

    tie: float
    equal: int = 0
    ties: int = 0
    wrong: list[str] = field(default_factory=list)
    waited: int = 0
    either: int = 0
    reloads: int = 0
    largest: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**vars(self), "wrong": len(self.wrong), "wrong_ones": self.wrong[:5]}


def questions(words: int = 40, added_words: int = 8) -> list[str]:
    """Prompts that begin alike in four ways, each the beginning of the next of its kind.

    Args:
        words: Of the first of each kind.
        added_words: Words of the next one.
    """
    rng = random.Random(5)
    words_text = "the river town answer colour stone music winter bread letter garden number"
    vocabulary = words_text.split()
    prompts = []
    for start in ("Tell me about", "List all of", "Why is it that", "Write a poem on"):
        text = f"{start} {' '.join(rng.choices(vocabulary, k=words))}"
        for _ in range(3):
            prompts.append(text)
            text += " " + " ".join(rng.choices(vocabulary, k=added_words))
    return prompts


def ask(remote: Remote, model: str, question: str) -> Answer:
    """One greedy answer with its log-probabilities.

    Raises:
        ServerError: It is an error.
    """
    began = time.perf_counter()
    answer = remote.chat(
        model, [{"role": "user", "content": question}], temperature=0,
        max_completion_tokens=_TOKENS, logprobs=True, top_logprobs=_TOP,
    )  # fmt: skip
    choice = answer["choices"][0]
    entries = (choice["logprobs"] or {}).get("content") or []
    return Answer(
        choice["message"]["content"],
        tuple(_key(entry) for entry in entries),
        tuple(entry["logprob"] for entry in entries),
        tuple({_key(top): top["logprob"] for top in entry["top_logprobs"]} for entry in entries),
        began, time.perf_counter(),
    )  # fmt: skip


def _key(token: dict[str, Any]) -> str:
    """A token that two parts of a character do not share."""
    return f"{token['token']}|{token['bytes']}"


def references(
    remote: Remote, admin: Remote, contents: dict[str, str | None], prompts: Sequence[str]
) -> dict[tuple[str, str], Answer]:
    """Each content's answers alone; at most one adapter is loaded at any time.

    Args:
        remote: A server without adapters, prefix caching turned off.
        admin: The same with its key.
        contents: Folder below the server's `--adapter-dir`, by name of the content; the base: None.
        prompts: Questions.
    """
    answers = {}
    base = next(name for name, parent in remote.models().items() if parent is None)
    for content, folder in contents.items():
        name = base
        if folder is not None:
            name = "alone"
            load(admin, name, folder)
        for question in prompts:
            answers[content, question] = ask(remote, name, question)
        if folder is not None:
            unload(admin, name)
    return answers


def load(admin: Remote, name: str, path: str) -> None:
    """Load an adapter, anew if one has the name."""
    admin.request("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})


def unload(admin: Remote, name: str) -> None:
    """Unload an adapter."""
    admin.request("POST", "/v1/unload_lora_adapter", {"lora_name": name})


class Contents:
    """Which contents a name had, and when."""

    def __init__(self, initial: dict[str, str]) -> None:
        self._lock = threading.Lock()
        # Each with the time from which an answer may be its, and until when.
        self._had = {name: [(content, 0.0)] for name, content in initial.items()}
        self._until: dict[str, list[float]] = {name: [] for name in initial}

    def now(self, name: str) -> str:
        """The newest one."""
        return self._had[name][-1][0]

    def change(self, name: str, content: str, began: float, ended: float) -> None:
        """A name has another content; the call that did it took from `began` to `ended`."""
        with self._lock:
            self._until[name].append(ended)
            self._had[name].append((content, began))

    def possible(self, name: str, answer: Answer) -> set[str]:
        """The contents that an answer may be of."""
        with self._lock:
            untils = [*self._until[name], float("inf")]
            return {
                content for (content, since), until in zip(self._had[name], untils, strict=True)
                if since <= answer.ended and until >= answer.began
            }  # fmt: skip


def under_load(
    remote: Remote, admin: Remote, folder: Path, versions: dict[str, Sequence[str]],
    alone: dict[tuple[str, str], Answer], prompts: Sequence[str], *,
    requests: int, clients: int, tie: float, seed: int = 0, pause_s: float = 0.0,
) -> Report:  # fmt: skip
    """Ask at random while adapters change, and compare.

    Args:
        remote: The server, with the first version of each adapter loaded under its name.
        admin: The same with its key.
        folder: Its `--adapter-dir`; each adapter lies below it under its name.
        versions: Contents that each name may have, folders below `folder`; of one: it stays.
        alone: See `references`.
        prompts: Questions.
        requests: How many.
        clients: At the same time.
        tie: Bound of log-probabilities, see above; 0: all numbers have to be equal.
        seed: Of the order.
        pause_s: Between two changes of adapters.
    """
    rng = random.Random(seed)
    planned = [(rng.choice(list(versions)), rng.choice(prompts)) for _ in range(requests)]
    current = Contents({name: contents[0] for name, contents in versions.items()})
    report, finished = Report(tie), threading.Event()

    def change() -> None:
        names = [name for name, contents in versions.items() if len(contents) > 1]
        for turn in itertools.count():
            if finished.is_set() or not names:
                return
            name = names[turn % len(names)]
            contents = versions[name]
            next_content = contents[(contents.index(current.now(name)) + 1) % len(contents)]
            began = time.perf_counter()
            if turn % 2:
                unload(admin, name)
            _replace(folder / name, folder / next_content)
            load(admin, name, name)
            current.change(name, next_content, began, time.perf_counter())
            report.reloads += 1
            finished.wait(pause_s)

    def ask_retrying(pair: tuple[str, str]) -> tuple[str, str, Answer]:
        while True:
            try:
                return (*pair, ask(remote, *pair))
            except ServerError as error:
                if error.status != 404:  # unloaded just now
                    raise
                report.waited += 1
                time.sleep(_WAIT_S)

    changing = threading.Thread(target=change)
    changing.start()
    try:
        with ThreadPoolExecutor(clients) as pool:
            answers = list(pool.map(ask_retrying, planned))
    finally:
        finished.set()
        changing.join()
    for name, question, answer in answers:
        possible = current.possible(name, answer)
        report.either += len(possible) > 1
        judge(report, answer, [alone[content, question] for content in possible], name)
    return report


def _replace(target: Path, source: Path) -> None:
    """Another content in an adapter's folder, as a training that ends there leaves it."""
    fresh = target.with_name(f".{target.name}-new")
    shutil.copytree(source, fresh)
    shutil.rmtree(target)
    fresh.rename(target)


def judge(report: Report, answer: Answer, expected: Sequence[Answer], name: str) -> None:
    """Count one answer."""
    verdicts = [_verdict(answer, reference, report.tie) for reference in expected]
    kinds = Counter(kind for kind, _ in verdicts)
    if kinds["equal"]:
        report.equal += 1
        report.largest = max(
            report.largest, min(difference for kind, difference in verdicts if kind == "equal")
        )
    elif kinds["tie"]:
        report.ties += 1
    else:
        report.wrong.append(
            f"{name}: {answer.text!r} is not "
            f"{' or '.join(repr(reference.text) for reference in expected)}"
        )


def _verdict(answer: Answer, alone: Answer, tie: float) -> tuple[str, float]:
    """Equal, tie or wrong, and the largest difference of log-probabilities up to there."""
    difference = 0.0
    for place, (token, expected) in enumerate(zip(answer.tokens, alone.tokens, strict=False)):
        if token != expected:
            other_logprob = alone.top[place].get(token, float("-inf"))
            is_tie = alone.logprobs[place] - other_logprob <= tie and difference <= tie
            return ("tie" if is_tie else "wrong"), difference
        difference = max(difference, abs(answer.logprobs[place] - alone.logprobs[place]))
    if answer.text == alone.text and len(answer.tokens) == len(alone.tokens):
        return ("equal" if difference <= tie else "wrong"), difference
    # One of them ended where the other went on: was the end as likely?
    shorter, longer = sorted((answer, alone), key=lambda candidate: len(candidate.tokens))
    place = len(shorter.tokens)
    if place == len(longer.tokens):
        return "wrong", difference
    chosen_logprob = longer.logprobs[place]
    alternatives = [p for token, p in longer.top[place].items() if token != longer.tokens[place]]
    is_tie = bool(alternatives) and chosen_logprob - max(alternatives) <= tie and difference <= tie
    return ("tie" if is_tie else "wrong"), difference
