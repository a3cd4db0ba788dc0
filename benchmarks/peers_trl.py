"""TRL + PEFT on given steps: the peer that `train_vs_peers.py` runs in an environment of its own.

    python peers_trl.py JOB.json

It imports nothing of lighten. The job names the model folder, the steps (rows of token ids with
their mask), the adapter to start from and the settings; the last line printed is JSON.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())


class InOrder(SFTTrainer):
    """The trainer, except that it takes the rows in the order given."""

    def _get_train_sampler(self, *_args: Any, **_kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def high_water() -> int:
    """Linux's VmHWM in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM")


def main() -> None:
    """Train and print what was measured."""
    job = json.loads(Path(sys.argv[1]).read_text())
    Path("/proc/self/clear_refs").write_text("5")
    empty = psutil.Process().memory_info().rss
    began = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    dtype = getattr(torch, job["dtype"])
    base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    model = PeftModel.from_pretrained(base, job["adapter"], is_trainable=True)
    rows = [row for step in job["steps"] for row in step]
    data = Dataset.from_list(
        [{"input_ids": ids, "completion_mask": [int(on) for on in mask]} for ids, mask in rows]
    )
    clock = Clock()
    config = SFTConfig(
        output_dir=job["scratch"],
        per_device_train_batch_size=len(job["steps"][0]),
        max_steps=len(job["steps"]),
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=job["device"] == "cpu",
        max_length=None,
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        **job["options"],
    )
    trainer = InOrder(
        model=model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[clock]
    )
    start = time.perf_counter()
    trainer.train()
    ends = [start, *clock.ends]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(
        json.dumps(
            {
                "losses": losses,
                "step_seconds": [b - a for a, b in itertools.pairwise(ends)],
                "first_step_s": clock.ends[0] - began,
                "wall_s": time.perf_counter() - began,
                "peak_bytes": high_water() - empty,
            }
        )
    )


if __name__ == "__main__":
    main()
