"""What other estimators say of the configurations of `plan_accuracy.py`.

They estimate a GPU's memory with an allowance for CUDA's context; here that is taken off, so that
what is compared is weights, adapters, optimiser, gradients and activations alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def install() -> None:
    pass


def estimates(case: Any, folder: Any) -> dict[str, Any]:
    return {}


def errors(row: Mapping[str, Any]) -> dict[str, float]:
    return {}


def summary(rows: Any) -> dict[str, Any]:
    return {}
