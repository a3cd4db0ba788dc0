"""Evaluation: base and adapters on the same held-out examples, with intervals."""
