"""One adapter in training: its parameters, optimiser, learning rate, clipping and early stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lighten.adapters import dtensors
from lighten.engine import optimizers
from lighten.engine.schedule import learning_rate_factor
from lighten.parallel.offloaded.stores import Store


@dataclass(frozen=True)
class AdapterOptimizerSettings:
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
    optim: str = "adamw_torch"
    loraplus_lr_ratio: float | None = None
    lr_scheduler_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class AdapterOptimizerProgress:
    """What a checkpoint must keep of an adapter beside its tensors.

    Attributes:
        steps: Optimiser steps made; one skipped for a non-finite float16 gradient is not counted.
        best_loss: Lowest held-out loss so far.
        best_step: The run's step where that was.
        evaluations_without_gain: In a row, for early stopping.
        stopped: The adapter has left the batch.
        diverged: It left because its loss, gradient or weights were no numbers any more.
        infinite: Its weights were not.
    """

    steps: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    stopped: bool = False
    diverged: bool = False
    infinite: bool = False


@dataclass
class AdapterOptimizer:
    """An adapter of the cohort together with its optimiser.

    Attributes:
        name: The adapter's name.
        parameters: Trainable parameters by PEFT key, float32.
        settings: How it learns.
        progress: How far it is.
        undecayed: Keys of the parameters that weight decay leaves alone.
        learning: What gradients, clipping and the optimiser see of the parameters, by the same
            keys: this rank's rows of them, where the optimiser's state is spread over ranks.
        store: Where the optimiser's state waits; None: beside what learns.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    settings: AdapterOptimizerSettings
    progress: AdapterOptimizerProgress = field(default_factory=AdapterOptimizerProgress)
    undecayed: frozenset[str] = frozenset()
    learning: dict[str, nn.Parameter] = field(default_factory=dict)
    store: Store | None = None

    def __post_init__(self) -> None:
        settings = self.settings
        self.learning = self.learning or self.parameters
        self.optimizer = optimizers.make(
            settings.optim,
            self.learning,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            betas=settings.betas,
            epsilon=settings.epsilon,
            loraplus_lr_ratio=settings.loraplus_lr_ratio,
            undecayed=self.undecayed,
            store=self.store,
        )

    @property
    def learning_rate(self) -> float:
        """The rate of the next step, before a group's own factor."""
        settings = self.settings
        factor = learning_rate_factor(
            self.progress.steps, settings.total_steps, settings.warmup, settings.lr_scheduler_type,
            settings.lr_scheduler_kwargs, peak=settings.learning_rate,
        )  # fmt: skip
        return settings.learning_rate * factor

    def is_finite(self) -> bool:
        """Whether every weight is a number: one step at far too high a rate makes them infinite.

        Of weights that are spread over ranks, this rank's part.
        """
        parts = [getattr(p, "to_local", lambda p=p: p)() for p in self.parameters.values()]
        return all(bool(part.isfinite().all()) for part in parts)

    def gradients(self) -> list[Tensor]:
        """One gradient per parameter, zero where none has arrived, in a stable order."""
        for parameter in self.learning.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [p.grad for p in self.learning.values() if p.grad is not None]

    def gradient_norm(self) -> float:
        """Norm of the whole gradient; it is scaled down in place to `max_grad_norm` at most.

        Where ranks hold different rows of it, all have to call this at the same time.
        """
        limit = self.settings.max_grad_norm
        norm = nn.utils.clip_grad_norm_(
            list(self.learning.values()), math.inf if limit is None else limit
        )
        return float(dtensors.full_tensor(norm))

    def note_evaluation(self, loss: float, step: int) -> bool:
        """Remember a held-out loss; say whether it is the best so far, and stop if patience is out.

        Lower is better (trap 45), and the lowest is the best. How much lower it must be for
        patience to begin anew, `early_stopping_threshold` says, as in transformers. What is not a
        number is never the best: nothing would be lower than that.
        """
        state, settings = self.progress, self.settings
        before = math.inf if state.best_loss is None else state.best_loss
        better = loss < before and math.isfinite(loss)
        gain = better and before - loss > settings.early_stopping_threshold
        if better:
            state.best_loss, state.best_step = loss, step
        if gain:
            state.evaluations_without_gain = 0
        else:
            state.evaluations_without_gain += 1
            patience = settings.early_stopping_patience
            if patience is not None and state.evaluations_without_gain >= patience:
                state.stopped = True
        return better

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimiser's state as tensors by parameter key."""
        return {
            f"{key}:{part}": value
            for key, parameter in self.learning.items()
            for part, value in optimizers.state_tensors(self.optimizer, parameter).items()
        }

    def end(self) -> None:
        """Let go of the optimiser's state: there is no further step."""
        self.optimizer.state.clear()

    def restore_optimizer(
        self, tensors: dict[str, Tensor], after_each: Callable[[], None] | None = None
    ) -> None:
        """Put back what `optimizer_tensors` gave.

        Args:
            tensors: Those; each is taken out, so that what is mapped can go.
            after_each: Is called when a parameter's state was copied.
        """
        for key, parameter in self.learning.items():
            names = [name for name in tensors if name.rpartition(":")[0] == key]
            if saved := {name.rpartition(":")[2]: tensors.pop(name) for name in names}:
                optimizers.restore_state(self.optimizer, parameter, saved)
            del saved
            if after_each is not None:
                after_each()
