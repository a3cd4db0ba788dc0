"""Training: a cohort of adapters over one frozen base, from a recipe to a run folder.

The package is also the verb: `lighten.train("recipe.yaml")` calls `lighten.api.train`.
"""

from lighten.verbs import make_callable

make_callable(__name__)
