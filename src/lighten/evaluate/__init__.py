"""Evaluation: base and adapters on the same held-out examples, with intervals.

The package is also the verb: `lighten.evaluate(run)` calls `lighten.api.evaluate`.
"""

from lighten.verbs import make_callable

make_callable(__name__)
