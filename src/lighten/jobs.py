"""Jobs in processes of their own, which may run out of memory without harm to anything else.

A job prints a JSON line for each thing that it has measured, so that what was measured before its
process ended is kept. What a process held is its own high-water mark (Linux's `VmHWM`): the
`ru_maxrss` of a child begins at its parent's.

    python -m lighten.jobs < job.json
"""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from lighten import forked_jobs
from lighten.wording import first_line

LOOK_S = 0.01
# Looking takes at most this share of the time: of child processes it reads all pages' marks.
LOOKING = 0.05
# The process that the kernel shall end first where the machine's memory is short.
SACRIFICE = "1000"
# What every job imports that loads a model.
MODELS = ("torch", "transformers:AutoModelForCausalLM")
USER_ERROR = 3  # exit code of a job that a user can mend

Worker = subprocess.Popen[bytes] | forked_jobs.ForkedJob


@dataclass
class Outcome:
    """What a job's process did.

    Attributes:
        records: What it measured before it ended.
        error: Why it ended early; None: it did not.
        out_of_memory: Whether that was for memory.
        is_user_error: The error is a sentence for the user, not the end of a traceback.
        timed_out: Whether that was for time.
        process_peak_bytes: The most that it held as a whole, as last seen from outside.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    out_of_memory: bool = False
    is_user_error: bool = False
    timed_out: bool = False
    process_peak_bytes: int = 0


def in_child(
    module: str,
    settings: Mapping[str, Any],
    *,
    libraries: tuple[str, ...] = (),
    memory_bytes: int | None = None,
    timeout_s: float | None = None,
    on_record: Callable[[dict[str, Any]], None] | None = None,
) -> Outcome:
    """Run a job in a process of its own.

    Args:
        module: Has the job: a function `run` that yields records.
        settings: What it takes, as JSON has it.
        libraries: What it imports in any case (`MODELS`, say): where that is possible, its process
            is forked from one that has them, and holds what a fresh one holds that has them.
        memory_bytes: It is ended when it and its own children hold more.
        timeout_s: It is ended when it takes longer.
        on_record: Hears of each record when it is there.
    """
    outcome = Outcome()
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stderr:
        stdin.write(json.dumps({"module": module, "settings": dict(settings)}).encode())
        stdin.seek(0)
        worker = _started(libraries, stdin, stderr)
        reader = threading.Thread(target=_read, args=(worker, outcome, on_record), daemon=True)
        reader.start()
        try:
            _watch(worker, outcome, memory_bytes, timeout_s)
        finally:
            if worker.poll() is None:
                _end(worker)
            worker.wait()
            reader.join()
        stderr.seek(0)
        text = stderr.read().decode(errors="replace")
    if outcome.error is None and worker.returncode:
        from lighten.engine.memory_errors import ended_by_it

        outcome.is_user_error = worker.returncode == USER_ERROR
        lines = text.strip().splitlines()
        outcome.error = lines[-1] if lines else f"it ended with {worker.returncode}"
        outcome.out_of_memory = ended_by_it(worker.returncode, outcome.error)
        if worker.returncode == -9:
            outcome.error = "the system ended it: memory ran out"
    return outcome


def _started(libraries: tuple[str, ...], stdin: IO[bytes], stderr: IO[bytes]) -> Worker:
    forked = forked_jobs.fork(libraries, stdin, stderr) if libraries else None
    return forked or subprocess.Popen(
        [sys.executable, "-m", "lighten.jobs"], stdin=stdin, stdout=subprocess.PIPE, stderr=stderr
    )


def _read(
    worker: Worker,
    outcome: Outcome,
    on_record: Callable[[dict[str, Any]], None] | None,
) -> None:
    assert worker.stdout is not None
    for line in worker.stdout:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a library's words, or a line torn by the process's end
        if isinstance(record, dict):
            outcome.records.append(record)
            if on_record is not None:
                on_record(record)


def _watch(
    worker: Worker,
    outcome: Outcome,
    memory_bytes: int | None,
    timeout_s: float | None,
) -> None:
    began = time.monotonic()
    while worker.poll() is None:
        looked = time.monotonic()
        held = held_bytes(worker.pid)
        looking_s = time.monotonic() - looked
        outcome.process_peak_bytes = max(outcome.process_peak_bytes, held)
        if memory_bytes is not None and held > memory_bytes:
            outcome.error = f"it holds more than {memory_bytes / 2**30:.2f} GiB"
            outcome.out_of_memory = True
            return
        if timeout_s is not None and time.monotonic() - began > timeout_s:
            outcome.error = f"it takes more than {timeout_s:.0f} s"
            outcome.timed_out = True
            return
        time.sleep(max(LOOK_S, looking_s / LOOKING))


def _end(worker: Worker) -> None:
    """End the process and those that it started."""
    try:
        family = psutil.Process(worker.pid).children(recursive=True)
    except psutil.Error:
        family = []
    worker.kill()
    for process in family:
        try:
            process.kill()
        except psutil.Error:
            continue


def held_bytes(pid: int) -> int:
    """Memory that a process and its children hold, pages that they share counted once."""
    try:
        process = psutil.Process(pid)
        family = process.children(recursive=True)
        total = int(process.memory_info().rss)
        for child in family:  # forks share nearly all with their parent
            total += int(child.memory_full_info().uss)
    except psutil.Error:
        return 0
    return total


def main() -> None:
    """Read a job from standard input, and print what it measures."""
    job = json.load(sys.stdin)
    with contextlib.suppress(OSError):  # not Linux
        Path("/proc/self/oom_score_adj").write_text(SACRIFICE, encoding="ascii")
    from lighten.errors import UserError

    run: Callable[..., Iterator[dict[str, Any]]]
    run = importlib.import_module(job["module"]).run
    try:
        for record in run(**job["settings"]):
            print(json.dumps(record), flush=True)  # noqa: T201
    except UserError as error:
        print(first_line(error), file=sys.stderr)  # noqa: T201
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    main()
