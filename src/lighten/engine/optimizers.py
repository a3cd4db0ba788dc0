"""Optimisers by transformers' names, made for one adapter's parameters.

LoRA+ (https://arxiv.org/abs/2402.12354): with `loraplus_lr_ratio` the B factors learn at that many
times the learning rate. Only they do; PEFT speeds up biases and norms trained whole as well.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lighten.adapters import dtensors
from lighten.errors import require_package
from lighten.machine.hardware import Choice
from lighten.parallel.offloaded.adamw import OffloadedAdamW
from lighten.parallel.offloaded.stores import Store

# Names for the same thing.
SAME = {"adamw_bnb_8bit": "adamw_8bit", "adamw_torch_fused": "adamw_torch"}
# What a paged optimiser is where there is nothing to page out of. bitsandbytes calls its own
# fallback "not supported"; PyTorch's AdamW is the same optimiser at 32 bits.
UNPAGED = {
    "paged_adamw_8bit": "adamw_8bit", "paged_adamw_32bit": "adamw_torch",
    "paged_lion_8bit": "lion_8bit", "paged_lion_32bit": "lion_32bit",
}  # fmt: skip
BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit", "lion_8bit": "Lion8bit", "lion_32bit": "Lion32bit",
    "paged_lion_8bit": "PagedLion8bit", "paged_lion_32bit": "PagedLion32bit",
}  # fmt: skip
# Made anew with the optimiser, the same for all parameters: no checkpoint needs them.
CONSTANTS = ("qmap1", "qmap2")
NUMBER = "number/"  # before the name of a part of the state that is no tensor


def choose(name: str, device: str) -> Choice:
    """The optimiser that a name means on a device, and why.

    Args:
        name: `optim` of the recipe.
        device: `cpu` or a CUDA device.

    Raises:
        MissingExtra: It needs bitsandbytes, which is not installed.
    """
    optimizer, reason = SAME.get(name, name), "optim of the recipe"
    if device == "cpu" and optimizer in UNPAGED:
        optimizer = UNPAGED[optimizer]
        reason = f"{name} without paging, which moves state out of a GPU's memory: there is no GPU"
    if optimizer.endswith("8bit"):
        reason += "; tensors of fewer than 4096 numbers keep a 32-bit state"
    if optimizer in BITSANDBYTES:
        require_package("bitsandbytes", "quant")
    return Choice(optimizer, reason)


def make(
    name: str,
    parameters: Mapping[str, nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    epsilon: float,
    loraplus_lr_ratio: float | None = None,
    undecayed: Collection[str] = (),
    store: Store | None = None,
) -> torch.optim.Optimizer:
    """An optimiser over the parameters.

    Each of its groups has an `lr_factor`: what the group's rate is of the run's.

    Args:
        name: As `choose` gave it.
        parameters: By PEFT key.
        learning_rate: Peak rate of the groups whose factor is 1.
        weight_decay: Decoupled; SGD's is added to the gradient.
        betas: Decay rates of AdamW and Lion.
        epsilon: AdamW's.
        loraplus_lr_ratio: Factor of the B factors' rate, or None.
        undecayed: Keys of the parameters that do not decay.
        store: Where the state waits (AdamW's alone); None: beside the parameters.
    """
    groups = [
        {
            "params": group,
            "lr_factor": factor,
            "lr": learning_rate * factor,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (factor, decays), group in _groups(
            parameters, loraplus_lr_ratio or 1.0, undecayed
        ).items()
    ]
    common: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
    if store is not None:
        assert name == "adamw_torch"
        return OffloadedAdamW(groups, store, betas=betas, eps=epsilon, **common)
    if name == "adamw_torch":
        # One kernel for hundreds of small factors, on CPU and GPU alike.
        return torch.optim.AdamW(groups, betas=betas, eps=epsilon, fused=True, **common)
    if name == "sgd":
        # PyTorch's one kernel for it knows no tensor whose rows are on several ranks.
        is_spread = dtensors.any_spread(parameters.values())
        return torch.optim.SGD(groups, fused=not is_spread, **common)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        # As transformers' Trainer sets it: the rate is the recipe's, and so is its course.
        return Adafactor(groups, scale_parameter=False, relative_step=False, **common)
    import bitsandbytes

    if "adamw" in name:
        common["eps"] = epsilon
    optimizer: torch.optim.Optimizer = getattr(bitsandbytes.optim, BITSANDBYTES[name])(
        groups, betas=betas, **common
    )
    return optimizer


def _groups(
    parameters: Mapping[str, nn.Parameter], ratio: float, undecayed: Collection[str]
) -> dict[tuple[float, bool], list[nn.Parameter]]:
    """Parameters by the factor of their learning rate and whether they decay, in order."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for key, parameter in parameters.items():
        factor = ratio if key.endswith("lora_B.weight") else 1.0
        groups.setdefault((factor, key not in undecayed), []).append(parameter)
    return groups


def state_tensors(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """All that an optimiser remembers of a parameter, as tensors.

    Plain numbers become tensors whose names say so: some optimisers count their steps in an int.
    """
    tensors: dict[str, Tensor] = {}
    for part, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor):
            if part not in CONSTANTS:
                tensors[part] = value
        elif value is not None:
            exact = torch.int64 if isinstance(value, int) else torch.float64
            tensors[NUMBER + part] = torch.tensor(value, dtype=exact)
    return tensors


@torch.no_grad()
def restore_state(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, saved: Mapping[str, Tensor]
) -> None:
    """Put back what `state_tensors` gave."""
    state: dict[str, Any] = optimizer.state[parameter]
    if hasattr(optimizer, "init_state") and not state:
        # bitsandbytes: paged buffers and quantisation maps can only be had from itself.
        for place, group in enumerate(optimizer.param_groups):
            for index, candidate in enumerate(group["params"]):
                if candidate is parameter:
                    optimizer.init_state(group, parameter, place, index)
    for name, value in saved.items():
        part = name.removeprefix(NUMBER)
        if part != name:
            state[part] = value.item()
        elif isinstance(state.get(part), Tensor):
            dtensors.copy_rows(state[part], value)
        elif isinstance(parameter, DTensor) and value.shape == parameter.shape:
            state[part] = torch.empty_like(parameter, requires_grad=False)
            dtensors.copy_rows(state[part], value)
        else:
            # A count of steps stays on the processor unless the kernel reads it.
            on_device = value.dim() > 0 or optimizer.defaults.get("fused")
            state[part] = value.to(parameter.device if on_device else "cpu", copy=True)
