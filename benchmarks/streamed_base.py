"""A base streamed from disk: its memory, its losses, a cohort against runs.

    python benchmarks/streamed_base.py               # the tables; the last line is JSON
    python benchmarks/streamed_base.py --layers 4 --hidden 256   # small, to see it run

A Llama shape with random weights is written once, in bfloat16, one file per layer. A processor
without arithmetic in bfloat16 computes in float32, and the base's size is that of float32 then.
Every training is a process of its own, in which `lighten.train` runs a recipe; its memory is the
kernel's high-water mark of the whole process (`VmHWM`), interpreter and libraries included. Steps
are timed by the run's own `metrics.jsonl`, the first left out: in it the loss is checked and memory
is taken.

`--rate` holds reading down inside of lighten's reader, as a disk of that rate would; the page cache
of this machine is then no help. `zero3_nvme.py` compares with DeepSpeed's ZeRO-3 over NVMe.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import machine

TOKENS = 64  # of each adapter in a step
RANK = 4  # on all linear layers
VOCABULARY = 32_000
ADAPTERS = 8
GIB = 2**30

CHILD = """
import json, sys
settings, rate = json.loads(sys.argv[1])
import lighten
from lighten.machine import hardware
from lighten.parallel.streamed import shards
if rate is not None:
    shards.limit = shards.RateLimit(rate)
run = lighten.train(**settings, progress=False)
lines = [own for own in run.metrics() if own["kind"] == "train"]
seconds = {own["step"]: own["seconds"] for own in lines}
losses = {}
for own in lines:
    losses.setdefault(own["adapter"], []).append(own["loss"])
training = run.info()["training"]
print(json.dumps({
    "step_s": [seconds[step] for step in sorted(seconds)], "losses": losses,
    "peak_bytes": hardware.high_water(), "above_start_bytes": training["peak_bytes"],
    "base_bytes": run.info()["base"]["weights_bytes"], "feed": training.get("offload_base"),
}))
"""


@dataclass(frozen=True)
class Shape:
    """A Llama of random weights.

    Attributes:
        layers: Decoder layers.
        hidden: Width; heads have 64 numbers, a quarter of them are keys'.
        vocabulary: Rows of the embedding and of the head.
        dtype: What its weights are written in.
    """

    layers: int
    hidden: int = 2048
    vocabulary: int = VOCABULARY
    dtype: str = "bfloat16"

    @property
    def config(self) -> Any:
        """For transformers."""
        from transformers import LlamaConfig

        heads = self.hidden // 64
        return LlamaConfig(
            hidden_size=self.hidden, intermediate_size=self.hidden * 11 // 4,
            num_hidden_layers=self.layers, num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 4), vocab_size=self.vocabulary,
            max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=1,
            eos_token_id=2, pad_token_id=0, dtype=self.dtype,
        )  # fmt: skip

    @property
    def parameters(self) -> int:
        """All of them."""
        from lighten.models.configuration import build_empty

        return sum(p.numel() for p in build_empty("a Llama", self.config).parameters())


def write_llama(folder: Path, shape: Shape) -> Path:
    """Write a model with random weights, a file per layer; what is there is kept."""
    import torch
    from safetensors.torch import save_file

    from lighten.models.configuration import build_empty

    if (folder / "model.safetensors.index.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shape.config.save_pretrained(folder)
    write_tokenizer(folder)
    files: dict[str, dict[str, Any]] = {}
    for name, value in build_empty("a Llama", shape.config).named_parameters():
        place = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files.setdefault(place, {})[name] = value
    places: dict[str, str] = {}
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, shape.dtype)
    for number, tensors in enumerate(files.values(), 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        weights = {
            name: (torch.ones(value.shape) if value.dim() == 1 else
                   torch.empty(value.shape).normal_(std=0.02, generator=generator)).to(dtype)
            for name, value in tensors.items()
        }  # fmt: skip
        save_file(weights, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def write_tokenizer(folder: Path) -> None:
    """A tokenizer that nothing is encoded with: the rows are ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "<s>", "</s>", *alphabet]
    core = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def write_rows(path: Path, vocabulary: int, rows: int = 16, tokens: int = TOKENS) -> Path:
    """Rows of random ids, all of them supervised."""
    import random

    generator = random.Random(0)
    lines = []
    for _ in range(rows):
        ids = [generator.randrange(3, vocabulary) for _ in range(tokens)]
        lines.append(json.dumps({"input_ids": ids, "labels": ids}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def train(
    folder: Path, scratch: Path, *, steps: int, rate: float | None = None, rows: int = 16,
    **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train in a process of its own.

    Args:
        folder: The base.
        scratch: For rows and run folders.
        steps: Optimiser steps.
        rate: Bytes per second that are read at most.
        rows: Of the data; one is taken in each step.
        settings: More of the recipe.

    Returns:
        `step_s` and `losses` of each step, `peak_bytes` of the process (`VmHWM`), what the run
        calls its peak (`above_start_bytes`), `base_bytes` of a resident base, and what the feed
        did.
    """
    vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    recipe = {
        "model_name_or_path": str(folder), "dataset": str(
            write_rows(scratch / "rows.jsonl", vocabulary, rows)),
        "output_dir": tempfile.mkdtemp(dir=scratch), "per_device_train_batch_size": 1,
        "max_steps": steps, "val_size": 0, "save_steps": 10**6, "save_every": None,
        "gradient_checkpointing": True, "max_length": TOKENS, "lora_r": RANK,
        "report_to": "none", **settings,
    }  # fmt: skip
    process = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps([recipe, rate])],
        capture_output=True, text=True, check=False, env=machine_environment(),
    )  # fmt: skip
    if process.returncode:
        raise RuntimeError(process.stderr.strip()[-2000:])
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def machine_environment() -> dict[str, str]:
    """No plan is made before a training that is measured."""
    import os

    return {**os.environ, "LIGHTEN_PLAN": "off"}


def step_s(result: Mapping[str, Any]) -> float:
    """The median step after the first."""
    return statistics.median(result["step_s"][1:] or result["step_s"])


def difference(losses: Sequence[float], reference: Sequence[float]) -> float:
    """The largest of two loss trajectories' relative differences."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))


def memory_and_losses(folder: Path, scratch: Path, steps: int) -> dict[str, Any]:
    """A streamed base against one in memory: losses, and the share of the base that is needed."""
    resident = train(folder, scratch, steps=steps)
    streamed = train(folder, scratch, steps=steps, offload_base="disk")
    return {
        "base_bytes": resident["base_bytes"], "resident_peak_bytes": resident["peak_bytes"],
        "streamed_peak_bytes": streamed["peak_bytes"],
        "streamed_above_start_bytes": streamed["above_start_bytes"],
        "resident_share": streamed["peak_bytes"] / resident["base_bytes"],
        "resident_step_s": step_s(resident), "streamed_step_s": step_s(streamed),
        "loss_difference": difference(streamed["losses"]["default"], resident["losses"]["default"]),
    }  # fmt: skip


def cohort_against_runs(
    folder: Path, scratch: Path, steps: int, rate: float | None, adapters: int = ADAPTERS
) -> dict[str, Any]:
    """Adapters in one pass against as many runs one after another, at `TOKENS` tokens each."""
    seeds = list(range(1, adapters + 1))
    together = train(folder, scratch, steps=steps, rate=rate, offload_base="disk", seed=seeds)
    alone = [
        train(folder, scratch, steps=steps, rate=rate, offload_base="disk", seed=seed)
        for seed in seeds
    ]
    total = sum(map(step_s, alone))
    differences = [
        difference(together["losses"][f"seed{seed}"], run["losses"]["default"])
        for seed, run in zip(seeds, alone, strict=True)
    ]
    return {
        "rate_bytes_per_s": rate, "adapters": adapters, "together_step_s": step_s(together),
        "one_after_another_step_s": total, "ratio": step_s(together) / total,
        "loss_difference": max(differences), "together_reads": together["feed"]["reads"],
        "alone_reads": alone[0]["feed"]["reads"], "together_waited_s": together["feed"]["waited_s"],
    }  # fmt: skip


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All tables."""
    shape = Shape(arguments.layers, arguments.hidden, arguments.vocabulary)
    folder = write_llama(Path(arguments.cache or scratch) / "llama", shape)
    print(f"{shape.parameters / 1e9:.2f} B parameters in {shape.layers} layers", flush=True)
    results: dict[str, Any] = {"shape": vars(shape), "parameters": shape.parameters}
    results["memory"] = memory_and_losses(folder, scratch, arguments.steps)
    show("a streamed base against one in memory", results["memory"])
    for name, rate in (("limited", arguments.rate * 1e6), ("unlimited", None)):
        results[name] = cohort_against_runs(folder, scratch, arguments.steps, rate,
                                          arguments.adapters)  # fmt: skip
        show(f"{arguments.adapters} adapters against as many runs, reading {name}", results[name])
    return results


def show(title: str, rows: Mapping[str, Any]) -> None:
    """Print a table."""
    print(f"\n{title}")
    for name, value in rows.items():
        text = f"{value / GIB:.3f} GiB" if name.endswith("_bytes") else value
        print(f"  {name:28} {text:.4g}" if isinstance(text, float) else f"  {name:28} {text}",
              flush=True)  # fmt: skip


def summary(results: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that the last line holds; what was not measured is null."""
    return {
        "streamed_8_vs_8_runs": results["limited"]["ratio"],
        "streamed_8_vs_8_runs_unlimited": results["unlimited"]["ratio"],
        "resident_share": results["memory"]["resident_share"],
        "loss_difference": results["memory"]["loss_difference"],
    }


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--adapters", type=int, default=ADAPTERS)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rate", type=float, default=500.0, help="MB/s that are read at most")
    parser.add_argument("--cache", help="folder that keeps the written model")
    arguments = parser.parse_args()
    before = machine.before_start()
    with tempfile.TemporaryDirectory(prefix="lighten-streamed-") as scratch:
        results = measure(arguments, Path(scratch))
    small = arguments.layers < 20 or arguments.hidden < 2048 or arguments.adapters != ADAPTERS
    results |= summary(results)
    machine.store("streamed_base", results, before, {"the model was small": small})
    print(json.dumps(summary(results)))


if __name__ == "__main__":
    main()
