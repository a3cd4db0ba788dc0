"""The sweep: many settings over one base in little more than one run, and which to take.

The package is also the verb: `lighten.sweep(recipe)` calls `lighten.api.sweep`.
"""

from lighten.verbs import make_callable

make_callable(__name__)
