"""Who may take adapters out of a run before its end: a sweep that drops hopeless arms."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from lighten.engine.validation_loss import ValidationLoss


class Pruner(Protocol):
    """Asked after every step; what it names leaves the batch and keeps its weights."""

    def leaving(
        self, step: int, losses: Mapping[str, ValidationLoss], active: Sequence[str]
    ) -> Collection[str]:
        """The adapters that train no further.

        Args:
            step: Optimiser steps made.
            losses: Held-out losses measured after this step; empty where none were.
            active: Adapters still training.
        """

    def diverged(self, step: int, name: str) -> None:
        """An adapter's loss or gradient is not a number: it leaves, the others go on."""
