"""What a process takes beside its tensors once it trains here, measured in one of its own.

Pages of libraries that the first products touch, kernels that oneDNN compiles, the interpreter's
and autograd's own objects: half of it depends on the processor. So a tiny model trains for a moment
in a fresh process, a few seconds once for each machine, and the figures are kept in the user's
cache folder.

    python -m lighten.planning.process_overhead
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lighten import runs
from lighten.errors import UserError
from lighten.machine.hardware import cache_folder, processor_name, versions

MIB = 2**20
FILE = "context.json"
TIMEOUT_S = 120
# Small enough that its own tensors do not count.
MODEL = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64,
         "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 512}  # fmt: skip
ROWS, TOKENS = 4, 256


@dataclass(frozen=True)
class Context:
    """What comes with training and is no tensor's.

    Attributes:
        bytes: Resident in the process that trains, a tokenizer's aside.
        worker_bytes: Of each further process that computes micro-batches, beside what it shares.
    """

    bytes: int
    worker_bytes: int


# Where it cannot be measured: a Xeon with AMX, torch 2.13.
UNMEASURED = Context(115 * MIB, 100 * MIB)


def context_of(path: Path | None = None) -> Context:
    """This machine's.

    Args:
        path: Where the figures are kept; default in the cache folder.
    """
    path = path or cache_folder() / FILE
    stamp = [processor_name(), os.cpu_count(), versions().get("torch"), versions()["transformers"]]
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        if found["of"] == stamp:
            return Context(int(found["bytes"]), int(found["worker_bytes"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not measured yet
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lighten.planning.process_overhead"], capture_output=True,
            text=True, check=True, timeout=TIMEOUT_S,
        )  # fmt: skip
        context = Context(**json.loads(done.stdout.strip().splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError, TypeError):
        return UNMEASURED
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        runs.write_json(path, {"of": stamp, **asdict(context)})
    except (OSError, UserError):
        pass  # measured again the next time
    return context


def measure() -> Context:
    """Train here and now, and see what stays when every free page is given back."""
    from lighten.planning import probe
    from lighten.recipe import Recipe

    with tempfile.TemporaryDirectory(prefix="lighten-context-") as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(MODEL), encoding="utf-8")
        recipe = Recipe.from_values({
            "model_name_or_path": folder, "dataset": str(config), "output_dir": folder,
            "per_device_train_batch_size": ROWS, "max_length": TOKENS, "workers": 2,
            "torch_compile": False,
        })  # fmt: skip
        found = probe.measure(recipe, "cpu", [TOKENS] * ROWS)
    return Context(found["settled_bytes"], found.get("worker_bytes", UNMEASURED.worker_bytes))


if __name__ == "__main__":
    print(json.dumps(asdict(measure())))  # noqa: T201
