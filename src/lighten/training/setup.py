"""A run ready for its first step, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from accelerate import Accelerator

from lighten import models
from lighten.adapters import Trained
from lighten.engine.adapter_optimizer import AdapterOptimizer
from lighten.engine.loss import Objective
from lighten.engine.scaling import LossScaler
from lighten.engine.schedule import warmup_length
from lighten.machine.hardware import Choice
from lighten.parallel.strategies import Strategy
from lighten.recipe import Recipe
from lighten.training.rows import Rows


@dataclass
class Setup:
    """A run ready for its first step.

    Attributes:
        recipe: What is wanted.
        base: The loaded base.
        rows: The encoded data.
        trained: What learns: the adapters on the base, or the base itself.
        adapters: Its names with their optimisers.
        objective: The loss.
        accelerator: Device and ranks.
        strategy: How weights, gradients and optimiser state lie on the ranks.
        scaler: Factors of float16 losses; does nothing otherwise.
        examples_per_step: Rows of one optimiser step, over all ranks.
        steps_per_epoch: Optimiser steps of one pass over the data.
        total_steps: Of the whole run.
        tokens_per_microbatch: Tokens of one micro-batch at most, padding included.
        rows_per_microbatch: Rows of one micro-batch at most, over all adapters.
        workers: Micro-batches that train side by side.
        one_adapter_at_a_time: Each has micro-batches of its own, and its optimiser moves right
            after them.
        choices: What was chosen for this machine, with reasons.
    """

    recipe: Recipe
    base: models.Base
    rows: Rows
    trained: Trained
    adapters: list[AdapterOptimizer]
    objective: Objective
    accelerator: Accelerator
    strategy: Strategy
    scaler: LossScaler
    examples_per_step: int
    steps_per_epoch: int
    total_steps: int
    rows_per_microbatch: int
    tokens_per_microbatch: int | None = None
    workers: int = 1
    one_adapter_at_a_time: bool = False
    choices: dict[str, Choice] = field(default_factory=dict)

    def set_total_steps(self, total: int) -> None:
        """Let the run and the course of its learning rates end after so many steps."""
        recipe, self.total_steps = self.recipe, total
        warmup = warmup_length(total, recipe.warmup_ratio, recipe.warmup_steps)
        for adapter in self.adapters:
            adapter.settings = replace(adapter.settings, total_steps=total, warmup=warmup)

    def groups(self, adapters: Sequence[AdapterOptimizer]) -> list[list[AdapterOptimizer]]:
        """The adapters that share micro-batches and are trained before the next ones."""
        if self.one_adapter_at_a_time:
            return [[adapter] for adapter in adapters]
        return [list(adapters)]
