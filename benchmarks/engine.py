"""lighten's engine on given steps: what `lighten.train` runs, minus the choice of examples.

The base comes through `load_base`, adapters, optimisers, loss, packing, micro-batches and every
other choice through `prepare`, and the steps run in the training loop itself. Only which examples
make a step is given from outside, so that other engines can train on the very same ones.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from benchmarks.machine import synchronize
from benchmarks.steps import Steps
from lighten import models
from lighten.adapters.files import read_weights
from lighten.cpu import allocator
from lighten.data import Encoded, Example, TemplateChoice
from lighten.data import Row as EncodedRow
from lighten.data.tokenise import EncodingCounts
from lighten.engine.step import AdapterStep
from lighten.errors import UserError
from lighten.machine.hardware import Choice, PeakMemory
from lighten.recipe import Recipe
from lighten.training.base import load_base
from lighten.training.checkpoints import TrainerState
from lighten.training.loop import Loop
from lighten.training.prepare import prepare
from lighten.training.progress import TrainingProgress
from lighten.training.rows import Rows
from lighten.training.setup import Setup
from lighten.training.step_batches import StepBatches

RANK = 8
# transformers' names, which are the recipe's too. At half this rate a control that never learns was
# hardly further from the reference after six steps than rounding may be.
OPTIMISER: dict[str, float] = {
    "learning_rate": 2e-4, "weight_decay": 0.0, "max_grad_norm": 1.0,
    "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8,
}  # fmt: skip


def before_loading() -> None:
    """What `lighten.train` does in its process before a base is loaded: keep it the same here."""
    importlib.import_module(
        "lighten.training.run"
    )  # with PEFT and all else that a training imports
    transformers_logging.disable_progress_bar()
    set_seed(0)
    allocator.keep_pages("cuda" if torch.cuda.is_available() else "cpu")


def recipe_of(
    model: str,
    names: Sequence[str],
    steps: int,
    *,
    optimiser: Mapping[str, float] = OPTIMISER,
    settings: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe of a benchmark: LoRA on all linear layers at a constant rate.

    Args:
        model: What to load.
        names: The adapters; each has its place as its seed.
        steps: Optimiser steps.
        optimiser: Rate, decay, clipping, moments.
        settings: What else differs from the recipe's defaults.

    Raises:
        UserError: NF4 is wanted of a version that cannot load it.
    """
    if "load_in_4bit" in (settings or {}) and "load_in_4bit" not in Recipe.model_fields:
        raise UserError("an NF4 base needs a version of lighten whose recipe has load_in_4bit")
    full_method = (settings or {}).get("method") == "full"
    adapters = {
        "lora_r": RANK,
        "adapters": [{"name": name, "seed": place} for place, name in enumerate(names)],
    }
    return Recipe.from_values(
        {
            "model_name_or_path": model,
            "dataset": __file__,  # a file that exists: the examples are given otherwise
            "val_size": 0,
            "max_steps": steps,
            "lr_scheduler_type": "constant",
            **({} if full_method else adapters),
            **optimiser,
            **(settings or {}),
        }
    )


def base_in_memory(model: PreTrainedModel, dtype: str) -> models.Base:
    """A base that was built here and has no files."""
    model.requires_grad_(False)
    attention = Choice(str(model.config._attn_implementation), "the benchmark's")
    return models.Base(
        model=model.eval(), tokenizer=None, name="random", source="folder", path=Path(),
        revision=None, file_bytes=None, dtype=Choice(dtype, "the benchmark's"),
        attention=attention,
    )  # fmt: skip


class _FixedBatches(StepBatches):
    """The micro-batches of steps that are given, by each adapter's seed."""

    def __init__(self, setup: Setup, orders: Mapping[int, list[list[int]]]) -> None:
        super().__init__(setup)
        self._orders = orders

    def steps(self, seed: int, epoch: int) -> list[list[int]]:
        """The rows of each step."""
        assert epoch == 0
        return self._orders[seed]


class FixedSteps(Loop):
    """The training loop over steps that are given, with a clock.

    Args:
        setup: What to train.
        lessons: Each adapter's steps; all have as many.
        folder: Where the loop writes its files.
        memory: Started before the base was loaded.
    """

    def __init__(
        self, setup: Setup, lessons: Mapping[str, Steps], folder: Path, memory: PeakMemory
    ) -> None:
        self.reports: list[dict[str, AdapterStep]] = []
        self.ends: list[float] = []
        self.device = setup.accelerator.device.type
        self.orders: dict[int, list[list[int]]] = {}
        start = 0
        for member in setup.adapters:
            order = []
            for step in lessons[member.name]:
                order.append(list(range(start, start + len(step))))
                start += len(step)
            self.orders[member.settings.seed] = order
        setup.steps_per_epoch = setup.total_steps = len(order)
        super().__init__(setup, folder, TrainerState(), TrainingProgress(enabled=False), memory)
        self._batches = _FixedBatches(setup, self.orders)

    def _record(self, report: dict[str, AdapterStep], seconds: float) -> None:
        super()._record(report, seconds)
        synchronize(self.device)
        self.reports.append(report)
        self.ends.append(time.time())


def set_up(
    recipe: Recipe, lessons: Mapping[str, Steps], device: str, base: models.Base | None = None
) -> Setup:
    """A run on the lessons, ready for its first step.

    Args:
        recipe: Of `recipe_of`.
        lessons: Each adapter's steps.
        device: `cpu` or `cuda`.
        base: Given, or loaded as the recipe says.
    """
    accelerator = Accelerator(cpu=device == "cpu")
    base = base or load_base(recipe, str(accelerator.device))
    rows = [row for lesson in lessons.values() for step in lesson for row in step]
    counts = EncodingCounts(rows=len(rows), tokens=sum(len(ids) for ids, _ in rows))
    encoded = Encoded([EncodedRow(*row, Example("", 0)) for row in rows], counts)
    data = Rows(encoded, None, TemplateChoice("given", "", "the rows are encoded"), {})
    return prepare(recipe, accelerator, base, data)


def train(
    setup: Setup,
    lessons: Mapping[str, Steps],
    folder: Path,
    memory: PeakMemory,
    *,
    start: Mapping[str, str] | None = None,
    learns: bool = True,
) -> dict[str, Any]:
    """Train on the lessons and say what happened, per adapter and step.

    Args:
        setup: Of `set_up`.
        lessons: Each adapter's steps.
        folder: Where the loop writes its files, in one of their own.
        memory: Started before the base was loaded.
        start: Folder by adapter name of the weights to begin with.
        learns: False is the control: its optimiser runs at rate 0.
    """
    for name, weights_folder in (start or {}).items():
        setup.trained.restore(name, weights_folder)
    for member in setup.adapters:
        if not learns:
            member.settings = replace(member.settings, learning_rate=0.0)
    initial_weights = {
        member.name: _copies(member.parameters)
        for member in setup.adapters
        if member.name not in (start or {})
    }
    folder.mkdir(parents=True, exist_ok=True)
    loop = FixedSteps(setup, lessons, Path(mkdtemp(dir=folder)), memory)
    synchronize(loop.device)
    began = time.time()
    loop.run()
    starts = [began, *loop.ends[:-1]]
    peak = memory.read()
    # A copy of these made earlier would have counted as training's.
    for name, weights_folder in (start or {}).items():
        initial_weights[name] = read_weights(Path(weights_folder))
    names = [member.name for member in setup.adapters]
    return {
        "losses": {name: [report[name].loss for report in loop.reports] for name in names},
        "grad_norms": {name: [report[name].grad_norm for report in loop.reports] for name in names},
        "moved": {
            m.name: largest_move(initial_weights[m.name], m.parameters) for m in setup.adapters
        },
        "step_seconds": [end - start for start, end in zip(starts, loop.ends, strict=True)],
        "first_step_at": loop.ends[0],
        **peak,
        "dtype": setup.base.dtype.value,
        "choices": {what: choice.value for what, choice in setup.choices.items()},
        "loss_path": setup.objective.reason,
        "packing": setup.objective.packing_reason,
    }


def largest_move(before: Mapping[str, torch.Tensor], now: Mapping[str, torch.Tensor]) -> float:
    """How far the weight that moved most has moved; 0 means that nothing was learnt (trap 51)."""
    return max(float((now[key].detach().cpu() - was).abs().max()) for key, was in before.items())


def _copies(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.detach().to("cpu", copy=True) for key, value in parameters.items()}
