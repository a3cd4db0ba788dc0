"""DeepSpeed's ZeRO-3 with its parameters on a disk: the peer that `zero3_nvme.py` runs.

    python peers_deepspeed.py JOB.json     # in the environment of `make deepspeed`
    python peers_deepspeed.py --build      # compile what it needs, once

It imports nothing of lighten. A Llama is built under `deepspeed.zero.Init`, so that no more than a
module of it is ever whole in memory, and is read into place a tensor at a time; plain PEFT puts the
adapter on it, and one process trains that under `deepspeed.initialize`. The job names the model's
folder and format, the rows, the adapter to start from, a folder for the parameters and the
settings; the last line printed is JSON. What DeepSpeed compiles lies in the environment's folder
`extensions`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "extensions"))
if __name__ == "__main__" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:  # read at the start
    # What is freed while the model is built goes back to the system; without it the process holds
    # more than the whole base. With a smaller size steps' own allocations go too, and steps slow.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(4 * 2**20)
    os.execv(sys.executable, [sys.executable, *sys.argv])
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja
# One process is a group of its own: no launcher, and a port that nobody else has.
os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": "0"})  # fmt: skip

import deepspeed
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder

PACKAGES = ("deepspeed", "torch", "transformers", "peft", "accelerate")


def high_water() -> int:
    """Linux's VmHWM in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def read_bytes() -> int:
    """What this process has read from disks so far, in bytes."""
    for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines():
        if line.startswith("read_bytes"):
            return int(line.split()[1])
    raise OSError("no read_bytes in /proc/self/io")


def configuration(job: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's, for one process on a processor.

    No `bf16` section: it would round the adapters, which learn in float32 here as in the peers. No
    parameter is kept because it comes again soon, and nothing is gathered ahead of its pages: both
    would take more buffers than there are. What a disk gives ahead of time is DeepSpeed's own
    choice.
    """
    return {
        "train_micro_batch_size_per_gpu": len(job["rows"]),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": job["max_grad_norm"],
        "zero_optimization": {
            "stage": 3,
            "offload_param": {
                "device": "nvme", "nvme_path": job["nvme_path"], "pin_memory": job["pin_memory"],
                "buffer_count": job["buffer_count"], "buffer_size": job["buffer_size"],
            },
            "overlap_comm": True, "contiguous_gradients": True,
            "reduce_bucket_size": 1_000_000,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": job["max_live_parameters"],
            "stage3_prefetch_bucket_size": job["prefetch"],
        },
        "aio": {
            "block_size": job["block_size"], "queue_depth": job["queue_depth"],
            "intra_op_parallelism": job["io_threads"], "single_submit": False,
            "overlap_events": True,
        },
    }  # fmt: skip


def load(job: dict[str, Any], config: dict[str, Any]) -> Any:
    """The model on the disk, with the adapter that all start from."""
    from peft import PeftModel
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    folder, dtype = Path(job["model"]), getattr(torch, job["dtype"])
    # Told float32, a processor without float16 arithmetic is given bfloat16; told nothing, float32.
    told = None if dtype == torch.float32 else dtype
    with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=config, dtype=told):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    parameters = dict(base.named_parameters())
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    for name, file in index["weight_map"].items():
        with (
            safe_open(folder / file, framework="pt") as tensors,
            deepspeed.zero.GatheredParameters([parameters[name]], modifier_rank=0),
        ):
            parameters[name].data.copy_(tensors.get_tensor(name))
    assert {p.dtype for p in base.parameters()} == {dtype}
    base.config.use_cache = False
    if job["gradient_checkpointing"]:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return PeftModel.from_pretrained(base, job["adapter"], is_trainable=True)


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train; what it took step by step."""
    config = configuration(job)
    torch.set_num_threads(job["threads"])
    deepspeed.init_distributed("gloo")
    model = load(job, config)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=job["learning_rate"], weight_decay=0.0)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, model_parameters=trainable, config=config
    )
    ids = torch.tensor(job["rows"])
    losses, seconds, read = [], [], []
    loaded = high_water()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the mark begins anew
    for _ in range(job["steps"]):
        began, before = time.perf_counter(), read_bytes()
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - began)
        read.append(read_bytes() - before)
    return {
        "losses": losses, "step_s": seconds, "read_bytes": read, "loading_peak_bytes": loaded,
        "peak_bytes": high_water(), "trainable": sum(p.ds_numel for p in trainable),
        "formats": sorted({str(p.dtype) for p in model.parameters()}), "config": config,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }  # fmt: skip


def main() -> None:
    """Build, or train what a job says."""
    # One process shares no memory with others; compiling that operation would take minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if sys.argv[1] == "--build":
        AsyncIOBuilder().load(verbose=True)
        return
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps(train(job)))


if __name__ == "__main__":
    main()
