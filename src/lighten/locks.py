"""Who writes a run folder: a file with the process's id and the time at which it began."""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lighten.errors import UserError

log = logging.getLogger(__name__)
LOCK = ".lock"
# Whether a process on another machine, or in another container, runs can only be seen from its
# lock, which it touches now and then; whoever wants the folder watches for longer, as network
# folders tell of it late.
TOUCHED_S, WATCHED_S = 15.0, 60.0
# Where the start of a process is known by the clock alone, which is set now and then.
CLOCK_S = 5.0


def acquire(folder: Path) -> None:
    """Take a folder for this process; a lock that a dead process left is taken over.

    Raises:
        UserError: Another process writes the folder.
    """
    path, written = folder / LOCK, folder / f".{LOCK}.{os.getpid()}.tmp"
    try:
        with _alone(folder):
            require_unlocked(folder)
            written.write_text(json.dumps(_this_process()), encoding="utf-8")
            os.replace(written, path)
    except OSError as error:
        with suppress(OSError):
            written.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    if (key := path.absolute()) not in _touched:
        _touched[key] = threading.Event()
        threading.Thread(target=_touch, args=(key, _touched[key]), name="lock", daemon=True).start()


# What ends the touching of this process's locks, and when others' were that nobody touches now.
_touched: dict[Path, threading.Event] = {}
_unheld: dict[Path, int | None] = {}


def _touch(path: Path, ended: threading.Event) -> None:
    while not ended.wait(TOUCHED_S):
        with suppress(OSError):
            os.utime(path)


def _touched_at(path: Path) -> int | None:
    """When a lock was touched, as its file has it now; None without one."""
    with suppress(OSError), path.open("rb") as file:  # opened: a network folder asks anew then
        return os.fstat(file.fileno()).st_mtime_ns
    return None


def _runs_elsewhere(folder: Path, host: str) -> bool:
    """Whether a process that cannot be seen from here goes on touching its lock."""
    path = (folder / LOCK).absolute()
    before = _touched_at(path)
    if path in _unheld and _unheld[path] == before:
        return False
    log.warning(
        "%s was being written on %s; looking for %g s whether it still is", folder, host, WATCHED_S
    )
    until = time.monotonic() + WATCHED_S
    while time.monotonic() < until:
        time.sleep(TOUCHED_S / 15)
        if (now := _touched_at(path)) != before:
            return now is not None
    _unheld[path] = before
    return False


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Of processes that look for a lock at once, one looks after the other.

    The system's own lock is not kept for the run: it goes to processes that the run starts.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every network folder knows it
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def release(folder: Path) -> None:
    """Let a folder go; a lock of somebody else stays."""
    if (ended := _touched.pop((folder / LOCK).absolute(), None)) is not None:
        ended.set()
    held = holder(folder)
    if held is not None and held["pid"] == os.getpid() and _is_here(held):
        with suppress(OSError):
            (folder / LOCK).unlink()


def require_unlocked(folder: Path) -> None:
    """Nobody else may be writing the folder; of another machine's process it is watched for.

    Raises:
        UserError: Somebody is.
    """
    held = holder(folder)
    if held is None or not is_held(folder):
        return
    here = _is_here(held)
    if here and held["pid"] == os.getpid():
        return
    # Older versions do not touch theirs.
    if here or not held.get("touched") or _runs_elsewhere(folder, held["host"]):
        raise UserError(_refusal(folder, held))


def is_held(folder: Path) -> bool:
    """Whether the process that locked the folder still runs, or is where it cannot be seen."""
    held = holder(folder)
    if held is None:
        return False
    if not _is_here(held):
        return True  # nothing here can tell
    began, recorded = _began(held["pid"]), held.get("began")
    if began is None:
        return False
    ticks = _ticks(held["pid"])
    if ticks is not None and isinstance(held.get("ticks"), int):
        return ticks == held["ticks"]
    return isinstance(recorded, int | float) and abs(began - recorded) < CLOCK_S


def holder(folder: Path) -> dict[str, Any] | None:
    """What the lock says: `pid`, `began` and `host`; None without one, or one that is torn."""
    try:
        value = json.loads((folder / LOCK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    complete = (
        isinstance(value, dict)
        and isinstance(value.get("pid"), int)
        and isinstance(value.get("host"), str)
    )
    return value if complete else None


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "pid": pid, "began": _began(pid), "ticks": _ticks(pid), "host": platform.node(),
        "touched": True, "pid_namespace": _pid_namespace(),
    }  # fmt: skip


def _is_here(held: dict[str, Any]) -> bool:
    """Whether the lock's process number means the same process here.

    Two containers may share a host name, and neither sees the other's processes.
    """
    ours = _pid_namespace()
    return held["host"] == platform.node() and held.get("pid_namespace", ours) == ours


def _pid_namespace() -> str | None:
    """What Linux calls the set of processes that this one sees; None elsewhere."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _began(pid: int) -> float | None:
    """When a process began: an id alone may have gone to another one since."""
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return float(process.create_time())
    except (psutil.Error, OverflowError, ValueError):
        return None


def _ticks(pid: int) -> int | None:
    """When a process began, in ticks since Linux started; None where the system does not say.

    The clock does not count in it: that of WSL jumps by hours when a laptop wakes up, and a run
    at work would be taken for a killed one.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return int(stat.rpartition(")")[2].split()[19])  # proc(5), field 22
    except (OSError, ValueError, IndexError):
        return None


def _refusal(folder: Path, held: dict[str, Any]) -> str:
    if _is_here(held):
        return (
            f"{folder} is being written by process {held['pid']}; wait for it, stop it, or choose "
            "another --output_dir"
        )
    where = f"on {held['host']}"
    if held["host"] == platform.node():
        where = "in another container of this machine"
    return (
        f"{folder} is being written by process {held['pid']} {where}; if that has ended, "
        f"delete {folder / LOCK}, else wait for it or choose another --output_dir"
    )
