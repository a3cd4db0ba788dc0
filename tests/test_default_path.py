"""The whole path as users run it: the plan on, as many threads as there are, nothing patched.

Every other test has one thread and no plan, so that figures repeat; what is on by default has to be
tested on by default.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from lighten.runs import Run

OURS = ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS", "LIGHTEN_PLAN", "LIGHTEN_DEVICE")


def test_train_evaluate_and_report_with_every_default(
    tiny_folder: Path, chat_file: Path, tmp_path: Path
) -> None:
    """One process of the command line: `lighten run MODEL DATA`, ranks 2 and 4 in one pass."""
    environment = {key: value for key, value in os.environ.items() if key not in OURS}
    environment |= {
        # What it measures is no experience of this machine's, as for every test.
        "LIGHTEN_CALIBRATION": str(tmp_path / "calibration.json"),
        "LIGHTEN_CACHE": str(tmp_path / "cache"),
    }
    words = [
        sys.executable, "-m", "lighten", "run", str(tiny_folder), str(chat_file),
        "--output_dir", "out", "--lora_r", "[2, 4]", "--lora_dropout", "0.1",
        "--learning_rate", "1e-2", "--num_train_epochs", "4", "--max_length", "256",
        "--per_device_train_batch_size", "16", "--evaluate.max_examples", "4",
        "--evaluate.max_new_tokens", "3", "--val_size", "0.2",
    ]  # fmt: skip
    result = subprocess.run(
        words, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    assert result.stderr.count("plan: ") == 1
    assert "predicted" in result.stderr
    run = Run(tmp_path / "out")
    info, plan = run.info(), run.plan()
    assert info["status"] == "finished"
    assert plan is not None
    assert plan["run_seconds"] > 0
    assert info["prediction"]["memory"]["measured"] == info["training"]["peak_bytes"]
    chosen = {choice["what"]: choice["value"] for choice in info["choices"]}
    # As many workers as the machine's cores and the step's tokens make, whatever these are here.
    assert int(chosen["workers"]) >= 1
    evaluation = run.evaluation()
    assert evaluation is not None
    losses = {model["name"]: model["metrics"]["loss"]["value"] for model in evaluation["models"]}
    assert max(losses["r2"], losses["r4"]) < losses["base"]
    assert (run.folder / "report.html").stat().st_size > 10_000
    (pair,) = json.loads((tmp_path / "calibration.json").read_text())["pairs"]
    assert pair["memory"] == info["prediction"]["memory"]
