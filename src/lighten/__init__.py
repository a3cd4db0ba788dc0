"""lighten: make a large language model lighter, faster and cheaper, and prove it.

    import lighten

    run = lighten.train("recipe.yaml", learning_rate=1e-4)
    lighten.evaluate(run)
    lighten.report(run)

Importing this loads nothing heavy: each verb loads what it needs when it is called.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lighten.api import (
        adapter_info,
        audit,
        bench,
        evaluate,
        export,
        plan,
        push,
        quantize,
        report,
        resize_adapter,
        run,
        serve,
        sweep,
        train,
        verify,
    )
    from lighten.errors import UserError
    from lighten.recipe import Recipe
    from lighten.runs import Run

__all__ = [
    "Recipe", "Run", "UserError", "adapter_info", "audit", "bench", "evaluate", "export", "plan",
    "push", "quantize", "report", "resize_adapter", "run", "serve", "sweep", "train", "verify",
]  # fmt: skip

_HOME = {"Recipe": "lighten.recipe", "Run": "lighten.runs", "UserError": "lighten.errors"}


def __dir__() -> list[str]:
    """What can be asked for, though it is loaded only then: tab keys of notebooks show it."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])


def __getattr__(name: str) -> Any:
    """Load a verb or class when it is first asked for."""
    if name in __all__:
        return getattr(importlib.import_module(_HOME.get(name, "lighten.api")), name)
    raise AttributeError(f"module 'lighten' has no attribute {name!r}")
