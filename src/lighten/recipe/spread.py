"""What does not go together with a strategy that spreads weights, gradients or state over ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lighten.errors import UserError
from lighten.recipe.offloading import OWN_INITS

if TYPE_CHECKING:
    from lighten.recipe import Recipe

UNSHARDED = ("auto", "single", "ddp")
# Optimisers whose state has the parameter's shape and that treat each number by itself.
BY_NUMBER = ("adamw_torch", "adamw_torch_fused", "sgd")


def gathers(strategy: str, *, full: bool) -> bool:
    """Whether ranks gather weights within a pass.

    Args:
        strategy: By name.
        full: The base's own weights learn.
    """
    return strategy in ("fsdp", "zero3") or (strategy == "zero2" and full)


def gathers_layers(recipe: Recipe, ranks: int) -> bool:
    """Whether a recipe's layers are gathered within a pass, by ranks or by one process alone."""
    several = ranks > 1 or recipe.offload_params != "none"
    return several and gathers(recipe.strategy, full=recipe.method == "full")


def problems(recipe: Recipe) -> list[str]:
    """What cannot hold together, each with what to change."""
    name, full = recipe.strategy, recipe.method == "full"
    if name in UNSHARDED:
        return []
    faults = []
    spreads_state = full or name in ("zero1", "zero2")
    if spreads_state and recipe.optim not in BY_NUMBER:
        faults.append(
            f"optim: {recipe.optim} needs whole parameters, of which strategy: {name} leaves a "
            f"rank some rows; use {BY_NUMBER[0]} or sgd, or strategy: ddp"
        )
    if not gathers(name, full=full):
        return faults
    if recipe.activation_offload:
        faults.append(
            f"activation_offload would keep gathered weights with strategy: {name}; use "
            "gradient_checkpointing"
        )
    if recipe.torch_compile is True:
        faults.append(
            f"torch_compile: layers are gathered as they are needed with strategy: {name}; set it "
            "to false or auto"
        )
    if isinstance(recipe.workers, int) and recipe.workers > 1:
        faults.append(
            f"workers: {recipe.workers} would gather each layer as many times with strategy: "
            f"{name}; remove it"
        )
    if recipe.qat is not None:
        faults.append(f"qat compares whole weights, of which strategy: {name} leaves a rank some "
                     "rows; use strategy: ddp")  # fmt: skip
    if recipe.offload_base != "none":
        faults.append(
            f"offload_base: {recipe.offload_base} streams the layers that strategy: {name} spreads "
            "over ranks; keep one of the two"
        )
    if not full and (recipe.peft is not None or any(
        adapter.use_dora or adapter.init_lora_weights not in OWN_INITS
        for adapter in recipe.cohort()
    )):  # fmt: skip
        faults.append(
            "PEFT's own modules (peft, use_dora, init_lora_weights from the base's weights) need "
            f"whole weights, of which strategy: {name} leaves a rank some rows; use strategy: ddp"
        )
    return faults


def require_ranks(recipe: Recipe, count: int) -> None:
    """See to it that a recipe can be trained by so many ranks.

    Raises:
        UserError: One process is wanted and there are more, or the other way about.
    """
    if recipe.strategy == "single" and count > 1:
        raise UserError(
            f"strategy: single trains in one process, but {count} ranks are wanted; leave it out, "
            "or take one"
        )
    if recipe.offload_base != "none" and count > 1:
        raise UserError(
            f"offload_base: {recipe.offload_base} trains in one process, and {count} ranks are "
            "wanted, each of which would read the whole base; take one, or set offload_base to "
            "none"
        )
