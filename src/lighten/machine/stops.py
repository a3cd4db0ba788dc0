"""The signals that end a training with its state saved.

Ctrl-C, SIGTERM, a terminal that closes, and those by which schedulers warn before they end a job:
SLURM with `--signal=USR1@120`, Grid Engine with `-notify`.
"""

from __future__ import annotations

import signal

# Windows has the first two.
STOPS: tuple[signal.Signals, ...] = tuple(
    signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if name in signal.Signals.__members__
)  # fmt: skip


def heard() -> list[signal.Signals]:
    """Those that this process listens to.

    Under nohup it outlives its terminal. To a scheduler's warning somebody else may listen here:
    submitit does, which starts the job again.
    """
    return [number for number in STOPS if not _left(number)]


def _left(number: signal.Signals) -> bool:
    handler = signal.getsignal(number)
    if number.name == "SIGHUP":
        return handler == signal.SIG_IGN
    return number.name.startswith("SIGUSR") and handler != signal.SIG_DFL
