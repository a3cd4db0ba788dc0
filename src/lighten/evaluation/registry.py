"""Metrics beside the five that every evaluation has: by name, or a function of the user's.

Each is a mean over examples of one number in percent, so that it can be resampled like the rest.
Texts come normalised to NFC: the same Korean word in NFD shares no character with it.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sacrebleu.metrics.chrf import CHRF

from lighten.errors import UserError
from lighten.evaluation.bootstrap import Array, FromSums
from lighten.evaluation.metrics import (
    METRICS,
    Metric,
    TextMetric,
    bleu,
    chrf,
    exact_match_statistics,
    percent,
)

# Letters and digits in a row, or one sign of scripts that glue particles to words or have no
# spaces: Hangul, kana, Han.
_SIGN = r"[\u1100-\u11ff\u3040-\u30ff\u3130-\u318f\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3]"
_TOKEN = re.compile(rf"{_SIGN}|(?!{_SIGN})[^\W_](?:(?!{_SIGN})\S)*")
# Words between spaces as SQuAD has them, and single signs where particles are glued to words.
_WORD = re.compile(rf"{_SIGN}|(?:(?!{_SIGN})\S)+")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
Score = Callable[[str, str], float]
SHOWN = 80  # signs of an answer in a message


def nfc(texts: Sequence[str]) -> list[str]:
    """Texts with composed characters."""
    return [unicodedata.normalize("NFC", text) for text in texts]


def tokens_of(text: str) -> list[str]:
    """What ROUGE counts: rouge-score's own words in ASCII, single signs of Hangul, kana and Han.

    rouge-score's tokenizer drops all that is not ASCII, so that Korean scores 0.
    """
    # Marks belong to the letters before them: without vowel signs two words of Hindi are one.
    words = (
        sign if sign.isalnum() or unicodedata.category(sign)[0] == "M" else " "
        for sign in text.lower()
    )
    return _TOKEN.findall("".join(words))


def rouge_n(answer: str, reference: str, n: int) -> float:
    """F1 of the n-grams, 0 to 1."""
    ours, theirs = (
        Counter(zip(*(tokens[i:] for i in range(n)), strict=False))
        for tokens in (tokens_of(answer), tokens_of(reference))
    )
    return _f1((ours & theirs).total(), ours.total(), theirs.total())


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence, 0 to 1."""
    ours, theirs = tokens_of(answer), tokens_of(reference)
    row = [0] * (len(theirs) + 1)
    for token in ours:
        before = 0
        for place, other in enumerate(theirs, 1):
            longest = before + 1 if token == other else max(row[place], row[place - 1])
            before, row[place] = row[place], longest
    return _f1(row[-1], len(ours), len(theirs))


def token_f1(answer: str, reference: str) -> float:
    """F1 of the words as SQuAD counts them: no case, no punctuation, no articles; 0 to 1.

    Hangul, kana and Han are counted by sign, as KorQuAD counts them: a particle behind the right
    word (`서울은` for `서울`) is not another word.
    """
    ours, theirs = (Counter(_words(text)) for text in (answer, reference))
    if not ours or not theirs:
        return float(ours == theirs)
    return _f1((ours & theirs).total(), ours.total(), theirs.total())


def valid_json(answer: str, _reference: str) -> float:
    """1 where the whole answer is JSON."""
    try:
        json.loads(answer, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _words(text: str) -> list[str]:
    bare = "".join(sign for sign in text.lower() if not _is_punctuation(sign))
    return _WORD.findall(_ARTICLES.sub(" ", bare))


def _is_punctuation(sign: str) -> bool:
    """SQuAD's, which is ASCII's with signs such as $, and that of every other script."""
    return sign in string.punctuation or unicodedata.category(sign)[0] == "P"


def _f1(shared: int, ours: int, theirs: int) -> float:
    return 2 * shared / (ours + theirs) if shared else 0.0


SCORES: dict[str, tuple[str, Score]] = {
    "rouge1": ("ROUGE-1", lambda a, r: rouge_n(a, r, 1)),
    "rouge2": ("ROUGE-2", lambda a, r: rouge_n(a, r, 2)),
    "rougeL": ("ROUGE-L", rouge_l),
    "token_f1": ("token F1, %", token_f1),
    "json_valid": ("valid JSON, %", valid_json),
}
CHRF_SPACES = "chrf_spaces"
NAMES = (*SCORES, CHRF_SPACES)
OF_ANSWERS = ("chrf", "bleu", "exact_match")  # that every evaluation has
_USUAL = {metric.name: metric for metric in METRICS}
TOKEN_F1_SIGNATURE = "f1|case:lc|tok:words, Hangul, kana and Han by sign|punct:P*|articles:no"
ROUGE_SIGNATURE = "f1|case:lc|tok:words, Hangul, kana and Han by sign|stemmer:no"


@dataclass(frozen=True)
class Extra:
    """One more metric.

    Attributes:
        metric: Name, label and direction.
        statistics: Per-example statistics [examples, K] of answers and references.
        formula: The metric from their sums.
        signature: What has to be the same for two figures to be comparable.
    """

    metric: Metric
    statistics: Callable[[Sequence[str], Sequence[str]], Array]
    formula: FromSums
    signature: str


def described(name: str) -> Metric:
    """How to read a metric; a function of the user's need not be at hand any more."""
    if name in _USUAL:
        return _USUAL[name]
    if name == CHRF_SPACES:
        return Metric(name, "chrF with spaces", False)
    return Metric(name, SCORES[name][0] if name in SCORES else name, False)


def scorer(name: str) -> Extra:
    """Any metric of answers by its name: those of every evaluation, and more.

    Raises:
        UserError: There is no such metric, module or function.
    """
    if name not in OF_ANSWERS:
        return extra(name)
    if name == "exact_match":
        return Extra(described(name), exact_match_statistics, percent, name)
    text = bleu() if name == "bleu" else chrf()
    return Extra(described(name), text.statistics, text, text.signature)


def extra(name: str) -> Extra:
    """A metric by its name, or a user's `module:function`.

    Args:
        name: The function is given an answer and its reference and returns a number, which is
            averaged; the more the better.

    Raises:
        UserError: There is no such metric, module or function.
    """
    if name == CHRF_SPACES:
        spaced = TextMetric(CHRF(whitespace=True))
        return Extra(described(name), spaced.statistics, spaced, spaced.signature)
    if name in SCORES:
        score = SCORES[name][1]
        signature = ROUGE_SIGNATURE if name.startswith("rouge") else name
        signature = TOKEN_F1_SIGNATURE if name == "token_f1" else signature
        return Extra(described(name), lambda a, r: _mean(name, score, a, r, 1.0), percent,
                     signature)  # fmt: skip
    function = _naming_its_answer(name, _user_function(name))
    return Extra(described(name), lambda a, r: _mean(name, function, a, r, 0.01), percent, name)


def _mean(
    name: str, score: Score, answers: Sequence[str], references: Sequence[str], scale: float
) -> Array:
    """[examples, 2]: what each example scores, and 1."""
    require_pairs(answers, references)
    values = []
    for answer, reference in zip(answers, references, strict=True):
        value = score(answer, reference)
        if isinstance(value, str) or not isinstance(value, int | float | np.number | np.bool_):
            raise UserError(f"metric {name} returned {value!r}: return a number for each answer")
        if not math.isfinite(value):
            raise UserError(f"metric {name} returned {value}: return a finite number")
        values.append(scale * float(value))
    return np.stack([np.asarray(values), np.ones(len(values))], axis=1)


def _naming_its_answer(name: str, function: Score) -> Score:
    """A user's function whose mistakes name the answer that it made them on."""

    def score(answer: str, reference: str) -> float:
        try:
            return function(answer, reference)
        except Exception as error:
            shown = answer if len(answer) <= SHOWN else f"{answer[:SHOWN]}…"
            raise UserError(
                f"metric {name} failed on the answer {shown!r}: {_error_text(error)}"
            ) from error

    return score


def _error_text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def require_pairs(answers: Sequence[str], references: Sequence[str]) -> None:
    """There are as many answers as references: scorers that stop at the shorter list hide losses.

    Raises:
        UserError: There are not.
    """
    if len(answers) != len(references):
        raise UserError(
            f"{len(answers)} answers cannot be scored against {len(references)} references: there "
            "must be one for each"
        )


def _user_function(name: str) -> Score:
    if not _FUNCTION.fullmatch(name):
        raise UserError(
            f"evaluate.extra_metrics: {name!r} is not known; known are {', '.join(NAMES)}, and a "
            "function of yours: module:function"
        )
    module, _, function = name.partition(":")
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        score = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise UserError(f"metric {name} cannot be imported: {error}") from error
    except AttributeError as error:
        raise UserError(f"metric {name}: {module} has no function {function}") from error
    except Exception as error:  # whatever their module does when it is imported
        raise UserError(f"metric {name} cannot be imported: {_error_text(error)}") from error
    finally:
        sys.path.remove(folder)
    if not callable(score):
        raise UserError(f"metric {name}: {function} is no function")
    try:
        inspect.signature(score).bind("", "")
    except TypeError as error:
        raise UserError(
            f"metric {name}: {function} is given an answer and its reference, but {error}"
        ) from error
    except ValueError:  # written in C: it has none
        pass
    user_score: Score = score
    return user_score
