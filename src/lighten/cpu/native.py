"""Libraries in C++, compiled on the machine that runs them the first time that they are wanted.

That takes seconds; the user's cache keeps what was made, by its source, compiler and options. It is
loaded again only where nobody else can have put it there.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from lighten.machine.hardware import cache_folder

OPTIONS = ("-std=c++17", "-fPIC", "-pthread")
# CXX may name a compiler of C, which leaves out the libraries of C++ and of mathematics: PEFT's
# BOFT leaves "gcc" there.
LIBRARIES = ("-lstdc++", "-lm") if sys.platform.startswith("linux") else ()
# Linked apart from compiling and without its options: a linker that is told -ffast-math adds (GCC
# before 13) code that turns subnormal numbers off for all threads of the process that loads it.
LINKING = ("-shared", "-pthread", *LIBRARIES)
LONGEST_S = 120.0  # of a compilation


class NotCompiled(Exception):
    """There is no library, for the reason that this says."""


def loaded(
    folder: Path, options: Sequence[str], of: Sequence[str] = ()
) -> tuple[ctypes.CDLL | None, str | None]:
    """The library of a folder's sources, or why there is none; arguments as of `compiled`."""
    try:
        return ctypes.CDLL(str(compiled(folder, options, of))), None
    except (NotCompiled, OSError) as error:
        return None, str(error)


def compiled(
    folder: Path,
    options: Sequence[str],
    of: Sequence[str] = (),
    libraries: Sequence[str] = (),
) -> Path:
    """The library of a folder's sources, made now unless it was before.

    Args:
        folder: Has the sources (`*.cpp`) and what they include (`*.h`).
        options: Of the compiler, beside those of every library.
        of: What else decides what comes out.
        libraries: Of the linker, beside those of every library.

    Raises:
        NotCompiled: There is no compiler, or it made nothing.
    """
    compiler = _compiler()
    if compiler is None:
        raise NotCompiled("there is no C++ compiler")
    try:
        return _compile(compiler, folder, (*OPTIONS, *options), of, (*LINKING, *libraries))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None)
        output = (said if isinstance(said, str) else "").strip() or str(error)
        raise NotCompiled(
            f"{' '.join(compiler)} made nothing of {folder.name}: {output.splitlines()[0]}"
        ) from error


def _compiler() -> list[str] | None:
    """The compiler's command; CXX may have words before its name, or options behind it."""
    named = os.environ.get("CXX", "g++")
    # A path may hold spaces, and on Windows backslashes.
    words = [named] if shutil.which(named) else named.split()
    for command in (words, ["clang++"]):
        program = shutil.which(command[0]) if command else None
        if program is not None:
            return [program, *command[1:]]
    return None


def _compile(
    compiler: Sequence[str],
    folder: Path,
    options: Sequence[str],
    of: Sequence[str],
    linking: Sequence[str],
) -> Path:
    version = _output([*compiler, "--version"])
    sources = sorted(folder.glob("*.cpp"))
    included = [Path(option[2:]) for option in options if option.startswith("-I")]
    headers = [file for place in (folder, *included) for file in sorted(place.glob("*.h"))]
    texts = [path.read_text(encoding="utf-8") for path in (*sources, *headers)]
    key = "\n".join([version, *compiler[1:], *options, *linking, *of, *texts])
    name = f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    ready = cache_folder() / "kernels" / name  # the system's, if an image brings one
    if _trusted(ready.parent, stat.S_ISDIR) and _trusted(ready):
        return ready
    private = _private_folder(cache_folder())
    path = private / name
    if not _trusted(path):
        with tempfile.TemporaryDirectory(dir=private) as scratch:
            library = Path(scratch) / "made.so"
            objects = [f"{source.stem}.o" for source in sources]
            for command in (
                [*compiler, "-c", *(str(source.resolve()) for source in sources), *options],
                [*compiler, *objects, "-o", str(library), *linking],
            ):
                _output(command, scratch)
            library.chmod(0o700)
            library.replace(path)
    return path


def _output(command: Sequence[str], folder: str | None = None) -> str:
    """What a command says, in whatever encoding: a compiler names paths as the system has them."""
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, errors="replace", check=True,
        timeout=LONGEST_S,
    ).stdout  # fmt: skip


def _private_folder(cache: Path) -> Path:
    """A folder of the cache that nobody else puts anything into: what lies there is run.

    A cache may be everybody's (`LIGHTEN_CACHE`), or another user's where a container's root uses
    it: then each user has a folder of their own in it.

    Raises:
        NotCompiled: There is none.
    """
    if not hasattr(os, "getuid"):  # Windows: the user's profile is theirs
        (cache / "kernels").mkdir(parents=True, exist_ok=True)
        return cache / "kernels"
    for folder in (cache / "kernels", cache / f"kernels-{os.getuid()}"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid == os.getuid():
            folder.chmod(0o700)  # earlier versions left it as open as the umask did
            return folder
    raise NotCompiled(f"{folder} belongs to another user; set LIGHTEN_CACHE to a folder of yours")


def _trusted(path: Path, is_type: Callable[[int], bool] = stat.S_ISREG) -> bool:
    """Whether a file is this user's or the system's, and nobody else can have written to it."""
    if not hasattr(os, "getuid"):
        return path.exists()
    try:
        status = path.lstat()
    except OSError:
        return False
    others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return is_type(status.st_mode) and status.st_uid in (os.getuid(), 0) and not others_write
