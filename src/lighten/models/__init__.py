"""Find, load and describe a base model from a hub id, a folder, a GGUF file or a package.

Names are looked up here when they are used: what a model is called, and which are on this machine,
is told without loading torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lighten.models.catalogue import ModelEntry, available
    from lighten.models.describe import Description, cache_argument, describe, limits, skeleton
    from lighten.models.limits import Limits, limits_of
    from lighten.models.load import Base, load, load_tokenizer
    from lighten.models.quantized import Census, census

__all__ = [
    "Base", "Census", "Description", "Limits", "ModelEntry", "available", "cache_argument",
    "census", "describe", "limits", "limits_of", "load", "load_tokenizer", "skeleton",
]  # fmt: skip
_WHERE = {
    **dict.fromkeys(("ModelEntry", "available"), "catalogue"),
    **dict.fromkeys(
        ("Description", "cache_argument", "describe", "limits", "skeleton"), "describe"
    ),
    **dict.fromkeys(("Limits", "limits_of"), "limits"),
    **dict.fromkeys(("Base", "load", "load_tokenizer"), "load"),
    **dict.fromkeys(("Census", "census"), "quantized"),
}


class _Room(ModuleType):
    """The package; a function that has its module's name is what the name stands for."""

    def __getattr__(self, name: str) -> Any:
        if name not in _WHERE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in _WHERE):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Room
