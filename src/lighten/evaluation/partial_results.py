"""What was measured of a model so far, on disk: a kill in the middle of it loses one batch.

A JSON line for the losses and one for each batch of answers, in a file that goes when the whole is
written elsewhere. A line is known by what it was made of (the prompts' tokens, how long an answer
may be), so that other prompts never get these answers.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lighten import runs
from lighten.machine.hardware import PeakMemory

MADE_WITH = "made with"  # the key of the first line
WEIGHTS = (".safetensors", ".bin")


class PartialResults:
    """What was measured of models in a session that was ended, and since.

    Args:
        path: Of the file; it need not exist.
        made_with: What else decides the figures; those that were made with other things go.
    """

    def __init__(self, path: Path, made_with: str = "") -> None:
        self.path, self._made_with = path, made_with
        self._model = ""
        self._memory: PeakMemory | None = None
        self._lines = {str(line.get("key")): line for line in runs.read_lines(path)}
        if made_with and self._lines and self._lines.get(MADE_WITH, {}).get("is") != made_with:
            self.forget()

    def of_model(self, name: str, memory: PeakMemory) -> PartialResults:
        """The parts of one model, each with the memory that it had taken by then."""
        part = copy.copy(self)
        part._model, part._memory = f"{name}/", memory
        return part

    def get(self, key: str) -> dict[str, Any] | None:
        """What was kept under a key, or None."""
        return self._lines.get(self._model + key)

    def put(self, key: str, values: Mapping[str, Any]) -> None:
        """Keep values under a key.

        Raises:
            UserError: The disk is full.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._made_with and MADE_WITH not in self._lines:
            self._append({"key": MADE_WITH, "is": self._made_with})
        memory = {} if self._memory is None else {"memory": self._memory.read()}
        self._append({"key": self._model + key, **memory, **values})

    def peak(self) -> dict[str, Any]:
        """Of all sessions that measured the model, as `PeakMemory.read` gives it."""
        assert self._memory is not None
        before = [
            line["memory"] for key, line in self._lines.items()
            if key.startswith(self._model) and "memory" in line
        ]  # fmt: skip
        return max([self._memory.read(), *before], key=lambda one: int(one["peak_bytes"]))

    def _append(self, line: dict[str, Any]) -> None:
        runs.append_line(self.path, line)
        self._lines[line["key"]] = line

    def forget(self) -> None:
        """The whole is written: these lines go."""
        self.path.unlink(missing_ok=True)
        self._lines.clear()


def digest_of(values: Any, folders: Iterable[Path]) -> str:
    """Of what decides figures: plain values, and the weights that lie in folders."""
    files = [
        [str(file), file.stat().st_size, file.stat().st_mtime_ns]
        for folder in folders
        for file in sorted(folder.glob("*"))
        if file.suffix in WEIGHTS
    ]
    text = json.dumps([values, files], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def key_of(part: str, made_of: Sequence[Sequence[int]], *numbers: int) -> str:
    """The name of a part: what it is, and a digest of the tokens it was made of.

    Args:
        part: `loss` or `answers`.
        made_of: Token ids, row by row.
        numbers: Numbers that decide what comes out.
    """
    digest = hashlib.sha256(json.dumps([[*map(int, ids)] for ids in made_of]).encode())
    return "-".join([part, *map(str, numbers), digest.hexdigest()[:24]])
