"""A base streamed from disk against DeepSpeed's ZeRO-3 with its parameters on a disk.

    make deepspeed                            # once: an environment of its own, and a compilation
    python benchmarks/zero3_nvme.py           # the table; the last line is JSON
    python benchmarks/zero3_nvme.py --layers 2 --hidden 256   # small, to see it run

Both train LoRA on one Llama shape of random weights, one process each, from the same adapter
(float32, on every linear layer), on the same tokens, with the same AdamW, by turns. The weights are
in bfloat16 where the processor computes in it, and in float32 elsewhere, files and products. What a
process holds is the kernel's high-water mark of it (`VmHWM`), and neither may hold more than a
share of the base. The vocabulary is small: DeepSpeed's buffers are all as large as the largest
weight.

DeepSpeed reads past the page cache (`O_DIRECT`), lighten through it, and the machine may have more
memory than the limit leaves a process. So lighten runs twice: as it is, and with its reading held
down to what this disk gives past its page cache, measured before each repeat. Losses have to agree
within `SAME_LOSS` of that format.
"""

from __future__ import annotations

import argparse
import functools
import json
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import machine, streamed_base
from benchmarks.streamed_base import GIB, RANK, TOKENS, Shape
from lighten.machine import hardware

ENVIRONMENT = Path(__file__).parents[1] / ".deepspeed"
RATIOS = ("streamed_vs_zero3_nvme", "streamed_vs_zero3_nvme_past_page_cache")
VOCABULARY = 4096
LAYERS, HIDDEN = 26, 2048
SAME_LOSS = {"bfloat16": 2**-9, "float32": 1e-5}  # relative, by products' format
SHARE = 0.7  # of the base's size, that a process may hold: DeepSpeed's took 0.58 to 0.66
LEARNING_RATE = 1e-3
REQUEST_BYTES = 8 * 2**20
# The fastest of those that were tried; README.md has the others.
THEIRS: dict[str, Any] = {
    "buffer_count": 6, "pin_memory": True, "prefetch": 1_000_000, "max_live_parameters": 0,
    "block_size": 2**20, "queue_depth": 8, "io_threads": 1,
}  # fmt: skip
# Of both; without checkpoints of activations, which at so few tokens are no memory.
RECIPE: dict[str, Any] = {
    "learning_rate": LEARNING_RATE, "max_grad_norm": 1.0, "lr_scheduler_type": "constant",
    "weight_decay": 0.0, "gradient_checkpointing": False,
}  # fmt: skip


def python_of(environment: Path) -> Path:
    """DeepSpeed's interpreter."""
    return environment / "bin" / "python"


def write_adapter(folder: Path, shape: Shape) -> Path:
    """An adapter of random numbers in PEFT's format, on all linear layers but the head."""
    import torch
    from safetensors.torch import save_file
    from torch import nn

    from lighten.models.configuration import build_empty

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    tensors, targets = {}, set()
    for name, module in build_empty("a Llama", shape.config).named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            targets.add(name.rpartition(".")[2])
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.empty(RANK, module.in_features).normal_(
                std=module.in_features**-0.5, generator=generator
            )
            tensors[f"{key}.lora_B.weight"] = torch.empty(module.out_features, RANK).normal_(
                std=0.01, generator=generator
            )
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK,
              "lora_dropout": 0.0, "target_modules": sorted(targets), "bias": "none",
              "base_model_name_or_path": None}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def disk_rate(files: Sequence[Path]) -> float:
    """Bytes per second that large reads of files reach past the page cache (Linux)."""
    size, began = 0, time.perf_counter()
    with mmap.mmap(-1, REQUEST_BYTES) as buffer:  # its address is a page's, as O_DIRECT wants it
        for path in files:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
            try:
                count, offset = REQUEST_BYTES, 0
                while count == REQUEST_BYTES:
                    count = os.preadv(descriptor, [buffer], offset)
                    offset += count
                size += offset
            finally:
                os.close(descriptor)
    return size / (time.perf_counter() - began)


def ours(
    folder: Path, adapter: Path, scratch: Path, steps: int, dtype: str, rate: float | None
) -> dict[str, Any]:
    """The streamed base."""
    result = streamed_base.train(
        folder, scratch, rows=1, steps=steps, rate=rate, offload_base="disk", dtype=dtype,
        adapter_name_or_path=str(adapter), **RECIPE,
    )  # fmt: skip
    (losses,) = result["losses"].values()
    return {**result, "losses": losses}


def theirs(
    folder: Path, adapter: Path, scratch: Path, steps: int, shape: Shape, python: Path
) -> dict[str, Any]:
    """DeepSpeed's ZeRO-3.

    Raises:
        RuntimeError: It failed.
    """
    import torch

    from lighten.models.configuration import build_empty

    rows = streamed_base.write_rows(scratch / "rows.jsonl", shape.vocabulary, rows=1)
    largest = max(p.numel() for p in build_empty("a Llama", shape.config).parameters())
    with tempfile.TemporaryDirectory(dir=scratch) as nvme:
        result = machine.in_fresh_process(
            "peers_deepspeed.py",
            {
                "model": str(folder), "adapter": str(adapter), "nvme_path": nvme, "steps": steps,
                "rows": [json.loads(line)["input_ids"] for line in rows.read_text().splitlines()],
                "threads": torch.get_num_threads(), "buffer_size": largest, "dtype": shape.dtype,
                **THEIRS,
                **{name: RECIPE[name] for name in
                   ("learning_rate", "max_grad_norm", "gradient_checkpointing")},
            }, scratch, python=str(python),
        )  # fmt: skip
    if "error" in result:
        raise RuntimeError(result["error"])
    return result


def compare(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All rows, by turns, and what comes of them."""
    import torch

    dtype = hardware.choose_dtype("auto", "cpu").value
    shape = Shape(arguments.layers, arguments.hidden, VOCABULARY, dtype)
    base_bytes = getattr(torch, dtype).itemsize * shape.parameters
    folder = streamed_base.write_llama(
        Path(arguments.cache or scratch) / f"llama-{VOCABULARY}-{dtype}", shape
    )
    adapter = write_adapter(scratch / "adapter", shape)
    python = python_of(arguments.environment)
    rows: list[dict[str, Any]] = []
    for repeat in range(arguments.repeats):
        rate = disk_rate(sorted(folder.glob("*.safetensors"))[:8])
        with_rate = functools.partial(ours, folder, adapter, scratch, arguments.steps, dtype)
        runs: dict[str, Callable[[], dict[str, Any]]] = {
            "lighten": functools.partial(with_rate, None),
            "deepspeed": functools.partial(
                theirs, folder, adapter, scratch, arguments.steps, shape, python
            ),
            "lighten, past the page cache": functools.partial(with_rate, rate),
        }
        names = list(runs) if repeat % 2 == 0 else list(reversed(runs))
        for name in names:
            result = runs[name]()
            rows.append({"repeat": repeat, "who": name, "disk_bytes_per_s": rate,
                         "median_step_s": streamed_base.step_s(result), **result})  # fmt: skip
            show(rows[-1])
    return {"shape": vars(shape), "parameters": shape.parameters,
            "base_bytes": base_bytes, "tokens": TOKENS, "recipe": RECIPE,
            "settings": THEIRS, "rows": rows, **summary(rows, base_bytes, dtype)}  # fmt: skip


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    steps = " ".join(f"{seconds:.2f}" for seconds in row["step_s"])
    print(f"{row['who']:28} repeat {row['repeat']}: {row['median_step_s']:6.2f} s a step "
          f"({steps}), {row['peak_bytes'] / GIB:.2f} GiB, losses "
          + " ".join(f"{loss:.5f}" for loss in row["losses"])
          + f"; the disk gives {row['disk_bytes_per_s'] / 1e6:.0f} MB/s", flush=True)  # fmt: skip


def summary(rows: Sequence[dict[str, Any]], base_bytes: int, dtype: str) -> dict[str, Any]:
    """The ratios, of medians over repeats; null where losses differ or memory is passed.

    Args:
        rows: With `who`, `median_step_s`, `losses` and `peak_bytes`.
        base_bytes: Size of the base.
        dtype: Its format, and that of the products.
    """

    def seconds(who: str) -> float:
        return statistics.median(row["median_step_s"] for row in rows if row["who"] == who)

    reference = next(row["losses"] for row in rows if row["who"] == "deepspeed")
    differences = [streamed_base.difference(row["losses"], reference) for row in rows]
    shares = {
        who: max(row["peak_bytes"] for row in rows if row["who"] == who) / base_bytes
        for who in {row["who"] for row in rows}
    }
    counts = max(differences) <= SAME_LOSS[dtype] and max(shares.values()) <= SHARE
    return {
        "streamed_vs_zero3_nvme": seconds("lighten") / seconds("deepspeed") if counts else None,
        "streamed_vs_zero3_nvme_past_page_cache":
            seconds("lighten, past the page cache") / seconds("deepspeed") if counts else None,
        "loss_difference": max(differences), "base_shares": shares,
    }  # fmt: skip


def main() -> None:
    """Parse, measure, print, store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="of each run; the first is left out")
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT)
    parser.add_argument("--cache", help="folder that keeps the written model")
    arguments = parser.parse_args()
    if not python_of(arguments.environment).exists():
        parser.error(f"no environment at {arguments.environment}: run `make deepspeed` first")
    before = machine.before_start()
    with tempfile.TemporaryDirectory(prefix="lighten-zero3-") as scratch:
        result = compare(arguments, Path(scratch))
    machine.store("zero3_nvme", result, before, {
        "the model was small": (arguments.layers, arguments.hidden) != (LAYERS, HIDDEN),
        "fewer than 3 repeats": arguments.repeats < 3,
        "losses or memory do not count": result["streamed_vs_zero3_nvme"] is None,
    })  # fmt: skip
    print(json.dumps({key: result[key] for key in (*RATIOS, "loss_difference", "base_shares")}))


if __name__ == "__main__":
    main()
