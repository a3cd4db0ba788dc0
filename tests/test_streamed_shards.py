"""Tensors of safetensors files that are read a few pages at a time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lighten.parallel.streamed.shards import Shards


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
def test_no_page_of_a_file_stays_once_small_tensors_were_read(tmp_path: Path) -> None:
    """Linux maps the pages around one that is looked at: of many norms that was megabytes."""
    file = tmp_path / "model.safetensors"
    tensors = {f"{n} {kind}": torch.ones(size) for n in range(8)
               for kind, size in (("a weight", 2**18), ("norm", 64))}  # fmt: skip
    save_file(tensors, file)
    shards = Shards.of(tmp_path)
    for name, value in tensors.items():
        if name.endswith("norm"):
            read = torch.empty_like(value)
            shards.read(name, read)
            assert torch.equal(read, value)
    lines = Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines()
    (place,) = (n for n, line in enumerate(lines) if line.endswith(str(file)))
    resident = next(line for line in lines[place:] if line.startswith("Rss:"))
    assert resident.split()[1:] == ["0", "kB"]
