"""One adapter in training: its parameters, optimiser, learning rate, clipping and early stop."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lighten.train.schedule import learning_rate_factor


@dataclass(frozen=True)
class MemberSettings:
    """How one adapter learns. Names and meaning are those of transformers' arguments."""

    learning_rate: float
    lr_scheduler_type: str
    warmup: int
    total_steps: int
    weight_decay: float
    betas: tuple[float, float]
    epsilon: float
    max_grad_norm: float | None
    seed: int
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0


@dataclass
class MemberProgress:
    """What a checkpoint must keep of an adapter beside its tensors.

    Attributes:
        steps: Optimiser steps made; one skipped for a non-finite float16 gradient is not counted.
        best_loss: Lowest held-out loss so far.
        best_step: The run's step where that was.
        evaluations_without_gain: In a row, for early stopping.
        stopped: The adapter has left the batch.
    """

    steps: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    stopped: bool = False


@dataclass
class Member:
    """An adapter of the cohort together with its optimiser.

    Attributes:
        name: The adapter's name.
        parameters: Trainable parameters by PEFT key, float32.
        settings: How it learns.
        progress: How far it is.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    settings: MemberSettings
    progress: MemberProgress = field(default_factory=MemberProgress)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=self.settings.learning_rate,
            betas=self.settings.betas,
            eps=self.settings.epsilon,
            weight_decay=self.settings.weight_decay,
            fused=True,  # one kernel for hundreds of small factors, on CPU and GPU alike
        )

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        own = self.settings
        factor = learning_rate_factor(
            self.progress.steps, own.total_steps, own.warmup, own.lr_scheduler_type
        )
        return own.learning_rate * factor

    def gradients(self) -> list[Tensor]:
        """One gradient per parameter, zero where none has arrived, in a stable order."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def gradient_norm(self) -> float:
        """Norm of the whole gradient; it is scaled down in place to `max_grad_norm` at most."""
        limit = self.settings.max_grad_norm
        norm = nn.utils.clip_grad_norm_(
            list(self.parameters.values()), math.inf if limit is None else limit
        )
        return float(norm)

    def note_evaluation(self, loss: float, step: int) -> bool:
        """Remember a held-out loss; say whether it is the best so far, and stop if patience is out.

        Lower is better (trap 45).
        """
        state, own = self.progress, self.settings
        threshold = own.early_stopping_threshold
        better = state.best_loss is None or loss < state.best_loss - threshold
        if better:
            state.best_loss, state.best_step, state.evaluations_without_gain = loss, step, 0
        else:
            state.evaluations_without_gain += 1
            patience = own.early_stopping_patience
            if patience is not None and state.evaluations_without_gain >= patience:
                state.stopped = True
        return better

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimiser's state as tensors by parameter key."""
        found: dict[str, Tensor] = {}
        for key, parameter in self.parameters.items():
            for part, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{key}:{part}"] = torch.as_tensor(value)
        return found

    def restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `optimizer_tensors` gave."""
        for key, parameter in self.parameters.items():
            state: dict[str, Any] = {
                name.rpartition(":")[2]: value.clone()
                for name, value in tensors.items()
                if name.rpartition(":")[0] == key
            }
            if state:
                self.optimizer.state[parameter] = {
                    part: value.to(parameter.device) for part, value in state.items()
                }
