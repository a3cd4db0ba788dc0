"""Say what fits before anything is downloaded: the engine's own step, traced without data.

The package is also the verb: `lighten.plan("recipe.yaml", device="t4")` calls `lighten.api.plan`.
"""

from lighten.plan.result import PARTS, Change, Memory, MemoryPart, Plan, Shape, StepTime
from lighten.verbs import make_callable

__all__ = ["PARTS", "Change", "Memory", "MemoryPart", "Plan", "Shape", "StepTime"]

make_callable(__name__)
