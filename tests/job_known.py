"""A job of `lighten.jobs` that says how it began, and ends as it is told to."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from lighten.errors import UserError
from lighten.machine.hardware import PeakMemory, high_water


def run(*, ends: str = "well", mib: int = 0, modules: list[str] | None = None) -> Iterator[Any]:
    """How the process began, what `mib` MiB take, and the end.

    Args:
        ends: `well`, `mistake`, `error`, `exit`, `killed` or `never`.
        mib: Memory that is written to.
        modules: That are imported first.
    """
    for name in modules or []:
        module, _, attribute = name.partition(":")
        __import__(module)
        if attribute:
            getattr(sys.modules[module], attribute)
    process = psutil.Process()
    began = {
        "pid": os.getpid(), "parent": os.getppid(), "threads": process.num_threads(),
        "held": process.memory_info().rss, "most": high_water(), "folder": os.getcwd(),
        "environment": dict(os.environ), "first_path": sys.path[0], "nice": process.nice(),
        "sacrifice": int(Path("/proc/self/oom_score_adj").read_text()),
        "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        "open": len(os.listdir("/proc/self/fd")), "limits": Path("/proc/self/limits").read_text(),
        "name": sys.modules["__main__"].__name__,
    }  # fmt: skip
    memory = PeakMemory()
    block = np.ones(mib * 2**20, dtype=np.uint8)
    del block
    yield began | memory.read()
    sys.stderr.write("said as an error\n")
    if ends == "mistake":
        raise UserError("this can be mended\nso")
    if ends == "error":
        raise RuntimeError("this cannot")
    if ends == "exit":
        sys.exit(7)
    if ends == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    while ends == "never":
        time.sleep(0.05)
