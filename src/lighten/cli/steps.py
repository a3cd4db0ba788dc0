"""What `lighten run` prints of each step once it is done: as the verb's own command does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lighten.cli.console import console
from lighten.cli.evaluate import print_evaluation
from lighten.cli.quantize import print_quantized
from lighten.errors import NoHeldOut


def print_step(verb: str, result: Any) -> None:
    """Print a step's result.

    Args:
        verb: That was done.
        result: What it returned; the error where nothing is held out.
    """
    if isinstance(result, NoHeldOut):
        console().print(f"not evaluated: {result}", highlight=False, markup=False)
    else:
        _PRINTED[verb](result)


def print_report(page: Path) -> None:
    """Print where the page is."""
    console().print(f"report: {page}", soft_wrap=True, highlight=False)


_PRINTED: dict[str, Callable[[Any], None]] = {
    "evaluate": lambda evaluation: print_evaluation(evaluation.to_dict()),
    "quantize": print_quantized,
    "report": print_report,
}
