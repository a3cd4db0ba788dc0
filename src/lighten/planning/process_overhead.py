"""What a process takes beside its tensors once it trains here, measured in one of its own.

Pages of libraries that the first products touch, kernels that oneDNN compiles, the interpreter's
and autograd's own objects: half of it depends on the processor. So a tiny model trains for a moment
in a fresh process, a few seconds once for each machine, and the figures are kept in the user's
cache folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lighten import runs
from lighten.errors import UserError
from lighten.machine.hardware import cache_folder, processor_name, versions

MIB = 2**20
FILE = "context.json"
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


def context_of(path: Path | None = None) -> Context:
    """This machine's.

    Args:
        path: Where the figures are kept; default in the cache folder.
    """
    path = path or cache_folder() / FILE
    stamp = [processor_name(), os.cpu_count(), versions().get("torch"), versions()["transformers"]]
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
        if record["of"] == stamp:
            return Context(int(record["bytes"]), int(record["worker_bytes"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not measured yet
    try:
        completed = subprocess.run(
            [sys.executable, "-m", "lighten.planning.measured_overhead"], capture_output=True,
            text=True, check=True, timeout=TIMEOUT_S,
        )  # fmt: skip
        context = Context(**json.loads(completed.stdout.strip().splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError, TypeError):
        return UNMEASURED
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        runs.write_json(path, {"of": stamp, **asdict(context)})
    except (OSError, UserError):
        pass  # measured again the next time
    return context
