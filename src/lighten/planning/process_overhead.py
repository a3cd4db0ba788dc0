"""What a process takes beside its tensors once it trains or answers here, measured in a fresh one.

Pages of libraries that the first products touch, kernels that oneDNN compiles, the interpreter's
and autograd's own objects: half of it depends on the processor. So a tiny model trains or answers
for a moment in a process of its own, a few seconds once for each environment of a machine, and the
figures are kept in the user's cache folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from lighten import cpu, runs
from lighten.errors import UserError
from lighten.machine.hardware import cache_folder, processor_name, versions
from lighten.parallel import launch

MIB = 2**20
FILE, QUANTISED_FILE = "context.json", "quantised_context.json"
ANSWERS_FILE = "answer_context.json"
TIMEOUT_S = 120


@dataclass(frozen=True)
class Context:
    """What comes with training and is no tensor's.

    Attributes:
        bytes: Resident in the process that trains, a tokenizer's aside.
        worker_bytes: Of each further process that computes micro-batches, beside what it shares.
        saving_bytes: That come when an adapter is first saved: PEFT's code, and what it imports.
    """

    bytes: int
    worker_bytes: int
    saving_bytes: int


@dataclass(frozen=True)
class AnswerContext:
    """What comes with answering and is no tensor's, a tokenizer's aside.

    Attributes:
        bytes: Resident in the process that answers.
        model_bytes: The part that comes with the model, once code is imported and threads have
            started: what a quantised model's resident memory is counted from.
    """

    bytes: int
    model_bytes: int


_Figures = TypeVar("_Figures", Context, AnswerContext)
# Where it cannot be measured: a Xeon with AMX, torch 2.13.
UNMEASURED = Context(115 * MIB, 100 * MIB, 75 * MIB)
# The same: an EPYC with AVX512-BF16, torch 2.13.
UNMEASURED_ANSWER = AnswerContext(25 * MIB, 15 * MIB)


def context_of(path: Path | None = None, *, quantised: bool = False) -> Context:
    """This machine's.

    Args:
        path: Where the figures are kept; default in the cache folder.
        quantised: Whether the base is stored in few bits: bitsandbytes and what it imports is there
            too then, some 40 MB.
    """
    what, file = ("quantised", QUANTISED_FILE) if quantised else ("training", FILE)
    return _measured(UNMEASURED, what, path or cache_folder() / file)


def answer_context(path: Path | None = None) -> AnswerContext:
    """The same of a process that answers.

    Args:
        path: Where the figures are kept; default in the cache folder.
    """
    return _measured(UNMEASURED_ANSWER, "answering", path or cache_folder() / ANSWERS_FILE)


def _measured(unmeasured: _Figures, what: str, path: Path) -> _Figures:
    """Figures of a process, from a file or measured now.

    Args:
        unmeasured: What they are where they cannot be measured.
        what: As `lighten.planning.measured_overhead` takes it.
        path: Where they are kept.
    """
    # Of a library's file the kernel maps what lies around a page that is touched, if it has that in
    # memory: the same packages in two environments were 25 MB apart.
    stamp = [
        processor_name(), os.cpu_count(), versions().get("torch"), versions()["transformers"],
        cpu.enabled(), sys.prefix,
    ]  # fmt: skip
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
        if record["of"] == stamp:
            return _figures(unmeasured, record)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not measured yet
    try:
        completed = subprocess.run(
            [sys.executable, "-m", "lighten.planning.measured_overhead", what],
            capture_output=True, text=True, check=True, timeout=TIMEOUT_S, env=launch.alone(),
        )  # fmt: skip
        figures = _figures(unmeasured, json.loads(completed.stdout.strip().splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError, KeyError, TypeError):
        return unmeasured
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        runs.write_json(path, {"of": stamp, **asdict(figures)})
    except (OSError, UserError):
        pass  # measured again the next time
    return figures


def _figures(like: _Figures, record: Any) -> _Figures:
    """A record as figures.

    Args:
        like: Of the same kind.
        record: Read from JSON.

    Raises:
        KeyError: One of them is missing.
        TypeError: It is none of them.
        ValueError: One is no number.
    """
    return type(like)(**{field.name: int(record[field.name]) for field in fields(like)})
