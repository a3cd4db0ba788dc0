"""What was measured of a model so far, on disk: a kill in the middle of it loses one batch.

A JSON line for the losses and one for each batch of answers, in a file that goes when the whole is
written elsewhere. A line is known by what it was made of (the prompts' tokens, how long an answer
may be), so that other prompts never get these answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lighten import runs


class PartialResults:
    """The lines of one model's measurement.

    Args:
        path: Of the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = {str(line.get("key")): line for line in runs.read_lines(path)}

    def get(self, key: str) -> dict[str, Any] | None:
        """What was kept under a key, or None."""
        return self._lines.get(key)

    def put(self, key: str, values: Mapping[str, Any]) -> None:
        """Keep values under a key.

        Raises:
            UserError: The disk is full.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = {"key": key, **values}
        runs.append_line(self.path, line)
        self._lines[key] = line

    def forget(self) -> None:
        """The whole is written: these lines go."""
        self.path.unlink(missing_ok=True)
        self._lines = {}


def key_of(part: str, made_of: Sequence[Sequence[int]], *numbers: int) -> str:
    """The name of a part: what it is, and a digest of the tokens it was made of.

    Args:
        part: `loss` or `answers`.
        made_of: Token ids, row by row.
        numbers: Numbers that decide what comes out.
    """
    digest = hashlib.sha256(json.dumps([[*map(int, ids)] for ids in made_of]).encode())
    return "-".join([part, *map(str, numbers), digest.hexdigest()[:24]])
