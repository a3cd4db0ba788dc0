"""Find, load and describe a base model from a hub id, a folder, a GGUF file or a package."""

from lighten.models.catalogue import ModelEntry, available
from lighten.models.describe import Description, describe, skeleton
from lighten.models.load import Base, load, load_tokenizer
from lighten.models.quantized import Census, census

__all__ = [
    "Base", "Census", "Description", "ModelEntry", "available", "census", "describe", "load",
    "load_tokenizer", "skeleton",
]  # fmt: skip
