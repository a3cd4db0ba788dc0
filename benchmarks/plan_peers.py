"""What another estimator, fitcheck-llm, says of the configurations of `plan_accuracy.py`.

It estimates a GPU's memory with an allowance for CUDA's context and fragmentation; that allowance
is taken off here, so that what is compared is weights, adapters, optimiser, gradients and
activations. It is told of the micro-batch that really runs, of attention that keeps its
probabilities, as ours does on a processor, and of a cohort as one adapter with the sum of its
ranks.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NAME = "fitcheck-llm"
ENVIRONMENT = "bench-fitcheck"
# Runs in its environment. It reads a configuration from the hub only: the file is put there.
ASK = """
import json, sys
from dataclasses import asdict
from fitcheck import config_parser
from fitcheck.estimator import TrainingConfig, estimate
from fitcheck.gpu_db import get_gpu
from fitcheck.memory.lora import LORA_TARGETS_FULL
job = json.load(sys.stdin)
config_parser.hf_hub_download = lambda **_: job["config"]
own = dict(job["training"], lora_targets=list(LORA_TARGETS_FULL))
found = estimate(config_parser.fetch_model_config("local/model"), TrainingConfig(**own),
                 get_gpu("4090"))
print(json.dumps(asdict(found)))
"""
CPU_TOKENS = 1024


def python() -> Path:
    """The interpreter of its environment."""
    from lighten.machine.hardware import cache_folder

    return cache_folder() / ENVIRONMENT / "bin" / "python"


def install() -> None:
    """Make its environment."""
    folder = python().parents[1]
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(python()), "-m", "pip", "install", "--quiet", NAME], check=True)


def estimates(case: Any, folder: Path) -> dict[str, Any]:
    """Its bytes for a case, or why there are none; empty where it is not installed.

    Args:
        case: Of `plan_accuracy.py`.
        folder: Where the models are.
    """
    if not python().is_file():
        return {}
    job = {"config": str(_config(case, folder)), "training": _training(case)}
    process = subprocess.run(
        [str(python()), "-c", ASK], input=json.dumps(job), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if process.returncode:
        return {NAME: {"error": process.stderr.strip().splitlines()[-1]}}
    answer = json.loads(process.stdout)
    mib = answer["total_mib"] - answer["overhead_mib"]
    return {
        NAME: {"bytes": int(mib * 2**20), "overhead_bytes": int(answer["overhead_mib"] * 2**20)}
    }


def _config(case: Any, folder: Path) -> Path:
    path = folder / case.model / "config.json"
    if path.is_file():
        return path
    from lighten.models.load import locate

    return locate(case.model)[1] / "config.json"


def _training(case: Any) -> dict[str, Any]:
    settings = case.settings
    ranks = settings.get("lora_r", 8)
    ranks = ranks if isinstance(ranks, list) else [ranks]
    rows = case.rows if "tokens_per_microbatch" in settings else CPU_TOKENS // case.tokens
    return {
        "precision": "fp32" if settings.get("dtype") == "float32" else "bf16",
        "quantization": "nf4" if settings.get("load_in_4bit") else "none",
        "double_quant": bool(settings.get("bnb_4bit_use_double_quant")),
        "batch_size": max(1, min(rows, case.rows * len(ranks))),
        "seq_len": case.tokens,
        "lora_rank": None if settings.get("method") == "full" else sum(ranks),
        "grad_checkpoint": bool(settings.get("gradient_checkpointing")),
    }


def errors(row: Mapping[str, Any]) -> dict[str, float]:
    """Predicted over measured, less one, by estimator."""
    peak = row["measured"].get("peak_bytes")
    return {
        name: estimate["bytes"] / peak - 1.0
        for name, estimate in row["peers"].items()
        if peak and "bytes" in estimate
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | int]]:
    """Largest and mean error of each estimator, over the cases that it could estimate."""
    by_estimator: dict[str, list[float]] = {}
    for row in rows:
        for name, error in errors(row).items():
            by_estimator.setdefault(name, []).append(abs(error))
    return {
        name: {"configurations": len(values), "max_error": max(values),
               "mean_error": statistics.mean(values)}
        for name, values in by_estimator.items()
    }  # fmt: skip
