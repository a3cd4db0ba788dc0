"""How every room says the same thing."""

from __future__ import annotations

import re
import shlex

# Capitals without a vowel are spelt; these are letters whose names begin with a vowel's sound.
_SPELT = re.compile(r"[B-DF-HJ-NP-TV-Z](?:[B-DF-HJ-NP-TV-Z]|(?![A-Za-z]))")
_SPOKEN_AS_VOWELS = frozenset("FHLMNRSX")


def with_article(noun: str) -> str:
    """A noun behind its article, as it is spoken: a LOHA, an Embedding, an IA3, an NF4."""
    first = noun[:1]
    vowel = first in _SPOKEN_AS_VOWELS if _SPELT.match(noun) else first.lower() in "aeio"
    return f"{'an' if vowel else 'a'} {noun}"


def first_line(error: BaseException) -> str:
    """What an error says in its first line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def typed(value: object) -> str:
    """A path or a name as it can be typed in a shell, in a command that is told."""
    return shlex.quote(str(value))


def counted(count: int, noun: str) -> str:
    """A number with its noun, which takes an s unless it is one: 1 step, 0 steps, 1,200 steps."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def diverged(steps: int, best_step: int | None) -> str:
    """What weights are of which the training did not come to its end.

    Args:
        steps: That they had made.
        best_step: The run's step at which they were best and of which they are; None: the last.
    """
    which = "before that" if best_step is None else f"of step {best_step}, its best"
    return f"Its training diverged after {counted(steps, 'step')}; its weights are those {which}."


def significant(value: float, digits: int) -> str:
    """A number in so many digits, all of those before its point shown: 0.98, 39.1, 1,081."""
    return f"{value:.{digits}g}" if abs(value) < 10**digits - 0.5 else f"{value:,.0f}"
