"""Decoder layers rounded to 4 bits for what they will see: calibration by GPTQ.

One decoder layer is rounded at a time, on what the layers before it, rounded already, make of the
calibration rows.

Dimensions: O outputs, I inputs, G groups of a row.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lighten.adapters.decoder import decoder_layers
from lighten.quantization import gptq

Rounded = dict[str, tuple[Tensor, Tensor]]  # integers and scales of a layer, by its path


def quantised_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers inside the decoder layers, by path."""
    inside = {id(m) for layer in decoder_layers(model) for m in layer.modules()}
    return {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in inside}


@torch.no_grad()
def rounded_layers(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    group_size: Callable[[nn.Linear], int | None],
    scales: gptq.Scales = gptq.HALF,
) -> Rounded:
    """Round the linear layers inside the decoder layers, in place.

    Args:
        model: In float32.
        rows: Token ids of calibration rows.
        group_size: Numbers of a layer's row that share a scale; None: it is left as it is.
        scales: How they are stored.

    Returns:
        Integers [O, I] and scales [O, G] by the layer's path; none where the architecture does not
        say what its decoder layers are.
    """
    layers = decoder_layers(model)
    if not layers:
        return {}
    paths = {id(module): path for path, module in quantised_layers(model).items()}
    states, calls = _inputs(model, layers, rows)
    rounded: Rounded = {}
    for number, layer in enumerate(layers):
        moments = _moments(layer, states, [call[number] for call in calls])
        for module in layer.modules():
            if not isinstance(module, nn.Linear) or (size := group_size(module)) is None:
                continue
            weight = module.weight
            second_moments = moments.get(id(module))
            # An expert that no row went to has nothing to be rounded for.
            integers, factors = (
                gptq.rounded_plainly(weight, size, scales)
                if second_moments is None
                else gptq.rounded(weight.detach(), second_moments, size, scales)
            )
            rounded[paths[id(module)]] = integers, factors
            groups = integers.unflatten(1, (-1, size)) * factors[..., None]
            weight.copy_(groups.flatten(1))
        states = [_first(layer(x, **call[number])) for x, call in zip(states, calls, strict=True)]
    return rounded


class _Reached(Exception):
    """The last decoder layer was called: the rest of the pass is not needed."""


def _inputs(
    model: PreTrainedModel, layers: Sequence[nn.Module], rows: Sequence[Sequence[int]]
) -> tuple[list[Tensor], list[list[dict[str, Any]]]]:
    """What enters the first layer, by row, and what else each layer is called with."""
    first = next(iter(inspect.signature(layers[0].forward).parameters))
    states: list[Tensor] = []
    calls: list[list[dict[str, Any]]] = []

    def capture(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if layer is layers[0]:
            states.append(args[0] if args else kwargs[first])
            calls.append([])
        named = dict(zip(inspect.signature(layer.forward).parameters, args, strict=False)) | kwargs
        calls[-1].append({key: value for key, value in named.items() if key != first})
        if layer is layers[-1]:
            raise _Reached

    hooks = [layer.register_forward_pre_hook(capture, with_kwargs=True) for layer in layers]
    try:
        for row in rows:
            with contextlib.suppress(_Reached):
                model(input_ids=torch.tensor([list(row)]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return states, calls


def _moments(
    layer: nn.Module, states: Sequence[Tensor], calls: Sequence[dict[str, Any]]
) -> dict[int, Tensor]:
    """Second moments of what each linear layer inside reads, by its id."""
    moments: dict[int, Tensor] = {}
    last: tuple[Tensor, Tensor] | None = None  # what was read last, and its moments

    def add_moments(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal last
        if last is None or last[0] is not args[0]:
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            last = args[0], x.T @ x
        if id(module) in moments:
            moments[id(module)] += last[1]
        else:
            moments[id(module)] = last[1].clone()

    hooks = [m.register_forward_pre_hook(add_moments) for m in layer.modules()
             if isinstance(m, nn.Linear)]  # fmt: skip
    for x, call in zip(states, calls, strict=True):
        layer(x, **call)
    for hook in hooks:
        hook.remove()
    return moments


def _first(out: Any) -> Tensor:
    """Some architectures' layers return more than what goes on."""
    hidden_states: Tensor = out[0] if isinstance(out, tuple) else out
    return hidden_states
