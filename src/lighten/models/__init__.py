"""Find, load and describe a base model from a hub id, a folder, a GGUF file or a package."""

from lighten.models.catalogue import ModelEntry, available
from lighten.models.describe import Description, describe
from lighten.models.load import Base, load, load_tokenizer

__all__ = ["Base", "Description", "ModelEntry", "available", "describe", "load", "load_tokenizer"]
