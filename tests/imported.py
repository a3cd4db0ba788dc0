"""Imported last by the process that the tests' commands are forked from: all of lighten.

What it has imported stays: nobody need look for garbage there, and copy each page by doing so.
"""

import contextlib
import gc
import importlib
from pathlib import Path

import lighten
from tests import quick_rates as quick_rates

PACKAGE = Path(lighten.__file__).parent
for file in sorted(PACKAGE.rglob("*.py")):
    if file.name == "__main__.py":
        continue
    name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
    with contextlib.suppress(ImportError):  # it needs an extra that is not installed
        importlib.import_module(name.removesuffix(".__init__"))
gc.collect()
gc.freeze()
