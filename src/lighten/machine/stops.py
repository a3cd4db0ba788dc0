"""The signals that end a training with its state saved: Ctrl-C, SIGTERM, a terminal that closes."""

from __future__ import annotations

import signal

STOPS: tuple[signal.Signals, ...] = tuple(
    signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP")
    if name in signal.Signals.__members__  # Windows has no SIGHUP
)  # fmt: skip


def heard() -> list[signal.Signals]:
    """Those that this process listens to: under nohup it outlives its terminal."""
    return [
        number for number in STOPS
        if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN
    ]  # fmt: skip
