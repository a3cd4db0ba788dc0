"""A process that has imported libraries and forks a process for each job.

Importing PyTorch and transformers takes longer than most jobs. A forked process has them, and its
memory is its own: Linux counts what it holds, and the most that it held, from its own beginning.
Only the pages of files that this process looked at are not passed on, so a job looks at them first:
it holds then what a process holds that has just imported the same.

    python -m lighten.job_server SOCKET LIBRARY...

The client sends a byte with the three standard streams of a job, and is told the job's process and,
once it has ended, its exit code. It stays a zombie until the client answers: its number belongs to
no other process while the client may still send it a signal. Then the client hears that it is gone.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import runpy
import signal
import socket
import struct
import sys
from collections.abc import Iterator, Sequence

MESSAGE = struct.Struct("<q")
IDLE_S = 60.0  # after which nobody is expected any more
MADV_POPULATE_READ = 22  # Linux 5.14, asm-generic/mman-common.h
_PRESENT, _OF_FILE = 1 << 63, 1 << 61  # of an entry in /proc/self/pagemap

Ranges = Sequence[tuple[int, int]]  # address and bytes


def serve(connection: socket.socket) -> bool:
    """Fork a process for each job until the client is gone or asks for nothing.

    Returns:
        Whether this is a job's process, whose streams are the job's.
    """
    ranges: Ranges | None = None
    while True:
        connection.settimeout(IDLE_S)
        try:
            word, streams, _, _ = socket.recv_fds(connection, 1, 3)
        except OSError:  # nothing for so long, or no client
            return False
        if not word:
            return False
        if ranges is None:
            ranges = list(_looked_at())
        pid = os.fork()
        if pid == 0:
            connection.close()
            _begin(streams, ranges)
            return True
        for stream in streams:
            os.close(stream)
        try:
            _tell_of(pid, connection)
        except OSError:  # the client is gone
            return False


def _tell_of(pid: int, connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.sendall(MESSAGE.pack(pid))
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    exited = ended.si_code == os.CLD_EXITED
    connection.sendall(MESSAGE.pack(ended.si_status if exited else -ended.si_status))
    connection.recv(1)
    os.waitpid(pid, 0)
    connection.sendall(MESSAGE.pack(pid))


# What a fresh process does on SIGINT: nothing, where whoever began the client had it ignored.
_interrupt = signal.getsignal(signal.SIGINT)


def _begin(streams: Sequence[int], ranges: Ranges) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    signal.signal(signal.SIGINT, _interrupt)
    libc = ctypes.CDLL(None)
    for address, size in ranges:
        libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), MADV_POPULATE_READ)


def _looked_at() -> Iterator[tuple[int, int]]:
    """Where this process's pages of files are."""
    page = os.sysconf("SC_PAGE_SIZE")
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        regions = [line.split() for line in file]
    with open("/proc/self/pagemap", "rb", buffering=0) as marks:
        for region in regions:
            if region[4] == "0" or "r" not in region[1]:  # of no file
                continue
            start, end = (int(number, 16) for number in region[0].split("-"))
            marks.seek(start // page * 8)
            entries = memoryview(marks.read((end - start) // page * 8)).cast("Q")
            first = None
            for place, entry in enumerate(entries):
                if entry & _PRESENT and entry & _OF_FILE:
                    first = place if first is None else first
                elif first is not None:
                    yield start + first * page, (place - first) * page
                    first = None
            if first is not None:
                yield start + first * page, end - start - first * page


def main() -> None:
    """Import the libraries, then fork."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    # Ctrl-C reaches the whole group, and it is the client's to end what it has begun.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in sys.argv[2:]:
        module, _, attribute = name.partition(":")
        imported = importlib.import_module(module)
        if attribute:  # of a module that imports its parts when they are asked for
            getattr(imported, attribute)
    if serve(connection):
        runpy.run_module("lighten.jobs", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
