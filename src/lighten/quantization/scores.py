"""How far a model's answers are from another's, on the same tokens, one row at a time.

Dimensions: T tokens of a row, V words of the vocabulary.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lighten.engine.validation_loss import ValidationLoss

Floats = np.ndarray[Any, np.dtype[np.float32]]
DECODED = 32  # tokens whose time is taken


@dataclass(frozen=True)
class EvaluationRow:
    """A held-out row.

    Attributes:
        ids: Token ids, T.
        supervised: Of each, whether it counts for the loss.
    """

    ids: list[int]
    supervised: list[bool]

    @property
    def places(self) -> list[int]:
        """Positions whose next token counts."""
        return [place - 1 for place, on in enumerate(self.supervised) if on and place]


Scorer = Callable[[list[int]], Floats]  # token ids [T] to log-probabilities [T, V]


def score(
    rows: Sequence[EvaluationRow], log_probabilities: Scorer, store: Path | None, *, reference: bool
) -> dict[str, list[float]]:
    """Likelihood of each row, and its distance from the reference's predictions.

    Args:
        rows: What is predicted.
        log_probabilities: Of the model.
        store: Folder of the reference's predictions; None: likelihoods alone.
        reference: Write them, instead of comparing with them.

    Returns:
        By row: `nll` in nats and `tokens`; unless it is the reference `kl` (reference from model,
        in nats, summed) and `agreed` (tokens whose likeliest is the same).
    """
    by_row: dict[str, list[float]] = {"nll": [], "tokens": [], "kl": [], "agreed": []}
    for number, row in enumerate(rows):
        places = row.places
        log_probs = log_probabilities(row.ids)[places]
        next_ids = [row.ids[place + 1] for place in places]
        by_row["nll"].append(
            float(-log_probs[np.arange(len(places)), next_ids].sum(dtype=np.float64))
        )
        by_row["tokens"].append(len(places))
        if store is None:
            continue
        file = store / f"{number}.npy"
        if reference:
            np.save(file, log_probs)
            continue
        reference_log_probs = np.load(file)
        words = min(
            reference_log_probs.shape[1], log_probs.shape[1]
        )  # a file may pad its vocabulary
        reference_log_probs, log_probs = reference_log_probs[:, :words], log_probs[:, :words]
        by_row["kl"].append(
            float(
                (np.exp(reference_log_probs) * (reference_log_probs - log_probs)).sum(
                    dtype=np.float64
                )
            )
        )
        by_row["agreed"].append(int((reference_log_probs.argmax(-1) == log_probs.argmax(-1)).sum()))
    return by_row


def summary(by_row: dict[str, list[float]]) -> dict[str, Any]:
    """Perplexity with its standard error, mean KL and agreement over all tokens."""
    rows = ValidationLoss(tuple(by_row["nll"]), tuple(int(n) for n in by_row["tokens"]))
    perplexity, error = math.exp(min(rows.loss, 700)), rows.standard_error
    values: dict[str, Any] = {
        "loss": rows.loss,
        "loss_standard_error": error,
        "perplexity": perplexity,
        # Of exp(loss), to first order.
        "perplexity_standard_error": None if error is None else perplexity * error,
        "tokens": sum(rows.tokens),
    }
    if by_row["kl"]:
        values["kl"] = sum(by_row["kl"]) / values["tokens"]
        values["top1_agreement"] = sum(by_row["agreed"]) / values["tokens"]
    else:
        values["kl"], values["top1_agreement"] = 0.0, 1.0
    return values


def speeds(
    prompt: Sequence[int],
    prefill: Callable[[list[int]], Any],
    decode: Callable[[list[int], int], int],
    repeats: int = 1,
) -> dict[str, Any]:
    """Tokens per second of reading a prompt and of writing an answer, one sequence at a time.

    Args:
        prompt: Token ids.
        prefill: Reads them.
        decode: Reads them and writes so many tokens; returns how many.
        repeats: Answers that are timed.

    Returns:
        Both rates, and `decode_samples`: seconds per written token of each answer.
    """
    ids = list(prompt)
    prefill(ids)  # what is allocated at first is no part of it
    prefill_seconds = min(_seconds(lambda: prefill(ids)) for _ in range(2))
    samples = []
    for _ in range(repeats):
        began = time.perf_counter()
        count = decode(ids, DECODED)
        decode_seconds = max(time.perf_counter() - began - prefill_seconds, 1e-9)
        samples.append(decode_seconds / max(1, count - 1))
    return {
        "prefill_tokens_per_second": len(ids) / prefill_seconds,
        "decode_tokens_per_second": 1 / statistics.median(samples),
        "decode_samples": samples,
    }


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
