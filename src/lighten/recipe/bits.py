"""What settings about few bits get wrong: a quantised base, and quantisation-aware training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lighten.recipe.fields import AdapterOptions, RecipeFields


def problems(
    recipe: RecipeFields, cohort: Sequence[AdapterOptions], settings: Mapping[str, Any]
) -> list[str]:
    """A sentence for each.

    Args:
        recipe: All settings.
        cohort: The adapters; none where they cannot be told yet.
        settings: Those that are not at their defaults.
    """
    return _base_problems(recipe, settings) + _qat_problems(recipe, cohort, settings)


def _base_problems(recipe: RecipeFields, settings: Mapping[str, Any]) -> list[str]:
    """What the settings of a quantised base get wrong."""
    if recipe.load_in_4bit and recipe.load_in_8bit:
        return ["load_in_4bit and load_in_8bit cannot both be true; keep one"]
    bnb_keys = [key for key in settings if key.startswith("bnb_4bit_")]
    if not recipe.load_in_4bit:
        return [f"{key} has no effect without load_in_4bit: true; set it or remove {key}"
                for key in bnb_keys]  # fmt: skip
    compute = recipe.bnb_4bit_compute_dtype
    if "auto" not in (compute, recipe.dtype) and compute != recipe.dtype:
        return [
            f"bnb_4bit_compute_dtype is {compute} and dtype {recipe.dtype}, but the whole base "
            "computes in one format here; keep one of the two"
        ]
    return []


def _qat_problems(
    recipe: RecipeFields, cohort: Sequence[AdapterOptions], settings: Mapping[str, Any]
) -> list[str]:
    """What cannot hold where layers compute as their quantised selves."""
    if recipe.qat is None:
        return ["qat_group_size has no effect without qat; set it or remove qat_group_size"] * (
            "qat_group_size" in settings
        )
    faults = [
        f"{key}: a base in so few bits is rounded already, and qat rounds it anew with each "
        "adapter; keep one of the two"
        for key in ("load_in_4bit", "load_in_8bit")
        if getattr(recipe, key)
    ]
    if recipe.offload_base != "none":
        faults.append(
            f"offload_base: {recipe.offload_base} brings weights layer by layer to code that does "
            "not round them; remove it, or leave qat out"
        )
    if recipe.strategy in ("fsdp", "zero1", "zero2", "zero3"):
        faults.append(
            f"strategy: {recipe.strategy} spreads weights or state over ranks, and qat converts "
            "and compares whole layers; use strategy: ddp"
        )
    if recipe.torch_compile is True:
        faults.append(
            "torch_compile: layers of qat round their weights outside of compiled code; leave it "
            "at auto, or set it to false"
        )
    if isinstance(recipe.workers, int) and recipe.workers > 1:
        faults.append(
            f"workers: {recipe.workers} would round every weight of qat once in each; set it to 1"
        )
    if recipe.method == "full":
        return faults
    for adapter in cohort:
        if adapter.lora_dropout:
            faults.append(
                "lora_dropout drops inputs of the update alone, but qat adds the update to the "
                "weight before it is rounded; set lora_dropout to 0"
            )
        peft_modules = (
            adapter.use_dora
            or adapter.peft is not None
            or adapter.init_lora_weights not in (True, False, "gaussian", "orthogonal")
        )
        if peft_modules:
            faults.append(
                "qat rounds base and update together, which PEFT's own modules (use_dora, peft, "
                "init_lora_weights: pissa or olora) do not; use plain LoRA"
            )
    return list(dict.fromkeys(faults))
