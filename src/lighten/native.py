"""Libraries in C++, compiled on the machine that runs them the first time that they are wanted.

That takes seconds; the user's cache keeps what was made, by its source, compiler and options.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lighten.hardware import cache_folder

OPTIONS = ("-std=c++17", "-fPIC", "-shared", "-pthread")
LONGEST_S = 120.0  # of a compilation


class NotCompiled(Exception):
    """There is no library, for the reason that this says."""


def compiled(folder: Path, options: Sequence[str], of: Sequence[str] = ()) -> Path:
    """The library of a folder's sources, made now unless it was before.

    Args:
        folder: Has the sources (`*.cpp`) and what they include (`*.h`).
        options: Of the compiler, beside those of every library.
        of: What else decides what comes out.

    Raises:
        NotCompiled: There is no compiler, or it made nothing.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None:
        raise NotCompiled("there is no C++ compiler")
    try:
        return _made(compiler, folder, (*OPTIONS, *options), of)
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or str(error)
        line = told.strip().splitlines()[0]
        raise NotCompiled(f"{compiler} made nothing of {folder.name}: {line}") from error


def _made(compiler: str, folder: Path, options: Sequence[str], of: Sequence[str]) -> Path:
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=LONGEST_S
    ).stdout
    sources = sorted(folder.glob("*.cpp"))
    texts = [path.read_text(encoding="utf-8") for path in (*sources, *sorted(folder.glob("*.h")))]
    key = "\n".join([version, *options, *of, *texts])
    kept = cache_folder() / "kernels"
    path = kept / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept) as scratch:
            made = Path(scratch) / "made.so"
            subprocess.run(
                [compiler, "-o", str(made), *map(str, sources), *options],
                capture_output=True, text=True, check=True, timeout=LONGEST_S,
            )  # fmt: skip
            made.replace(path)
    return path
