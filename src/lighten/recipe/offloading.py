"""What does not go together with a base or a state that is not where the computing is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lighten.recipe import Recipe

# As `adapters.spec.OWN_INITS`: the others read the base's weights, and train in PEFT's modules.
OWN_INITS = (True, False, "gaussian", "orthogonal")
# Strategies that leave each rank its part of the base's weights.
SPREADING = ("fsdp", "zero3")
# Optimisers whose state can wait elsewhere.
OFFLOADED = ("adamw_torch", "adamw_torch_fused")


def problems(recipe: Recipe) -> list[str]:
    """What a recipe that offloads something asks for and cannot have, a sentence each."""
    return _base_problems(recipe) + _state_problems(recipe) + _weight_problems(recipe)


def _state_problems(recipe: Recipe) -> list[str]:
    problems = []
    device = recipe.offload_optimizer
    if device != "none" and recipe.optim not in OFFLOADED:
        problems.append(
            f"offload_optimizer: {device} moves AdamW's state, and optim: {recipe.optim} has "
            f"another or none; use optim: {OFFLOADED[0]}, or remove it"
        )
    if recipe.nvme_path is not None and "nvme" not in (device, recipe.offload_params):
        problems.append("nvme_path is the folder of offload_optimizer: nvme; set that, or remove "
                        "nvme_path")  # fmt: skip
    return problems


def _weight_problems(recipe: Recipe) -> list[str]:
    device = recipe.offload_params
    if device == "none":
        return []
    label = f"offload_params: {device}"
    if recipe.method != "full":
        return [
            f"{label} moves weights that learn, and method: {recipe.method} leaves the base "
            "frozen; use offload_base, or remove it"
        ]
    problems = []
    if recipe.strategy not in SPREADING:
        problems.append(
            f"{label} moves a rank's part of the weights, and strategy: {recipe.strategy} leaves "
            "them whole; use strategy: zero3, or remove it"
        )
    if device == "nvme" and recipe.offload_optimizer != "nvme":
        problems.append(
            f"{label} without offload_optimizer: nvme leaves twice as much in memory as it takes "
            "out; set that, too"
        )
    return problems


def _base_problems(recipe: Recipe) -> list[str]:
    if recipe.offload_base == "none":
        return []
    label = f"offload_base: {recipe.offload_base}"
    if recipe.method == "full":
        return [
            f"{label} streams layers that are frozen, and method: full trains them; use method: "
            "lora, or remove it"
        ]
    faults = []
    if recipe.peft is not None or any(
        adapter.use_dora or adapter.init_lora_weights not in OWN_INITS
        for adapter in recipe.cohort()
    ):
        faults.append(
            f"{label} goes with plain LoRA: PEFT's own modules (peft, use_dora, init_lora_weights "
            "from the base's weights) keep the weights that they compute with; remove one of the "
            "two"
        )
    if recipe.load_in_8bit:
        faults.append(f"{label} streams dense layers or 4 bits; use load_in_4bit, or remove it")
    if recipe.torch_compile is True:
        faults.append(f"{label} brings weights to code that is not compiled; remove torch_compile")
    if isinstance(recipe.workers, int) and recipe.workers > 1:
        faults.append(
            f"{label} follows one micro-batch at a time: workers would each need a layer; "
            "set workers to 1 or auto"
        )
    return faults
