"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from lighten.errors import DiskFull, UserError

log = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OLDER = ".older.partial"  # what a folder that is being replaced is called meanwhile


class FileContent(Protocol):
    """What becomes a file without being in memory as bytes.

    Attributes:
        size: Bytes of the file, or nearly.
    """

    size: int

    def write(self, path: Path) -> None:
        """Write the file.

        Raises:
            OSError: It cannot be written.
        """


def write_bytes(path: Path, data: bytes | FileContent) -> None:
    """Write a file whole or not at all: under a temporary name, flushed to disk, then renamed.

    Raises:
        UserError: The disk is full; names the file and the bytes missing. An older file stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    size, written = len(data) if isinstance(data, bytes) else data.size, 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data if isinstance(data, bytes) else b"")
            file.flush()
            os.fsync(file.fileno())
        if not isinstance(data, bytes):
            mode = temporary.stat().st_mode
            data.write(temporary)
            _settle(temporary, mode)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            written = temporary.stat().st_size
        raise cannot_write(error, path, size - written) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A folder to fill, put in the place of an older one when all of it is on disk.

    What processes that were killed left unfinished beside it goes first. One that is filling the
    same folder now is waited for.

    Raises:
        UserError: The disk is full; an older folder stays.
    """
    partial = final.with_name(f".{final.name}.partial")
    held: int | None = None
    begun = False  # from here to its move into place the partial folder is this process's
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        held, begun = _begin(partial, final), True
        probe = partial / ".mode"
        probe.touch()
        mode = probe.stat().st_mode
        probe.unlink()
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                _settle(path, mode)
        with alone_in(final.parent):
            older = _put_in_place(partial, final)
        begun = False  # who waited may begin its own now
        _sync_folder(final.parent)
        _remove(older)
    except OSError as error:
        raise cannot_write(error, final, 1) from error
    finally:
        if begun:
            shutil.rmtree(partial, ignore_errors=True)
        if held is not None:
            os.close(held)


def _put_in_place(partial: Path, final: Path) -> Path:
    """Rename a folder to its final name; an older one of that name stays until that is done.

    Deleting it first takes time, in which a kill would leave neither.

    Returns:
        Where the older one is now, if there was one.
    """
    older = final.with_name(f".{final.name}{_OLDER}")
    _remove(older)
    try:
        if final.is_dir() or final.is_symlink():
            os.rename(final, older)
        os.replace(partial, final)
    except BaseException:
        _take_back(older)
        raise
    return older


def _take_back(older: Path) -> None:
    """Give an older folder its name again, where nothing has taken its place, or remove it."""
    final = older.with_name(older.name.removesuffix(_OLDER).removeprefix("."))
    if os.path.lexists(older) and not os.path.lexists(final):
        os.rename(older, final)
    _remove(older)


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """A folder for what is needed meanwhile, beside what is written.

    It goes at the end. Of a process that was killed, it goes with the next one that writes there.

    Args:
        parent: Where; made if it is not there.
        name: What is in it.

    Raises:
        UserError: Nothing can be written there.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with alone_in(parent):
            _remove_unfinished(parent)
            place = tempfile.TemporaryDirectory(dir=parent, prefix=f".{name}-", suffix=".partial")
            held = _hold(Path(place.name))
    except OSError as error:
        raise cannot_write(error, parent) from error
    try:
        with place:
            yield Path(place.name)
    finally:
        if held is not None:
            os.close(held)


def is_writable(folder: Path) -> bool:
    """Whether files can be written in a folder.

    It is tried: rights alone do not say it of a disk that is mounted to be read.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def remove_unfinished(parent: Path) -> None:
    """Remove the folders under one that were begun here and nobody fills any more.

    One that was to be replaced by such a folder gets its name again.

    Who fills one holds a lock of the system's on it, which ends with the process.
    """
    if parent.is_dir():
        with alone_in(parent):
            _remove_unfinished(parent)


def _remove_unfinished(parent: Path) -> None:
    for older in parent.glob(f".*{_OLDER}"):
        with suppress(OSError):
            _take_back(older)
    for partial in parent.glob(".*.partial"):
        with suppress(OSError):
            if partial.is_dir() and (held := _hold(partial)) is not None:
                shutil.rmtree(partial, ignore_errors=True)
                os.close(held)


def _begin(partial: Path, final: Path) -> int | None:
    """Make a folder to fill and lock it, as soon as no other process fills it.

    Two at once would make one torn folder of it.
    """
    waiting = False
    while True:
        with alone_in(partial.parent):
            _remove_unfinished(partial.parent)
            if not _is_held(partial):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                return _hold(partial)
        if not waiting:
            log.warning("another process writes %s; waiting for its end", final)
            waiting = True
        time.sleep(0.1)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Nobody else begins or removes unfinished folders under this one meanwhile, or adds to a file.

    The folder need not be there. Between making a folder and locking it another process would take
    it for abandoned.
    """
    descriptor: int | None = None
    # The folder itself may be one that its process holds already.
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    file = Path(tempfile.gettempdir()) / f"lighten-{_user()}-{name}.lock"
    with suppress(ImportError, OSError):  # Windows; a file system without locks
        descriptor = _lock(file)
    try:
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                file.unlink()  # before it is let go: who waits for it sees that it is another's
            os.close(descriptor)


def _user() -> int:
    """The user's number; 0 where the system has none."""
    return os.getuid() if hasattr(os, "getuid") else 0


def _lock(file: Path) -> int:
    """Make a lock file and lock it, waiting for whoever has it; its descriptor.

    Who had it removes it, so that none is left behind: a file that is no longer there when its
    lock was got protects nothing, and the next one is taken.

    Raises:
        ImportError: The system has no such locks.
        OSError: The file system has none.
    """
    import fcntl

    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                return descriptor
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_held(folder: Path) -> bool:
    """Whether somebody holds a folder's lock; False where the system has no locks."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # Windows; it is not there
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _hold(folder: Path) -> int | None:
    """Lock a folder for this process; None where another holds it, or the system has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _settle(path: Path, mode: int) -> None:
    """Flush a file that a library wrote, and make it as readable as any other.

    safetensors writes for the owner alone (0.7).
    """
    path.chmod(mode)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` for JSON; numbers that are not finite become null."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False) + "\n")


def as_written(value: Any) -> Any:
    """What `write_json` leaves of a value for who reads it, to compare with what was read."""
    return json.loads(json.dumps(finite(value)))


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Add one JSON line to a file in one write; one that was torn before it stays by itself.

    Raises:
        UserError: The disk is full.
    """
    data = (json.dumps(finite(value), ensure_ascii=False) + "\n").encode()
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if os.fstat(descriptor).st_size:
                os.lseek(descriptor, -1, os.SEEK_END)
                data = data if os.read(descriptor, 1) == b"\n" else b"\n" + data
            written = os.write(descriptor, data)
        finally:
            os.close(descriptor)
        if written < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise cannot_write(error, path, len(data)) from error


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON lines of a file; a last line torn by a kill is passed over."""
    if not path.is_file():
        return
    for line in path.read_bytes().split(b"\n"):
        try:
            value = json.loads(line) if line else None
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def cannot_write(error: OSError, path: Path, missing: int = 0) -> UserError:
    """What the user is told when a file or folder could not be written."""
    if error.errno in _FULL:
        return DiskFull(
            f"the disk is full: {path} could not be written, {max(missing, 1)} bytes were missing; "
            "what was saved before is intact, free some space"
        )
    return UserError(f"cannot write {path}: {error.strerror or error}")


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; systems that cannot open a folder for this do without."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finite(value: Any) -> Any:
    """The same with null for each number that is not finite, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
