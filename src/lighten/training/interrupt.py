"""What tells a run to stop ends it after the step in hand, with its state saved."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any, Self

from lighten.machine import stops

# Launchers tell their processes what the terminal, or the group that they belong to, has told them
# already: `timeout` and `deepspeed` do. Whoever presses Ctrl-C twice takes longer.
AGAIN_S = 1.0


class Interrupted(KeyboardInterrupt):
    """The run was told to stop and has saved its state.

    Attributes:
        exit_code: What the shell shall see: 128 + the signal's number.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class StopSignals:
    """Note the first signal to stop and let the loop finish its step; a later one acts at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_s = 0.0
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in stops.heard():
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_s = signal.Signals(number), now
        elif now - self._received_s >= AGAIN_S:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
