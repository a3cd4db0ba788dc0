"""A base whose layers come when a pass asks for them: whether it can be, and its steps."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lighten.adapters import AdapterSpec
from lighten.adapters.decoder import decoder_layers
from lighten.adapters.targets import saved_paths
from lighten.errors import UserError
from lighten.machine.hardware import Choice
from lighten.models.load import Build, locate
from lighten.models.quantized import Storage
from lighten.models.stored import stored_as, written_by_bitsandbytes
from lighten.parallel.streamed.build import Setting, build
from lighten.recipe import Recipe
from lighten.recipe.spread import gathers

log = logging.getLogger(__name__)


def require_possible(recipe: Recipe, device: str) -> None:
    """Say what stands against `offload_base` here, before anything is loaded.

    Args:
        recipe: What is wanted.
        device: `cpu` or `cuda`.

    Raises:
        UserError: The layers have nowhere to wait.
    """
    target = recipe.offload_base
    if target == "none":
        return
    if device not in ("cpu", "cuda"):
        raise UserError(f"offload_base: {target} knows processors and CUDA GPUs, not {device}")
    if target == "cpu" and device == "cpu":
        raise UserError(
            "offload_base: cpu keeps the layers in main memory for a GPU, but this run computes on "
            "the processor; use offload_base: disk"
        )


def builder(
    recipe: Recipe, device: str, specs: Sequence[AdapterSpec], learns: bool, ranks: int = 1
) -> Build | None:
    """What makes the recipe's base for `models.load`; None: it is loaded whole.

    Args:
        recipe: What is wanted.
        device: Where it computes.
        specs: The adapters that will be attached.
        learns: It is about to be trained.
        ranks: How many processes train it together.
    """
    setting = Setting()
    keeps: str = recipe.offload_base
    if learns and ranks > 1 and spreads_packed(recipe):
        setting = Setting(f"strategy: {recipe.strategy}", "use strategy: ddp")
        keeps = "ranks"
    elif recipe.offload_base == "none":
        return None
    if not learns:
        log.warning(
            "offload_base: %s streams the base while it trains; here it is loaded whole",
            recipe.offload_base,
        )
        return None

    def build_streamed(
        folder: Path, dtype: torch.dtype, storage: Storage | None
    ) -> tuple[PreTrainedModel, Any]:
        streamed = build(
            recipe.model_name_or_path, folder, dtype, device=device, storage=storage,
            keeps=keeps, trust_remote_code=recipe.trust_remote_code,
            check=functools.partial(_require_outside, specs, setting), setting=setting,
        )  # fmt: skip
        return streamed.model, streamed.feed

    return build_streamed


def spreads_packed(recipe: Recipe) -> bool:
    """Whether several ranks would each hold a part of a base in few bits.

    It is in few bits if the recipe says so, or its files.

    Args:
        recipe: What is wanted.

    Raises:
        UserError: There is no such model.
    """
    if recipe.method != "lora" or not gathers(recipe.strategy, full=False):
        return False
    if recipe.load_in_4bit or recipe.load_in_8bit:
        return True
    _, folder = locate(
        recipe.model_name_or_path, revision=recipe.revision, weights=False,
        code=recipe.trust_remote_code,
    )  # fmt: skip
    return written_by_bitsandbytes(stored_as(folder)) is not None


def facts(recipe: Recipe, feed: Any) -> dict[str, Any]:
    """What `run.json` keeps of layers that came when they were asked for.

    Args:
        recipe: What was trained.
        feed: What brought them; None: they were in memory.
    """
    if feed is None:
        return {}
    return {"offload_base" if recipe.offload_base != "none" else "spread_base": feed.facts()}


def _require_outside(
    specs: Sequence[AdapterSpec], setting: Setting, model: PreTrainedModel
) -> None:
    """No whole copy is made of what is streamed.

    Raises:
        UserError: `modules_to_save` names a part of a decoder layer.
    """
    inside = {id(module) for layer in decoder_layers(model) for module in layer.modules()}
    for spec in specs:
        for path in saved_paths(model, spec):
            if any(id(module) in inside for module in model.get_submodule(path).modules()):
                raise UserError(
                    f"{setting.name}: modules_to_save of adapter {spec.name!r} names {path}, whose "
                    "weights are streamed and would have to stay for a copy that learns; name the "
                    f"embedding or the head alone, or {setting.instead}"
                )


def describe(target: str, feed: Any) -> Choice:
    """What is in memory, and where the rest waits.

    Args:
        target: `cpu` or `disk`.
        feed: What brings the layers.
    """
    waits = {"disk": "in the model's files", "cpu": "in pinned main memory"}[target]
    return Choice(
        target,
        f"{feed.base_bytes / 2**30:.2f} GiB of {len(feed.layers)} layers wait {waits}, "
        f"{feed.slot_bytes / 2**30:.2f} GiB for two of them are in memory",
    )


def micro_batch(recipe: Recipe, adapters: int) -> tuple[int | None, int, str]:
    """Tokens and rows of a micro-batch at most, and why: each reads the whole base again.

    Args:
        recipe: What is wanted.
        adapters: How many of them share each pass.
    """
    rows = recipe.per_device_train_batch_size * adapters
    if isinstance(recipe.tokens_per_microbatch, int):
        return recipe.tokens_per_microbatch, rows, "tokens_per_microbatch of the recipe"
    return None, rows, (
        "each micro-batch reads the base again: per_device_train_batch_size rows of every adapter"
    )  # fmt: skip
