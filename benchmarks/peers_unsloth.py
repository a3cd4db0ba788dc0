"""Unsloth on given steps, trained by TRL as its own notebooks do: a column where it installs.

python peers_unsloth.py JOB.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unsloth import FastLanguageModel  # isort: skip  # it patches what is imported after it

import peers_trl
import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(job: dict[str, Any]) -> Any:
    """Unsloth's model with the adapter that all start from."""
    base, _ = FastLanguageModel.from_pretrained(
        job["model"],
        max_seq_length=max(len(ids) for step in job["steps"] for ids, _ in step),
        dtype=getattr(torch, job["dtype"]),
        load_in_4bit=False,
    )
    model = FastLanguageModel.get_peft_model(
        base, r=job["rank"], lora_alpha=2 * job["rank"], lora_dropout=0.0, target_modules=LINEAR,
        use_gradient_checkpointing=job["options"]["gradient_checkpointing"],
    )  # fmt: skip
    weights = load_file(Path(job["adapter"]) / "adapter_model.safetensors")
    set_peft_model_state_dict(model, weights)
    return model


if __name__ == "__main__":
    peers_trl.main(load)
