"""Runs a command that never outlives its parent: it ends when standard input does.

    python -m lighten.serving.tether COMMAND [ARGUMENT ...]

The command has a process group of its own, which is ended as a whole. If this process is killed, so
that it cannot do that, the system ends the command itself (Linux). SIGINT and SIGTERM change
nothing here: the parent decides when it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading

_GRACE_S = 20.0
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
_PARENTS = (signal.SIGINT, signal.SIGTERM)


def main() -> int:
    """Run the command; its exit code."""
    system = ctypes.CDLL(None) if sys.platform == "linux" else None

    def prepare_command() -> None:
        for number in _PARENTS:
            signal.signal(number, signal.SIG_DFL)  # what is ignored stays so in a command
        if system is not None:  # ended if this is killed
            system.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    for number in _PARENTS:
        signal.signal(number, signal.SIG_IGN)
    child = subprocess.Popen(
        sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True,
        preexec_fn=prepare_command,
    )  # fmt: skip

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        _end(child)

    threading.Thread(target=end_with_parent, daemon=True).start()
    code = child.wait()
    _signal(child, signal.SIGKILL)  # what it left behind
    return code if code >= 0 else 128 - code  # as a shell tells a signal


def _end(child: subprocess.Popen[bytes]) -> None:
    _signal(child, signal.SIGTERM)
    try:
        child.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        _signal(child, signal.SIGKILL)


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


if __name__ == "__main__":
    sys.exit(main())
