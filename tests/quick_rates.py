"""Plans of tests are not as sure of their seconds as a user's.

Beside another worker's tests what is timed differs from sample to sample: every plan would look at
it for as long as it may.
"""

from __future__ import annotations

from lighten.planning import rates

SHIPPED = {name: getattr(rates, name) for name in ("PATIENCE_S", "MOST_FIRST_S")}
rates.PATIENCE_S, rates.MOST_FIRST_S = 0.5, 2.0
