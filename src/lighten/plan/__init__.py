"""Say what fits before anything is downloaded: the engine's own step, traced without data."""

from lighten.plan.result import PARTS, Memory, MemoryPart, Plan, Shape, StepTime

__all__ = ["PARTS", "Memory", "MemoryPart", "Plan", "Shape", "StepTime"]
