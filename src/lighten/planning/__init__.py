"""Say what fits before anything is downloaded: the engine's own step, traced without data."""

from lighten.planning.result import PARTS, Change, Memory, MemoryPart, Plan, Shape, StepTime

__all__ = ["PARTS", "Change", "Memory", "MemoryPart", "Plan", "Shape", "StepTime"]
