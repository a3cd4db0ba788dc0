"""Optimiser state and weights outside of the device that computes: whether, and where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lighten.errors import UserError
from lighten.machine.hardware import Choice
from lighten.parallel.offloaded.stores import MainMemory, Scratch, Store
from lighten.recipe import Recipe

SETTINGS = ("offload_optimizer", "offload_params")


def require_possible(recipe: Recipe, device: str) -> None:
    """Say what stands against `offload_optimizer` and `offload_params` before anything is loaded.

    Args:
        recipe: What is wanted.
        device: `cpu` or `cuda`.

    Raises:
        UserError: It cannot be done on this device, or nothing can be written to `nvme_path`.
    """
    for setting in SETTINGS:
        target = getattr(recipe, setting)
        if target != "none" and device not in ("cpu", "cuda"):
            raise UserError(f"{setting}: {target} knows processors and CUDA GPUs, not {device}")
    if recipe.nvme_path is not None:
        Scratch(Path(recipe.nvme_path).expanduser(), "nvme_path")


class Stores:
    """What a recipe's settings mean on a device.

    Args:
        recipe: What is wanted.
        device: `cpu` or `cuda`.
    """

    def __init__(self, recipe: Recipe, device: str) -> None:
        self._recipe, self._device = recipe, device
        self.choices: dict[str, Choice] = {}
        self._scratch: Scratch | None = None

    def optimizer(self) -> Callable[[], Store] | None:
        """Makes the store of an optimiser's state; None: it stays on the device."""
        return self._store("offload_optimizer")

    def weights(self) -> Callable[[], Store] | None:
        """Makes the store of a rank's part of the weights that learn; None: they stay."""
        store = self._store("offload_params")
        return MainMemory if self._recipe.offload_params == "cpu" else store

    def _store(self, setting: str) -> Callable[[], Store] | None:
        target = getattr(self._recipe, setting)
        if target == "none":
            return None
        if target == "nvme":
            folder = Path(self._recipe.nvme_path or self._recipe.run_folder).expanduser()
            self.choices[setting] = Choice(f"a file in {folder}", f"{setting}: nvme")
            setting_name = "nvme_path" if self._recipe.nvme_path else setting
            return lambda: self._in_files(folder, setting_name)
        reason = f"{setting}: cpu"
        if self._device == "cpu":
            reason += "; this run computes there, so nothing moves (nvme would need less of it)"
        self.choices[setting] = Choice("main memory", reason)
        return None if self._device == "cpu" else MainMemory

    def _in_files(self, folder: Path, setting_name: str) -> Scratch:
        """One for all: who moves a weight lets go of it with the state beside it."""
        if self._scratch is None:
            self._scratch = Scratch(folder, setting_name)
        return self._scratch
