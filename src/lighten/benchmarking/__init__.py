"""How fast a model answers and trains here, in how much memory, with proof of both."""

PARTS = ("size", "generate", "attention", "train", "max-batch")

__all__ = ["PARTS"]
