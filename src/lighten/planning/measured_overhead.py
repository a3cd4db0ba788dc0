"""A tiny training in a process of its own, for what a process takes beside its tensors.

python -m lighten.planning.measured_overhead
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from lighten.planning import probe
from lighten.planning.process_overhead import UNMEASURED, Context
from lighten.recipe import Recipe

# Small enough that its own tensors do not count.
MODEL = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64,
         "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 512}  # fmt: skip
ROWS, TOKENS = 4, 256


def measure() -> Context:
    """Train here and now, and see what stays when every free page is given back."""
    with tempfile.TemporaryDirectory(prefix="lighten-context-") as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(MODEL), encoding="utf-8")
        recipe = Recipe.from_values({
            "model_name_or_path": folder, "dataset": str(config), "output_dir": folder,
            "per_device_train_batch_size": ROWS, "max_length": TOKENS, "workers": 2,
            "torch_compile": False,
        })  # fmt: skip
        measured = probe.measure(recipe, "cpu", [TOKENS] * ROWS)
    return Context(measured["settled_bytes"], measured.get("worker_bytes", UNMEASURED.worker_bytes))


if __name__ == "__main__":
    print(json.dumps(asdict(measure())))  # noqa: T201
