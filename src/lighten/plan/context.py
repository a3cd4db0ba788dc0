"""What a process takes beside its tensors once it trains here, measured in one of its own.

The architecture's module, pages of libraries that the first products touch, kernels that oneDNN
compiles, the interpreter's and autograd's own objects: half of it depends on the processor. So a
tiny model trains for a moment in a fresh process, a few seconds once for each machine, and the
figure is kept in the user's cache folder.

    python -m lighten.plan.context
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from lighten import runs
from lighten.errors import UserError
from lighten.hardware import processor_name, versions
from lighten.models.names import cache_folder

MIB = 2**20
FILE = "context.json"
# Where it cannot be measured: a Xeon with AMX, torch 2.13.
UNMEASURED_BYTES = 77 * MIB
TIMEOUT_S = 120
# Small enough that its own tensors do not count, in shapes that differ, as those of a training do.
MODEL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}  # fmt: skip
LENGTHS = (64, 96, 160, 256)


def context_bytes(path: Path | None = None) -> int:
    """Resident bytes that come with training and are no tensor's.

    Args:
        path: Where the figure is kept; default in the cache folder.
    """
    path = path or cache_folder() / FILE
    stamp = [processor_name(), os.cpu_count(), versions().get("torch"), versions()["transformers"]]
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        if found["of"] == stamp:
            return int(found["bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not measured yet
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lighten.plan.context"], capture_output=True, text=True,
            check=True, timeout=TIMEOUT_S,
        )  # fmt: skip
        size = int(done.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return UNMEASURED_BYTES
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        runs.write_json(path, {"of": stamp, "bytes": size})
    except (OSError, UserError):
        pass  # measured again the next time
    return size


def measure() -> int:
    """Train here and now, and say by how much the resident set has grown."""
    import psutil
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lighten import allocator
    from lighten.hardware import choose_dtype
    from lighten.train import run

    # As a training that begins to measure: everything imported, the heap set up.
    assert run is not None
    allocator.keep_pages("cpu")
    torch.manual_seed(0)
    own = psutil.Process()
    before = own.memory_info().rss
    compute: torch.dtype = getattr(torch, choose_dtype("auto", "cpu").value)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **MODEL), dtype=torch.float32
    )
    for _ in range(2):
        for length in LENGTHS:
            ids = torch.zeros(2, length, dtype=torch.long)
            with torch.autocast("cpu", compute, enabled=compute != torch.float32):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
    torch.optim.AdamW(model.parameters(), fused=True).step()
    return int(own.memory_info().rss - before)


if __name__ == "__main__":
    print(measure())  # noqa: T201
