"""How our engine computes in a test."""

from __future__ import annotations

import pytest

from lighten.generation import kernels


def choose_kernels(monkeypatch: pytest.MonkeyPatch, *, compiled: bool) -> None:
    """Compute by our kernels, which not every machine has, or by PyTorch's operations."""
    if compiled and kernels.library() is None:
        pytest.skip(f"no kernels: {kernels.obstacle()}")
    if not compiled:
        monkeypatch.setattr(kernels, "library", lambda: None)
