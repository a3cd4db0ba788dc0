"""GPUs that are in this machine and that PyTorch cannot compute on, and why.

PyTorch tells of both in warnings, among the many that are kept from a user's eyes: a training would
take the processor without a word, or fail at its first product.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from pathlib import Path

log = logging.getLogger(__name__)
_DEVICES, _DRIVER = Path("/dev"), Path("/proc/driver/nvidia/version")
# What a driver makes there: NVIDIA's, on its boards and in WSL; AMD's.
_DRIVEN = ("nvidiactl", "nvmap", "dxg", "kfd")
_OTHER = "install another PyTorch (https://pytorch.org/get-started/locally)"


def has_driver() -> bool:
    """Whether this machine has a driver of GPUs: known without PyTorch, which is slow to import."""
    return any((_DEVICES / name).exists() for name in _DRIVEN)


def unused_gpu() -> str | None:
    """Why the processor computes although there is a GPU, told once; None: it is as it should be.

    A GPU that `CUDA_VISIBLE_DEVICES` hides is meant to be left alone.
    """
    import torch

    why = _without_code() if torch.cuda.is_available() else _unseen()
    if why is not None:
        _tell(why)
    return why


def _unseen() -> str | None:
    import torch

    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    if not any(_DEVICES.glob("nvidia[0-9]*")):
        return None
    if torch.version.cuda is None:
        return f"this PyTorch is built without CUDA, and there is an NVIDIA GPU: {_OTHER}"
    try:
        version = re.search(r"Module\s.*?(\d+\.\d[\d.]*)", _DRIVER.read_text(encoding="utf-8"))
    except OSError:
        version = None
    driver = "its driver" if version is None else f"its driver ({version[1]})"
    return (
        f"PyTorch does not reach the NVIDIA GPU: {driver} may be too old for CUDA "
        f"{torch.version.cuda}; update it, or {_OTHER}"
    )


def _without_code() -> str | None:
    """Code runs on later GPUs of the same generation; what is to be compiled, on all later ones."""
    import torch

    architectures = re.findall(r"(sm|compute)_(\d+)", " ".join(torch.cuda.get_arch_list()))
    if torch.version.cuda is None or not architectures:
        return None
    major, minor = torch.cuda.get_device_capability()
    capability = 10 * major + minor
    for kind, number in architectures:
        code = int(number)
        if code <= capability and (kind == "compute" or code // 10 == major):
            return None
    return (
        f"this PyTorch has no code for {torch.cuda.get_device_name()} (compute capability "
        f"{major}.{minor}): {_OTHER}"
    )


@functools.cache
def _tell(why: str) -> None:
    log.warning("the processor computes: %s", why)
