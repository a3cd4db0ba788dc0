"""What an operation costs: floating-point operations, bytes moved, and memory of its kernel's own.

Counted from shapes alone. A product of [m, k] and [k, n] takes 2 m k n operations; anything else is
counted by the bytes it reads and writes, each operand once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Work:
    """One operation.

    Attributes:
        name: Of the operation.
        flops: Floating-point operations of a matrix product or attention; 0 for any other.
        bytes: Read and written, each operand once.
        dtype: Of its result.
        shape: (m, k, n) of a product, batches counted into m.
    """

    name: str
    flops: int
    bytes: int
    dtype: torch.dtype
    shape: tuple[int, int, int] | None = None


def work_of(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], outs: Sequence[Tensor]
) -> Work | None:
    """The cost of an operation; None for views and whatever moves nothing.

    Args:
        func: The operation as the dispatcher knows it.
        args: What it was given.
        kwargs: What it was given by name.
        outs: The tensors of its result.
    """
    if not outs or getattr(func, "is_view", False):
        return None
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    name = func.name() if hasattr(func, "name") else str(func)
    packet = getattr(func, "overloadpacket", func)
    seen: set[int] = set()
    moved = 0
    for tensor in (*given, *outs):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            moved += tensor.numel() * tensor.element_size()
    if name.startswith(("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view")):
        return None
    flops = 0
    if packet in flop_registry:
        out = outs[0] if len(outs) == 1 else tuple(outs)
        flops = int(flop_registry[packet](*args, **kwargs, out_val=out))
    return Work(name, flops, moved, outs[0].dtype, _product_shape(packet, args))


def _product_shape(packet: Any, args: tuple[Any, ...]) -> tuple[int, int, int] | None:
    aten = torch.ops.aten
    place = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.addmm_: 1,
             aten.baddbmm: 1, aten.baddbmm_: 1}.get(packet)  # fmt: skip
    if place is None:
        return None
    left, right = args[place], args[place + 1]
    return math.prod(left.shape[:-1]), left.shape[-1], right.shape[-1]


def scratch_bytes(
    func: Any, args: tuple[Any, ...], outs: Sequence[Tensor], device: str
) -> int:
    """Memory that a kernel takes and gives back inside, which no dispatcher sees.

    Args:
        func: The operation.
        args: What it was given.
        outs: Its results.
        device: `cpu` or `cuda`.
    """
    del func, args, outs, device
    return 0
