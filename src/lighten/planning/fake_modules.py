"""Modules of fake tensors that are moved and converted as real ones are.

`nn.Module.to` swaps a fake parameter's whole tensor, which PyTorch refuses as soon as anything
refers to it weakly, as whoever follows its memory does. PEFT calls it for each module it makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


@contextmanager
def converted_in_place() -> Iterator[None]:
    """Inside, `nn.Module.to`, `float` and their like keep a parameter and change its contents."""
    before = nn.Module._apply
    nn.Module._apply = _apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = before  # type: ignore[method-assign]


def _apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    if recurse:
        for child in module.children():
            _apply(child, fn)
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.data = _changed(parameter.data, fn)
            if parameter.grad is not None:
                parameter.grad.data = _changed(parameter.grad.data, fn)
    for key, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[key] = _changed(buffer, fn)
    return module


@torch.no_grad()
def _changed(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """What the conversion makes of it: itself where there is nothing to convert."""
    return fn(tensor)


def run_fake(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """An operation, on fake tensors also where PyTorch's fake form takes fewer formats.

    The product of experts runs in every format, but its shapes are told for bfloat16 alone
    (torch 2.13): they are the same in the others.
    """
    first = args[0] if args else None
    if (
        func is not torch.ops.aten._grouped_mm.default
        or not isinstance(first, FakeTensor)
        or first.dtype == torch.bfloat16
    ):
        return func(*args, **kwargs)
    alike = [
        x.to(torch.bfloat16) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args
    ]
    out: Tensor = func(*alike, **kwargs)
    return torch.empty_strided(out.shape, out.stride(), dtype=first.dtype, device=out.device)
