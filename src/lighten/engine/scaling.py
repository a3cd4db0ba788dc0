"""Loss scales of float16: one per adapter, so that one adapter's overflow touches no other.

Gradients of float16 products underflow unless the loss is multiplied first and the gradients are
divided again. The factor is halved after a step with a gradient that is not finite, which is
skipped, and doubled after many good ones, as PyTorch's `GradScaler` does; that has one factor for
everything that a backward pass reaches, and no way back once a step is given up half-way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lighten.engine.adapter_optimizer import AdapterOptimizer

# The values of PyTorch's GradScaler.
INITIAL, GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000
# Gradients that are not finite even under this factor are no matter of scale.
LOWEST = 2.0**-10


@dataclass
class LossScale:
    """The factor of one adapter.

    Attributes:
        scale: What its loss is multiplied by.
        good_steps: Steps since the factor last changed.
    """

    scale: float = INITIAL
    good_steps: int = 0


class LossScaler:
    """The factors of all adapters of a run.

    Args:
        enabled: False: every factor is 1 and stays so.
        initial: The factor of an adapter's first step.
    """

    # Of a micro-batch's scaled loss; a plan marks where its backward pass begins.
    backward: Callable[[Tensor], None] = staticmethod(Tensor.backward)

    def __init__(self, *, enabled: bool = True, initial: float = INITIAL) -> None:
        self.enabled, self.initial = enabled, initial
        self._scales: dict[str, LossScale] = {}

    def factor(self, name: str) -> float:
        """What the named adapter's loss is multiplied by in the next step."""
        return self._scale_of(name).scale if self.enabled else 1.0

    def unscale(self, adapter: AdapterOptimizer) -> None:
        """Divide the adapter's gradients by its factor, in place."""
        if self.enabled:
            torch._foreach_mul_(adapter.gradients(), 1.0 / self.factor(adapter.name))

    def hopeless(self, name: str) -> bool:
        """Whether a gradient that is not finite can no longer be the factor's fault."""
        return not self.enabled or self._scale_of(name).scale <= LOWEST

    def update(self, name: str, *, finite: bool) -> None:
        """Take in whether the adapter's gradients were finite in the step that has just ended."""
        if not self.enabled:
            return
        scale = self._scale_of(name)
        if not finite:
            scale.scale, scale.good_steps = scale.scale * BACKOFF, 0
            return
        scale.good_steps += 1
        if scale.good_steps == GROWTH_INTERVAL:
            scale.scale, scale.good_steps = scale.scale * GROWTH, 0

    def state_dict(self) -> dict[str, Any]:
        """Plain values by adapter, for a checkpoint; empty where there is nothing to scale."""
        return {name: asdict(scale) for name, scale in self._scales.items()} if self.enabled else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._scales = {name: LossScale(**values) for name, values in state.items()}

    def _scale_of(self, name: str) -> LossScale:
        return self._scales.setdefault(name, LossScale(self.initial))
