"""What a process takes beside its tensors once it trains or answers here, measured in a fresh one.

Pages of libraries that the first products touch, kernels that oneDNN compiles, the interpreter's
and autograd's own objects: half of it depends on the processor. So a tiny model trains or answers
for a moment in a process of its own, a few seconds once for each machine, and the figures are kept
in the user's cache folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lighten import cpu, runs
from lighten.errors import UserError
from lighten.machine.hardware import cache_folder, processor_name, versions

MIB = 2**20
FILE, ANSWERS_FILE = "context.json", "answer_context.json"
TIMEOUT_S = 120


@dataclass(frozen=True)
class Context:
    """What comes with training and is no tensor's.

    Attributes:
        bytes: Resident in the process that trains, a tokenizer's aside.
        worker_bytes: Of each further process that computes micro-batches, beside what it shares.
    """

    bytes: int
    worker_bytes: int


# Where it cannot be measured: a Xeon with AMX, torch 2.13.
UNMEASURED = Context(115 * MIB, 100 * MIB)
UNMEASURED_ANSWER = 25 * MIB  # where it cannot be, either: an EPYC with AVX512-BF16, torch 2.13


def context_of(path: Path | None = None) -> Context:
    """This machine's.

    Args:
        path: Where the figures are kept; default in the cache folder.
    """
    measured = _measured("training", path or cache_folder() / FILE)
    try:
        return Context(int(measured["bytes"]), int(measured["worker_bytes"]))
    except (KeyError, TypeError, ValueError):
        return UNMEASURED


def answer_bytes(path: Path | None = None) -> int:
    """What is resident in a process that answers here and is no tensor's, a tokenizer's aside.

    Args:
        path: Where the figure is kept; default in the cache folder.
    """
    measured = _measured("answering", path or cache_folder() / ANSWERS_FILE)
    try:
        return int(measured["bytes"])
    except (KeyError, TypeError, ValueError):
        return UNMEASURED_ANSWER


def _measured(what: str, path: Path) -> dict[str, Any]:
    """Figures of a process, from a file or measured now; none where they cannot be.

    Args:
        what: As `lighten.planning.measured_overhead` takes it.
        path: Where they are kept.
    """
    stamp = [
        processor_name(), os.cpu_count(), versions().get("torch"), versions()["transformers"],
        cpu.enabled(),
    ]  # fmt: skip
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
        if record["of"] == stamp:
            return dict(record)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not measured yet
    try:
        completed = subprocess.run(
            [sys.executable, "-m", "lighten.planning.measured_overhead", what],
            capture_output=True, text=True, check=True, timeout=TIMEOUT_S,
        )  # fmt: skip
        figures = dict(json.loads(completed.stdout.strip().splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError, TypeError):
        return {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        runs.write_json(path, {"of": stamp, **figures})
    except (OSError, UserError):
        pass  # measured again the next time
    return figures
