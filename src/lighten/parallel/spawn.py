"""Start the ranks of one machine, pass on what they are told, and end them all together."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from lighten.errors import UserError
from lighten.machine import forks, stops
from lighten.parallel.launch import ERROR_FILE, PORTS

# Ranks that lost one end by themselves, with their state told in the run's folder; what hangs in a
# collective is told to end, and then ended. Together well below half a minute.
SETTLE_S, END_S, POLL_S = 5.0, 10.0, 0.05
LOST = "PeerLost"
# Whether ranks hear of a stop from here alone. On Windows the console tells all of its processes of
# Ctrl-C, and nobody can send it to one of them.
PASSES_ON = os.name == "posix"
LAST_LINES = 15


@dataclass(frozen=True)
class Ended:
    """How ranks that did not all finish have ended.

    Attributes:
        message: Which rank, and why.
        stopped: The signal that this process was told to stop by, or None.
        resumable: A rank was lost: what is saved can be gone on with.
    """

    message: str
    stopped: signal.Signals | None = None
    resumable: bool = False


def run(words: Sequence[str], count: int, *, device: str, shown: bool) -> Ended | None:
    """Run `lighten WORDS` as ranks of this machine, to their end.

    Args:
        words: The command and its arguments.
        count: How many ranks.
        device: `cpu` or `cuda`.
        shown: The first rank speaks on standard error; the others are heard if they fail.

    Returns:
        None where all finished.
    """
    with tempfile.TemporaryDirectory(prefix="lighten-ranks-") as folder:
        ranks = _Ranks(words, count, Path(folder), device=device, shown=shown)
        try:
            with ranks.forwarding():
                ranks.start()
                return ranks.wait()
        finally:
            ranks.end()


class _Ranks:
    """The processes, by rank."""

    def __init__(
        self, words: Sequence[str], count: int, folder: Path, *, device: str, shown: bool
    ) -> None:
        self._words, self._count, self._folder = words, count, folder
        self._device, self._shown = device, shown
        self._stopped: signal.Signals | None = None
        self._received: list[signal.Signals] = []  # and not yet passed on
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start them; what this process is told meanwhile reaches those that come after it too."""
        shared = {
            **os.environ,
            "WORLD_SIZE": str(self._count), "LOCAL_WORLD_SIZE": str(self._count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
            "LIGHTEN_DEVICE": self._device,
        }  # fmt: skip
        # Each would take all cores; PyTorch reads this when it is loaded.
        shared.setdefault("OMP_NUM_THREADS", str(max(1, forks.processors() // self._count)))
        for rank in range(self._count):
            heard = self._shown and rank == 0
            self._processes.append(self._started(rank, shared, heard=heard))

    def _started(
        self, rank: int, shared: Mapping[str, str], *, heard: bool
    ) -> subprocess.Popen[bytes]:
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), ERROR_FILE: str(self._word(rank))}
        with contextlib.ExitStack() as stack:
            log = None if heard else stack.enter_context(self._log(rank).open("wb"))
            return subprocess.Popen(
                [sys.executable, "-m", "lighten", *self._words],
                env={**shared, **variables},
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
                # Ctrl-C of a terminal goes to this process alone, which passes it on once.
                process_group=0 if PASSES_ON else None,
                preexec_fn=forks.end_with_parent if forks.possible() else None,
            )  # fmt: skip

    def _word(self, rank: int) -> Path:
        return self._folder / f"{rank}.json"

    def _log(self, rank: int) -> Path:
        return self._folder / f"{rank}.log"

    @contextlib.contextmanager
    def forwarding(self) -> Iterator[None]:
        """Note what this process is told, for `wait` to pass on."""
        before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, self._note) for number in stops.heard()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._stopped = signal.Signals(number)
        self._received.append(self._stopped)

    def _send(self, number: signal.Signals) -> None:
        if not PASSES_ON and number != signal.SIGTERM:
            return
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> Ended | None:
        """Wait until all have finished, or one has failed and the others have ended too."""
        # Each is looked at each time: one that was killed must not wait for one that waits for it.
        while None in (codes := self._codes()) and not any(codes):
            self._pause()
        if not any(codes):
            return None
        self._wait_for(SETTLE_S)
        # What a rank ended by itself counts; what is ended from here on was not its fault.
        codes = self._codes()
        self.end()
        return self._first_failure(codes)

    def _codes(self) -> list[int | None]:
        """The exit codes by rank, None of those that still run."""
        return [process.poll() for process in self._processes]

    def _wait_for(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and None in self._codes():
            self._pause()

    def _pause(self) -> None:
        time.sleep(POLL_S)
        while self._received:
            self._send(self._received.pop(0))

    def end(self) -> None:
        """End all that still run."""
        self._send(signal.SIGTERM)
        self._wait_for(END_S)
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def _first_failure(self, codes: Sequence[int | None]) -> Ended:
        """Which rank's end was the cause of the others'."""
        records = [self._error_record(rank) for rank in range(self._count)]
        failed = [rank for rank, code in enumerate(codes) if code]
        if self._stopped is None:
            return self._cause(failed, codes, records)
        for record in records:
            if record.get("kind") == "Interrupted":
                return Ended(str(record["message"]), self._stopped)
        # No rank has saved its state: where the signal is not the reason, why not.
        failed = [
            rank for rank in failed
            if not _is_stop(codes[rank] or 0) and records[rank].get("kind") != LOST
        ]  # fmt: skip
        why = f"; {self._cause(failed, codes, records).message}" if failed else ""
        return Ended(f"stopped by {self._stopped.name}{why}", self._stopped)

    def _cause(
        self, failed: Sequence[int], codes: Sequence[int | None],
        records: Sequence[Mapping[str, Any]],
    ) -> Ended:  # fmt: skip
        rank = min(failed, key=lambda rank: (_innocence(codes[rank] or 0, records[rank]), rank))
        code, name = codes[rank] or 1, f"rank {rank} of {self._count}"
        if code < 0:
            memory = ", as Linux does where memory runs out" if code == -signal.SIGKILL else ""
            return Ended(
                f"{name} (process {self._processes[rank].pid}) was killed by "
                f"{_signal_name(-code)}{memory}; the other ranks were ended",
                resumable=True,
            )  # fmt: skip
        if (message := records[rank].get("message")) is not None:
            lost = records[rank].get("kind") == LOST
            return Ended(str(message), resumable=lost)
        return Ended(f"{name} ended with exit code {code}{self._last_lines(rank)}", resumable=True)

    def _error_record(self, rank: int) -> dict[str, Any]:
        try:
            record: dict[str, Any] = json.loads(self._word(rank).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return record

    def _last_lines(self, rank: int) -> str:
        try:
            lines = self._log(rank).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return "; what it said is above"
        return ": " + "\n  ".join(lines[-LAST_LINES:]) if lines else ""


def _innocence(code: int, word: Mapping[str, Any]) -> int:
    """How little an end tells of its cause: a killed rank most, one that lost another least."""
    if code < 0:
        return 0
    return 2 if word.get("kind") == LOST else 1


def _is_stop(code: int) -> bool:
    """Whether a process with this exit code ended as one does that is told to stop."""
    return any(code in (-number, 128 + number) for number in stops.STOPS)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def free_port() -> int:
    """A port that ranks can meet at.

    It lies below those that the system gives to connections: between here and the rank that
    listens, another program's connection would take one of them.
    """
    chance = random.SystemRandom()  # a program that sets seeds draws the same ones everywhere
    for _ in range(100):
        port = chance.choice(PORTS)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise UserError(f"no port of {PORTS.start} to {PORTS.stop} is free for the ranks to meet at")
