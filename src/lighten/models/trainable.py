"""Whether gradients pass through a base: adapters behind a layer that stops them learn wrongly.

torchao's layers that round their input while they run give that input no gradient (0.18.0): only
what lies above the last of them would be trained rightly, and nothing says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lighten.errors import UserError
from lighten.models.stored import stored_as

ADVICE = (
    "adapters below would learn from wrong gradients; train on the unquantised model it was made "
    "from, and quantise what comes of it"
)


def refuse_rounded_activations(name: str, folder: Path) -> None:
    """A folder whose model rounds activations while it runs is no base for training.

    Args:
        name: As the user calls it.
        folder: Of the model; its configuration alone is read.

    Raises:
        UserError: It is one of torchao with dynamic (or static) activations.
    """
    config = stored_as(folder)
    if config is None or config.get("quant_method") != "torchao":
        return
    for config_name in _config_names(config.get("quant_type")):
        if "activation" in config_name.lower():
            raise UserError(
                f"{name} cannot be trained on: torchao's {config_name} rounds activations while it "
                f"runs and passes no gradient on, so {ADVICE}"
            )


def _config_names(config: Any) -> Iterator[str]:
    """Names of torchao's configurations, whatever they are nested in."""
    if isinstance(config, str):  # as older files have it
        yield config
    elif isinstance(config, dict):
        if isinstance(config.get("_type"), str):
            yield config["_type"]
        for value in config.values():
            if isinstance(value, dict):
                yield from _config_names(value)


def require_gradients(name: str, model: nn.Module) -> None:
    """Each kind of linear layer whose weight is no plain tensor passes a gradient to its input.

    Args:
        name: As the user calls the model.
        model: Loaded.

    Raises:
        UserError: One does not.
    """
    checked: set[tuple[type, type]] = set()
    for path, layer in model.named_modules():
        weight = getattr(layer, "weight", None)
        layer_type = (type(layer), type(weight))
        plain = type(weight) in (torch.Tensor, nn.Parameter)
        if not isinstance(layer, nn.Linear) or plain or layer_type in checked:
            continue
        checked.add(layer_type)
        device, dtype = layer.weight.device, model.dtype
        x = torch.ones(1, layer.in_features, device=device, dtype=dtype, requires_grad=True)  # type: ignore[call-overload]
        with torch.enable_grad():
            out = layer(x)
        if not out.requires_grad:
            raise UserError(
                f"{name} cannot be trained on: {path} ({layer_type[1].__name__}) passes no "
                f"gradient to its input, so {ADVICE}"
            )
