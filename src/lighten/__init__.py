"""lighten: make a large language model lighter, faster and cheaper, and prove it."""

__version__ = "0.1.0"
