"""Memory that a model keeps: what computing with it touches, once loading is over."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path

from lighten.machine import heap

_PAGEOUT = 21  # MADV_PAGEOUT of Linux 5.4: clean pages of a file are dropped, nothing is lost


def resident_bytes() -> int:
    """The resident set of this process, freed heap given back first."""
    import psutil

    gc.collect()
    heap.trim()  # what loading gave back would count otherwise
    return int(psutil.Process().memory_info().rss)


def drop_mapped_weights() -> None:
    """Give back pages of weight files that are mapped: what is still in use is read in again.

    A loader that maps a file and then stores weights in another layout (bitsandbytes on a
    processor) leaves pages behind that nothing reads any more, and that the system takes when it
    wants them. Does nothing where the system cannot.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        if line.endswith(".safetensors"):
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            library.madvise(start, end - start, _PAGEOUT)  # refused by older systems: then it stays


def load_code(folder: str) -> None:
    """Import what runs a model folder, and start what computes: both are no part of the model.

    Code that a model brings along is imported with it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with contextlib.suppress(OSError, ValueError, KeyError):  # what is wrong is said when it loads
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        AutoModelForCausalLM._model_mapping.get(type(config), None)  # imports its module
    for dtype in (torch.float32, torch.bfloat16):
        torch.ones(64, 64, dtype=dtype) @ torch.ones(64, 64, dtype=dtype)
