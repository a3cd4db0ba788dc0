"""Smaller models, in the formats of other software; what each promises is in its module.

The package is also the verb: `lighten.quantize(run, to)` calls `lighten.api.quantize`.
"""

from lighten.verbs import make_callable

make_callable(__name__)
