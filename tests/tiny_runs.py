"""Whole runs on a tiny model, whatever a test changes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lighten
from lighten.runs import Run


def eight_steps(base: Path, dataset: Path, folder: Path) -> dict[str, Any]:
    """A run of eight steps in three epochs with two adapters and dropout."""
    return {
        "model_name_or_path": str(base), "dataset": str(dataset), "dtype": "float32",
        "output_dir": str(folder), "lora_r": [2, 4], "lora_dropout": 0.1,
        "learning_rate": 1e-2, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2,
        "max_steps": 8, "save_steps": 2, "eval_steps": 4, "val_size": 0.2, "save_total_limit": 10,
    }  # fmt: skip


def train(settings: dict[str, Any], *, resume: bool = False, **changes: Any) -> Run:
    return lighten.train(resume=resume, progress=False, **{**settings, **changes})
