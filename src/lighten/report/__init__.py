"""One run or many as a page that people can look at, offline.

The package is also the verb: `lighten.report(run)` calls `lighten.api.report`.
"""

from lighten.verbs import make_callable

make_callable(__name__)
