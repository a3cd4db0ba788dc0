"""Find, load and describe a base model from a hub id, a folder, a GGUF file or a package."""

from lighten.models.catalogue import ModelEntry, available
from lighten.models.describe import Description, describe, limits, skeleton
from lighten.models.limits import IdsError, Limits, limits_of
from lighten.models.load import Base, load, load_tokenizer
from lighten.models.quantized import Census, census

__all__ = [
    "Base", "Census", "Description", "IdsError", "Limits", "ModelEntry", "available", "census",
    "describe", "limits", "limits_of", "load", "load_tokenizer", "skeleton",
]  # fmt: skip
