"""What a difference with its interval says, in words."""

from __future__ import annotations

import math

from lighten.data import FEWEST
from lighten.evaluation.bootstrap import Estimate


def verdict(difference: Estimate, examples: int, *, lower_is_better: bool) -> str:
    """In words: `better` or `worse` only where the whole interval says so.

    A percentile interval of few examples is too narrow: without any true difference it excludes
    zero for half of all pairs of examples and for 15 % of fives; from twenty on it is near its 5 %.
    """
    if math.isnan(difference.value):
        return "not a number"
    if examples < FEWEST or difference.low is None or difference.high is None:
        return "too few examples"
    if difference.low > 0:
        return "worse" if lower_is_better else "better"
    if difference.high < 0:
        return "better" if lower_is_better else "worse"
    return "no difference found"
