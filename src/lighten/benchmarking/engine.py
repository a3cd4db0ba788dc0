"""Answers of our engine, timed as those of transformers are.

Dimensions: B prompts side by side, T tokens of each, N tokens answered.
"""

from __future__ import annotations

import threading
import time
from itertools import pairwise
from typing import Any

from lighten.benchmarking.rates import figures, random_prompts
from lighten.generation.engine import Engine
from lighten.generation.request import Request
from lighten.generation.sampling import Chosen
from lighten.generation.settings import Sampling
from lighten.machine.timing import measure_step


def answer_together(
    engine: Engine, adapter: str | None, model: Any, rows: int, tokens: int, new_tokens: int,
    device: str, budget_s: float,
) -> dict[str, Any]:  # fmt: skip
    """Greedy answers to random prompts, timed token by token.

    Args:
        engine: Holds the model; nothing else is under way.
        adapter: That answers; None: the base.
        model: The engine's.
        rows: B.
        tokens: T.
        new_tokens: N; each answer has exactly so many.
        device: Where it is.
        budget_s: Seconds for the repeats.

    Raises:
        BaseException: What an answer ended with.
    """
    prompts = random_prompts(model, rows, tokens).tolist()
    firsts: list[float] = []
    laps: list[list[float]] = []

    def generate() -> None:
        began = time.perf_counter()
        moments: list[list[float]] = [[] for _ in prompts]
        ends: list[str | BaseException] = []
        complete = threading.Event()

        def end(reason: str | BaseException) -> None:
            ends.append(reason)
            if len(ends) == rows:
                complete.set()

        def submit(prompt: list[int], times: list[float]) -> None:
            def note(token: Chosen) -> None:
                del token
                times.append(time.perf_counter())

            engine.submit(
                Request(prompt, adapter, new_tokens, frozenset(), Sampling(temperature=0.0),
                        None, note, end)
            )  # fmt: skip

        for prompt, times in zip(prompts, moments, strict=True):
            submit(prompt, times)
        complete.wait()
        for reason in ends:
            if isinstance(reason, BaseException):
                raise reason
        # A token counts when all rows have theirs.
        last_moments = [max(row[place] for row in moments) for place in range(new_tokens)]
        firsts.append(last_moments[0] - began)
        laps.append([after - before for before, after in pairwise(last_moments)])

    timing = measure_step(generate, device=device, budget_s=budget_s, least=3)
    return figures(timing, firsts, laps, rows, tokens)
