"""The client of `lighten.job_server`: a job's process, forked from one that has the libraries.

One server is kept, until it has had nothing to do for a while. A job begins in it as in a fresh
process: where environment, folder or limits are others than the server began with, another takes
its place. With a GPU, or on a system where forked processes do not compute, there is none.
"""

from __future__ import annotations

import atexit
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from lighten.job_server import MESSAGE
from lighten.machine import forks, gpu_support

PATIENCE_S = 5.0
PAGES_LOOKED_AT_FOR_A_JOB = (5, 14)  # Linux, with MADV_POPULATE_READ
# What a job's process gets from the one that starts it, beside its environment.
_INHERITED = ("/proc/self/limits", "/proc/self/cgroup")
_STATUS = ("Umask", "Uid", "Gid", "Cpus_allowed", "Mems_allowed", "CapEff", "NoNewPrivs")


class ForkedJob:
    """A job's process, with as much of `subprocess.Popen` as its owner needs.

    Args:
        server: That forks it; nobody else's until `wait` has returned.
        stdin: What it reads.
        stderr: What it says as errors.

    Raises:
        OSError: The server is no longer there.
    """

    def __init__(self, server: Server, stdin: IO[bytes], stderr: IO[bytes]) -> None:
        self._server = server
        self.returncode: int | None = None
        read_end, write_end = os.pipe()
        self.stdout: IO[bytes] = os.fdopen(read_end, "rb")
        try:
            self.pid = server.ask(stdin.fileno(), write_end, stderr.fileno())
            self._handle = os.pidfd_open(self.pid)
        except OSError:
            self.stdout.close()
            raise
        finally:
            os.close(write_end)

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        if self.returncode is None and self._server.has_said():
            return self.wait()
        return self.returncode

    def wait(self) -> int:
        """The same, once it has ended."""
        if self.returncode is None:
            try:
                code = self._server.answer()
                self._server.forget_job()
            except OSError:  # the server was ended, and with it goes the job
                self.kill()
                code = -signal.SIGKILL
            self.returncode = code
            os.close(self._handle)
            _busy.release()
        return self.returncode

    def kill(self) -> None:
        """End it."""
        if self.returncode is None:
            with suppress(ProcessLookupError):  # it has ended
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)


class Server:
    """A server and what it began with.

    Args:
        connection: Ours.
        process: Its own; None: somebody else's child.
        libraries: That it has.
    """

    def __init__(
        self, connection: socket.socket, process: subprocess.Popen[bytes] | None,
        libraries: tuple[str, ...] | None,
    ) -> None:  # fmt: skip
        self._connection, self._process = connection, process
        self._libraries, self._inherited = libraries, _inherited()

    @classmethod
    def started(cls, libraries: tuple[str, ...]) -> Server:
        """A new one."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "lighten.job_server", str(theirs.fileno()), *libraries],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
        return cls(ours, process, libraries)

    def suits(self, libraries: tuple[str, ...]) -> bool:
        """Whether a job of these libraries would begin in it as in a fresh process."""
        has = self._libraries is None or libraries == self._libraries
        return has and self._inherited == _inherited()

    def ask(self, *streams: int) -> int:
        """The number of a new job's process, with these streams."""
        socket.send_fds(self._connection, [b"j"], streams)
        return self.answer()

    def has_said(self) -> bool:
        """Whether an answer is there."""
        return bool(select.select([self._connection], [], [], 0)[0])

    def answer(self) -> int:
        """Its next number."""
        received = self._connection.recv(MESSAGE.size, socket.MSG_WAITALL)
        if len(received) < MESSAGE.size:
            raise ConnectionResetError("the process that forks jobs has ended")
        (number,) = MESSAGE.unpack(received)
        return int(number)

    def forget_job(self) -> None:
        """No signal follows: of the job that has ended nothing stays."""
        self._connection.sendall(b"t")
        self.answer()

    def close(self) -> None:
        """End it."""
        self._connection.close()
        if self._process is not None:
            try:
                self._process.wait(PATIENCE_S)
            # It is still importing, or a job runs that nobody waits for.
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


_server: Server | None = None
_busy = threading.Lock()  # while a job runs


def possible() -> bool:
    """Whether jobs are forked on this machine."""
    if not forks.possible():
        return False
    version = tuple(int(number) for number in re.findall(r"\d+", os.uname().release)[:2])
    if version < PAGES_LOOKED_AT_FOR_A_JOB:
        return False
    return not gpu_support.has_driver() or forks.computing()


def adopt(connection: socket.socket) -> None:
    """Take a server that somebody started, with all the libraries that a job may ask for."""
    global _server
    _server = Server(connection, None, None)


def fork(libraries: tuple[str, ...], stdin: IO[bytes], stderr: IO[bytes]) -> ForkedJob | None:
    """A job's process, or None where it has to be a fresh one.

    Args:
        libraries: What the job imports in any case: modules, or `module:attribute`.
        stdin: The job.
        stderr: What it says as errors.
    """
    global _server
    if not possible() or not _busy.acquire(blocking=False):
        return None
    try:
        if _server is not None and not _server.suits(libraries):
            close()
        for _ in range(2):  # the first may have ended for having had nothing to do
            _server = _server or Server.started(libraries)
            try:
                return ForkedJob(_server, stdin, stderr)
            except OSError:
                close()
    except BaseException:
        close()
        _busy.release()
        raise
    _busy.release()
    return None


def close() -> None:
    """End the server, if there is one."""
    global _server
    if _server is not None:
        server, _server = _server, None
        server.close()


atexit.register(close)


def _inherited() -> Any:
    """What a fresh process would get from this one."""
    # The process's name in it is cut to 15 bytes, perhaps within a sign.
    status = Path("/proc/self/status").read_text("utf-8", errors="replace").splitlines()
    return (
        os.getpid(), dict(os.environ), str(Path.cwd()), os.getpriority(os.PRIO_PROCESS, 0),
        [line for line in status if line.startswith(_STATUS)],
        [Path(file).read_bytes() for file in _INHERITED],
    )  # fmt: skip
