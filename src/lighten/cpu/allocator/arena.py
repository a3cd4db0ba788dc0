"""The arena that tensors' memory comes from while a processor trains: `arena.cpp`, compiled here.

It becomes PyTorch's allocator for the whole process. Without a compiler tensors stay in glibc's
heap, which holds more than it uses (docs/lab-notes.md).
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import psutil
import torch

from lighten import cpu
from lighten.cpu import native

FOLDER = Path(__file__).parent
# As in arena.cpp: a block is so much at least, and takes whole lines and one more.
LEAST_BYTES, LINE_BYTES = 64 * 2**10, 64


def obstacle() -> str | None:
    """Why there is no arena here; None where there is one."""
    if not cpu.enabled():
        return cpu.OFF
    if os.name != "posix":
        return "the system is not POSIX"
    import resource

    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return "a limit on address space leaves no room to reserve"
    return _loaded()[1]


def opened() -> int:
    """From now on tensors' memory comes from the arena: where it begins; 0 where there is none."""
    library = None if obstacle() else _loaded()[0]
    if library is None:
        return 0
    # Address space alone: pages are the process's once they are written.
    return int(library.lighten_arena_open(ctypes.c_int64(psutil.virtual_memory().total)))


def use(in_use: bool) -> None:
    """Whether further blocks come from it, where it is open."""
    if (library := _at_hand()) is not None:
        library.lighten_arena_use(int(in_use))


def trim() -> None:
    """Give free pages back to the system, where it is open."""
    if (library := _at_hand()) is not None:
        library.lighten_arena_trim()


def _at_hand() -> ctypes.CDLL | None:
    """The library if it was wanted before: giving memory back is no reason to compile."""
    return _loaded()[0] if _loaded.cache_info().currsize else None


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str | None]:
    root = Path(torch.__file__).parent
    options = (
        "-O2", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-I{root / 'include'}",
    )  # fmt: skip
    libraries = (f"-L{root / 'lib'}", "-lc10")
    try:
        path = native.compiled(FOLDER, options, [torch.__version__], libraries)
        library = ctypes.CDLL(str(path))
    except (native.NotCompiled, OSError) as error:
        return None, str(error)
    library.lighten_arena_open.restype = ctypes.c_uint64
    return library, None
