"""Tables and cells as every verb prints them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """Where results are printed; rich loads here, not with the command line."""
    from rich.console import Console

    return Console()


def cell(value: Any) -> str:
    """A value of four digits; a measured one with its interval."""
    if value is None:
        return "–"
    if isinstance(value, dict):
        return f"{value['value']:.4g} [{value['low']:.4g}, {value['high']:.4g}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under their columns."""
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns, box=SIMPLE, pad_edge=False)
    for row in rows:
        table.add_row(*(escape(own) for own in row))
    console().print(table)
