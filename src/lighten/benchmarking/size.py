"""What a model takes: parameters, files on disk, memory; an adapter beside its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

WEIGHTS = ("*.safetensors", "*.gguf")


def run(model: str, *, adapter: str | None, revision: str | None, device: str) -> Iterator[Any]:
    """Records of the base and, where there is one, of the adapter.

    Args:
        model: As `lighten.models.load` takes it.
        adapter: Folder in PEFT's format.
        revision: Of the base on the hub.
        device: Where it goes.
    """
    import gc

    import psutil

    from lighten import adapters, models
    from lighten.cpu import allocator
    from lighten.machine.hardware import take

    take(device)
    _load_code(model, revision)
    memory, before = allocator.measure_peak(device), psutil.Process().memory_info().rss
    base = models.load(model, revision=revision, device=device)
    gc.collect()
    allocator.trim()
    totals = models.census(base.model)
    record: dict[str, Any] = {
        "variant": "base", "parameters": totals.parameters, "file_bytes": base.file_bytes,
        "weights_bytes": totals.weight_bytes, "dtype": base.dtype.value, **_peak(memory),
    }  # fmt: skip
    if device == "cpu":
        record["resident_bytes"] = psutil.Process().memory_info().rss - before
    yield record
    if adapter is None:
        return
    folder = Path(adapter)
    cohort = adapters.load(base.model, {"adapter": folder})
    weights = cohort.parameters("adapter")
    files = file_bytes(folder)
    yield {
        "variant": "adapter", "parameters": sum(p.numel() for p in weights.values()),
        "file_bytes": files, "weights_bytes": sum(p.nbytes for p in weights.values()),
        "share_of_checkpoint": files / base.file_bytes if base.file_bytes else None,
    }  # fmt: skip


def _load_code(model: str, revision: str | None) -> None:
    """Import what reads and runs a model: no part of its memory, and much beside a small one."""
    from lighten.models import gguf
    from lighten.models.load import locate
    from lighten.models.resident import load_code

    source, path = locate(model, revision=revision)
    load_code(str(gguf.converted(path) if source == "gguf" else path))


def file_bytes(folder: Path) -> int:
    """Bytes of the weight files of a folder."""
    return sum(path.stat().st_size for pattern in WEIGHTS for path in folder.glob(pattern))


def _peak(memory: Any) -> dict[str, Any]:
    peak = memory.read()
    return {"peak_bytes": peak["peak_bytes"], "reserved_bytes": peak.get("reserved_bytes"),
            "memory_by": peak["method"]}  # fmt: skip
