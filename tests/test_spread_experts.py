"""A mixture of experts over two ranks, whatever learns in it: the result is one process's.

Transformers keeps a layer's experts in one tensor, so each rank has gradients for all of them, with
zeros where none of its tokens went: here one rank's rows reach experts that the other's do not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lighten
from lighten.runs import Run
from tests.cut_runs import cut_short
from tests.processes import runs_of_rank, start_ranks, wait_for
from tests.test_strategies import assert_equal
from tests.tiny import save_tiny

EXPERTS = {
    "peft_type": "LORA", "r": 2, "target_modules": ["q_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}  # fmt: skip
SETUPS: dict[str, dict[str, Any]] = {
    "attention": {"lora_r": 2, "lora_target_modules": ["q_proj", "v_proj"]},
    "experts": {"peft": EXPERTS},
    "full": {"method": "full"},
}
RUNS = [
    ("attention", "ddp"), ("attention", "zero3"), ("experts", "ddp"), ("experts", "zero2"),
    ("full", "ddp"), ("full", "zero2"), ("full", "fsdp"),
]  # fmt: skip
# Rows of one letter or of another: with one row a step, ranks often have different ones.
ROWS = [{"prompt": word, "completion": word * (2 + number)}
        for number in range(4) for word in ("a", "z")]  # fmt: skip


def settings(root: Path, setup: str, strategy: str, ranks: int) -> dict[str, Any]:
    return {
        "model_name_or_path": str(root / "base"), "dataset": str(root / "rows.jsonl"),
        "dtype": "float32", "output_dir": str(root / f"{setup}-{strategy}"), "strategy": strategy,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2 // ranks,
        "learning_rate": 1e-3, "max_steps": 4, "save_steps": 2, "val_size": 0,
        # Tokens of a row are alike, so that queries and keys have no gradient but rounding's, of
        # which AdamW would make whole steps.
        "adam_epsilon": 1e-3, **SETUPS[setup],
    }  # fmt: skip


def train_all(ports: str, file: str) -> None:
    """In a rank."""
    for run_settings, _ in runs_of_rank(ports, file):
        lighten.train(progress=False, **run_settings)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("experts")
    save_tiny(root / "base", "mixtral", num_local_experts=8)
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    started = start_ranks(train_all, [settings(root, *run, 2) for run in RUNS], root / "runs.json")
    for setup in SETUPS:
        lighten.train(progress=False, **settings(root, setup, "single", 1))
    wait_for(started)
    return root


@pytest.mark.parametrize(("setup", "strategy"), RUNS)
def test_two_ranks_are_one_process(root: Path, setup: str, strategy: str) -> None:
    assert_equal(Run(root / f"{setup}-{strategy}"), Run(root / f"{setup}-single"))


def test_rows_go_to_experts_that_others_do_not_go_to(root: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(root / "base")
    chosen: list[set[int]] = []
    gate = model.model.layers[0].mlp.gate
    gate.register_forward_hook(
        lambda _m, _a, output: chosen.append(set(output[-1].unique().tolist()))
    )
    for letter in "az":
        model(input_ids=torch.tensor([[ord(letter)]]))
    assert chosen[0] - chosen[1]
    assert chosen[1] - chosen[0]


@pytest.mark.parametrize(("setup", "strategy"), [("full", "fsdp"), ("experts", "zero2")])
def test_a_checkpoint_of_two_ranks_goes_on_as_one_process(
    root: Path, tmp_path: Path, setup: str, strategy: str
) -> None:
    run = Run(root / f"{setup}-{strategy}")
    folder = tmp_path / "alone"
    cut_short(run, folder)
    run_settings = {**settings(root, setup, strategy, 2), "output_dir": str(folder)}
    lighten.train(progress=False, resume=True, **run_settings)
    assert_equal(Run(folder), run)
