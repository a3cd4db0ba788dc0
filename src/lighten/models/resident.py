"""Memory that a model keeps: what computing with it touches, once loading is over."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
from pathlib import Path

from lighten.machine import heap

# What reads quantised files, by the method that these name.
LIBRARIES = {
    "bitsandbytes": "bitsandbytes", "torchao": "torchao.quantization", "auto-round": "auto_round",
}  # fmt: skip


def resident_bytes() -> int:
    """The resident set of this process, freed heap given back first."""
    import psutil

    gc.collect()
    heap.trim()  # what loading gave back would count otherwise
    return int(psutil.Process().memory_info().rss)


def load_code(folder: str) -> None:
    """Import what reads and runs a model folder, and start what computes: no part of the model.

    Code that a model brings along is imported with it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lighten.models.stored import stored_as

    library = LIBRARIES.get(str((stored_as(Path(folder)) or {}).get("quant_method")))
    if library is not None and importlib.util.find_spec(library.partition(".")[0]) is not None:
        importlib.import_module(library)
    with contextlib.suppress(OSError, ValueError, KeyError):  # what is wrong is said when it loads
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        AutoModelForCausalLM._model_mapping.get(type(config), None)  # imports its module
    for dtype in (torch.float32, torch.bfloat16):
        torch.ones(64, 64, dtype=dtype) @ torch.ones(64, 64, dtype=dtype)
