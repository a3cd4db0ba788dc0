"""Settings of a GGUF file where a configuration says a thing in more than one place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lighten.quantization.gguf_model import write_gguf
from lighten.quantization.llamacpp import Runtime
from tests.tiny import save_tiny

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
PROMPT = [5, 77, 130, 9, 201, 64, 12, 300, 41, 180, 7, 99]


@pytest.mark.parametrize(
    "edits",
    [
        {"rope_scaling": YARN},
        {"rope_scaling": YARN, "rope_theta": 500.0},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 500.0},
    ],
)
def test_positions_are_those_that_transformers_takes(edits: dict[str, Any], tmp_path: Path) -> None:
    """Longer contexts are switched on by a line in config.json, as model cards say it."""
    folder = save_tiny(tmp_path / "model")
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **edits}))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0].numpy()
    write_gguf(folder, tmp_path / "model.gguf", "f32")
    with Runtime(tmp_path / "model.gguf", context_tokens=32, threads=1) as runtime:
        assert np.abs(runtime.logits(PROMPT) - expected).max() < 1e-4


def test_the_end_that_a_file_has_no_name_for_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """There are names for three: the tokenizer's own, wherever it is listed, and two more."""
    folder = save_tiny(tmp_path / "model")
    settings = {"eos_token_id": [2, 1, 3, 4]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    write_gguf(folder, tmp_path / "model.gguf", "f16")
    assert "may not stop at <|im_start|>" in caplog.text
    with Runtime(tmp_path / "model.gguf", context_tokens=32, threads=1) as runtime:
        assert [runtime.ends(token) for token in (1, 2, 3, 4)] == [True, True, False, True]
