"""Rows of random tokens, cut into steps, and what both engines make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

from benchmarks import engine
from benchmarks import plain_peft as peers
from benchmarks.steps import Steps
from lighten.machine.hardware import PeakMemory
from tests.tiny import VOCAB, tiny_model


def lesson(steps: int = 3, rows: int = 4, longest: int = 24, seed: int = 0) -> Steps:
    generator = torch.Generator().manual_seed(seed)

    def row(place: int) -> tuple[list[int], list[bool]]:
        length = longest - 3 * place
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        return ids, [i >= length // 3 for i in range(length)]

    return [[row(place) for place in range(rows)] for _ in range(steps)]


def ours(
    lessons: dict[str, Steps], folder: Path, *, learns: bool = True, **settings: Any
) -> dict[str, Any]:
    steps = len(next(iter(lessons.values())))
    recipe_settings = {"per_device_train_batch_size": 64, "dtype": "float32", **settings}
    recipe = engine.recipe_of("tiny", list(lessons), steps, settings=recipe_settings)
    base = engine.base_in_memory(tiny_model("llama"), "float32")
    setup = engine.set_up(recipe, lessons, "cpu", base)
    return engine.train(setup, lessons, folder, PeakMemory(), learns=learns)


def peft(lessons: dict[str, Steps], **options: Any) -> dict[str, Any]:
    """PEFT from the same start: a recipe's adapters have their places as seeds."""
    from lighten.adapters import AdapterSpec, attach

    specs = [AdapterSpec(name, r=engine.RANK, seed=place) for place, name in enumerate(lessons)]
    cohort = attach(tiny_model("llama"), specs)
    config = LoraConfig(r=engine.RANK, lora_alpha=2 * engine.RANK, target_modules="all-linear",
                        task_type="CAUSAL_LM")  # fmt: skip
    first_name, *other_names = lessons
    model = get_peft_model(tiny_model("llama"), config, adapter_name=first_name)
    for name in other_names:
        model.add_adapter(name, config)
    for name in lessons:
        set_peft_model_state_dict(model, cohort.parameters(name), adapter_name=name)
    return peers.train(model, lessons, "cpu", engine.OPTIMISER, **options)
