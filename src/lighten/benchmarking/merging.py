"""A base with an adapter merged into it, as a folder: a job of `lighten.jobs`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def run(adapter: str, *, folder: str) -> Iterator[dict[str, Any]]:
    """Merge in 16 bits.

    Args:
        adapter: Folder in PEFT's format, which names its base.
        folder: Where the model goes.

    Raises:
        UserError: The adapter cannot be merged.
    """
    from lighten.benchmarking.answering import merge_into

    merge_into(adapter, Path(folder), "auto")
    yield {"folder": folder}
