"""Rooms that are verbs: `lighten.train` is a package, and calling it trains.

`import lighten` loads none of them. Whichever way a room is imported first, `lighten.train` is
the same object, and `lighten.train(...)` calls `lighten.api.train`.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any


class _Verb(ModuleType):
    """A package that can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from lighten import api

        return getattr(api, self.__name__.rpartition(".")[2])(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """The function's own parameters, for help and notebooks."""
        from lighten import api

        return inspect.signature(getattr(api, self.__name__.rpartition(".")[2]))


def make_callable(name: str) -> None:
    """Let calls of the package go to the function of its name in `lighten.api`."""
    sys.modules[name].__class__ = _Verb
