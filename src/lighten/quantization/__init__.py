"""Smaller models, in the formats of other software; what each promises is in its module."""
