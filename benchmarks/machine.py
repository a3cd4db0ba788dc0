"""What every benchmark needs of its machine: rates, fresh processes, and files that say where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
# A machine busier than this before the start gives no figures worth keeping.
BUSY_PERCENT = 10.0
LOOK_S = 3.0
TURN = "turn"  # a worker's line: it waits until others had theirs


def before_start() -> dict[str, Any]:
    """Commit, tree and load before a benchmark begins; a busy machine is told of."""
    from lighten.machine import hardware

    commit, clean = hardware.commit()
    busy = psutil.cpu_percent(LOOK_S)
    if busy > BUSY_PERCENT:
        print(f"the processor is {busy:.0f} % busy: the figures will not hold", flush=True)
    return {"commit": commit, "tree_clean": clean, "busy_percent": busy}


def store(
    name: str, result: Mapping[str, Any], before: Mapping[str, Any], why_not: Mapping[str, bool]
) -> Path:
    """Write a result; one that should not be quoted goes to a folder that git ignores.

    Args:
        name: File name without its ending.
        result: What was measured.
        before: What `before_start` gave.
        why_not: Reasons against quoting the result, and whether each holds.
    """
    from lighten import runs
    from lighten.machine import hardware

    commit, clean = hardware.commit()
    reasons = {
        "the tree was not clean": not (clean and before["tree_clean"]),
        "the commit changed meanwhile": commit != before["commit"],
        "the machine was busy": before["busy_percent"] > BUSY_PERCENT,
        **why_not,
    }
    trial = [reason for reason, holds in reasons.items() if holds]
    folder = RESULTS / "trial" if trial else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    if trial:
        (folder / ".gitignore").write_text("*\n", encoding="ascii")
    path = folder / f"{name}.json"
    runs.write_json(
        path,
        {
            "benchmark": name, "started": dict(before), "trial": trial,
            "machine": asdict(hardware.machine()), "versions": hardware.versions(),
            **portable(result),
        },
    )  # fmt: skip
    print(f"written to {path}" + (f", a trial: {'; '.join(trial)}" if trial else ""))
    return path


def portable(result: Any) -> Any:
    """The same with paths that begin at this project, or at the folder for temporary files."""
    if isinstance(result, str):
        for place in (str(ROOT), tempfile.gettempdir()):
            result = result.replace(place + os.sep, "")
        return result
    if isinstance(result, Mapping):
        return {name: portable(value) for name, value in result.items()}
    return [portable(value) for value in result] if isinstance(result, list | tuple) else result


def in_fresh_process(
    script: str,
    job: Mapping[str, Any],
    scratch: Path,
    *,
    python: str = sys.executable,
    turn: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """A worker of this folder on a job, in a process of its own; a failed one gives its `error`.

    The worker's last line is JSON. `wall_s` is what the whole process took, imports included.

    Args:
        script: The worker.
        job: What it is told, in a file.
        scratch: Where that file lies and where it may write.
        python: The interpreter.
        turn: Called whenever the worker prints `TURN`; it waits for a line meanwhile.
    """
    path = scratch / "job.json"
    began = time.time()
    path.write_text(
        json.dumps({**job, "scratch": str(scratch / "out"), "began": began}), encoding="utf-8"
    )
    command = [python, str(Path(__file__).with_name(script)), str(path)]
    last_line = ""
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as stderr,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as worker,
    ):
        assert worker.stdin is not None
        assert worker.stdout is not None
        for line in worker.stdout:
            last_line = line if line.strip() else last_line
            if turn is not None and line.strip() == TURN:
                turn()
                print(file=worker.stdin, flush=True)
        worker.wait()
        wall_s = time.time() - began
        stderr.seek(0)
        errors = stderr.read()
    if worker.returncode:
        return {"error": f"exit {worker.returncode}: {errors[-2000:]}"}
    result: dict[str, Any] = json.loads(last_line)
    return {**result, "wall_s": wall_s}


def synchronize(device: str) -> None:
    """Wait for what the device has been given."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def matmul_rate(device: str, dtype: str = "bfloat16") -> float:
    """Best rate of a large matrix product here, in FLOP/s."""
    import torch

    best = 0.0
    for rows, inner, columns in ((2048, 2048, 2048), (4096, 1024, 4096)):
        if device != "cpu":
            rows, inner, columns = 4 * rows, 4 * inner, 4 * columns
        a = torch.randn(rows, inner, device=device).to(getattr(torch, dtype))
        weight = torch.randn(columns, inner, device=device).to(getattr(torch, dtype))
        synchronize(device)
        for _ in range(12):
            began = time.perf_counter()
            torch.nn.functional.linear(a, weight)
            synchronize(device)
            best = max(best, 2.0 * rows * inner * columns / (time.perf_counter() - began))
    return best


def memory_rate(device: str) -> float:
    """Best rate of a copy that no cache holds, in bytes read and written per second."""
    import torch

    size = 2**28 if device == "cpu" else 2**31
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    synchronize(device)
    best = 0.0
    for _ in range(6):
        began = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = max(best, 2.0 * size / (time.perf_counter() - began))
    return best
