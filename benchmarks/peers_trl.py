"""TRL + PEFT on given steps: the peer that `train_vs_peers.py` runs in an environment of its own.

    python peers_trl.py JOB.json

It imports nothing of lighten. The job names the model folder, the steps (rows of token ids with
their mask), the adapter to start from and the settings; the last line printed is JSON.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


class Clock(TrainerCallback):
    """When each step ended, on the machine's clock."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.ends: list[float] = []

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        """Note the time."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        self.ends.append(time.time())


class InOrder(SFTTrainer):
    """The trainer, except that it takes the rows in the order given."""

    def _get_train_sampler(self, *_args: Any, **_kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def high_water() -> int:
    """Linux's VmHWM in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def dataset(steps: list[list[tuple[list[int], list[bool]]]]) -> Dataset:
    """The rows as the trainer wants prepared ones: what is not supervised is labelled -100."""
    rows = [row for step in steps for row in step]
    return Dataset.from_list(
        [
            {
                "input_ids": ids,
                "labels": [i if on else -100 for i, on in zip(ids, mask, strict=True)],
            }
            for ids, mask in rows
        ]
    )


def load(job: dict[str, Any]) -> Any:
    """The model with the adapter that all start from."""
    base = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=job.get("rounded") or job["dtype"], **job["model_options"]
    )
    if job.get("rounded"):
        base = base.to(getattr(torch, job["dtype"]))
    return PeftModel.from_pretrained(base, job["adapter"], is_trainable=True)


def main(loaded: Callable[[dict[str, Any]], Any] = load) -> None:
    """Train and print what was measured.

    Args:
        loaded: Gives the model to train; what else uses TRL has its own.
    """
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    on_cpu = job["device"] == "cpu"
    if on_cpu:  # what lighten.machine.hardware.PeakMemory does, in short
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        held = psutil.Process().memory_info().rss
    else:
        torch.cuda.reset_peak_memory_stats()
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = loaded(job)
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    before = {key: value.detach().to("cpu", copy=True) for key, value in trained.items()}
    config = SFTConfig(
        output_dir=job["scratch"],
        per_device_train_batch_size=len(job["steps"][0]) // job["accumulate"],
        gradient_accumulation_steps=job["accumulate"],
        max_steps=len(job["steps"]),
        lr_scheduler_type="constant",
        logging_steps=1,  # the losses have to be compared step by step
        report_to=[],
        use_cpu=on_cpu,
        max_length=None,
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        **job["optimiser"],
        **{"save_strategy": "no", **job["options"]},
    )
    clock = Clock(job["device"])
    trainer = InOrder(
        model=model, args=config, train_dataset=dataset(job["steps"]), processing_class=tokenizer,
        callbacks=[clock],
    )  # fmt: skip
    start = time.time()
    trainer.train()
    ends = [start, *clock.ends]
    lines = [line for line in trainer.state.log_history if "loss" in line]
    moved = [float((trained[key].detach().cpu() - was).abs().max()) for key, was in before.items()]
    print(
        json.dumps(
            {
                "losses": [line["loss"] for line in lines],
                "grad_norms": [line["grad_norm"] for line in lines],
                "moved": max(moved),
                "step_seconds": [b - a for a, b in itertools.pairwise(ends)],
                "first_step_s": clock.ends[0] - job["began"],
                "peak_bytes": high_water() - held if on_cpu else torch.cuda.max_memory_allocated(),
                "dtype": str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
                "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            }
        )
    )


if __name__ == "__main__":
    main()
