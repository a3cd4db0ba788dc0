"""A tiny model in a process of its own, for what a process takes beside its tensors.

python -m lighten.planning.measured_overhead training|quantised|answering
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from lighten.models.resident import resident_bytes
from lighten.planning import probe
from lighten.planning.process_overhead import UNMEASURED, AnswerContext, Context
from lighten.recipe import Recipe

# Small enough that its own tensors do not count.
MODEL = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64,
         "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 512}  # fmt: skip
ROWS, TOKENS, NEW_TOKENS = 4, 256, 4


def training(*, quantised: bool) -> Context:
    """Train here and now, and see what stays when every free page is given back."""
    with tempfile.TemporaryDirectory(prefix="lighten-context-") as folder:
        recipe = _recipe(folder).changed({"load_in_4bit": quantised})
        measured = probe.measure(recipe, "cpu", [TOKENS] * ROWS)
    trained = resident_bytes()
    importlib.import_module("peft")  # `adapters.files` does that when it saves
    return Context(
        measured["settled_bytes"], measured.get("worker_bytes", UNMEASURED.worker_bytes),
        resident_bytes() - trained,
    )  # fmt: skip


def answering() -> AnswerContext:
    """Answer here and now, and see what stays when every free page is given back."""
    import torch
    from transformers import DynamicCache

    from lighten import models
    from lighten.cpu import allocator
    from lighten.models.resident import load_code
    from lighten.planning import build
    from lighten.training import run

    assert build is not None  # imported before anything is measured
    assert run is not None
    allocator.keep_pages("cpu")
    before = resident_bytes()
    with tempfile.TemporaryDirectory(prefix="lighten-context-") as folder, torch.inference_mode():
        recipe = _recipe(folder)
        load_code(folder)
        started = resident_bytes()
        model = probe.random_base(recipe, "cpu").model
        cache = {models.cache_argument(model): DynamicCache(config=model.config)}
        ids = torch.ones(1, TOKENS, dtype=torch.int64)
        for _ in range(NEW_TOKENS):
            logits = model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache).logits
            ids = logits[:, -1:].argmax(-1)
        del cache, ids, logits
        after = resident_bytes()
    return AnswerContext(after - before, after - started)


def _recipe(folder: str) -> Recipe:
    """Of a tiny base that this writes into a folder."""
    config = Path(folder) / "config.json"
    config.write_text(json.dumps(MODEL), encoding="utf-8")
    return Recipe.from_values({
        "model_name_or_path": folder, "dataset": str(config), "output_dir": folder,
        "per_device_train_batch_size": ROWS, "max_length": TOKENS, "workers": 2,
        "torch_compile": False,
    })  # fmt: skip


if __name__ == "__main__":
    what = sys.argv[1]
    figures = answering() if what == "answering" else training(quantised=what == "quantised")
    print(json.dumps(asdict(figures)))  # noqa: T201
