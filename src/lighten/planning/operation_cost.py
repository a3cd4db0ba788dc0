"""What an operation costs, counted from shapes alone, and the call to repeat it with real numbers.

A product of [m, k] and [k, n] takes 2 m k n operations; anything else is counted by the bytes it
reads and writes, each operand once, and of a table only the rows that are taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

# PyTorch has formulas of what they do out of place.
IN_PLACE = {
    torch.ops.aten.addmm_: torch.ops.aten.addmm, torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm,
}  # fmt: skip
# None where PyTorch was built without oneDNN, as for Macs.
LINEAR_OF_ONEDNN: Any = getattr(
    getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None
)
# They take memory or look at it, and move nothing.
LOOKUPS = ("aten::embedding", "aten::index_select", "aten::gather", "aten::index")
FREE = (
    "aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view", "aten::_local",
    "prim::",
)  # fmt: skip

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Shaped:
    """A tensor without its numbers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Shaped:
        """What is left of a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    @property
    def bytes(self) -> int:
        """Of all its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize

    def turned(self) -> bool:
        """Whether the numbers of its last dimension lie apart."""
        return bool(self.stride) and self.shape[-1] > 1 and self.stride[-1] != 1

    def meta(self) -> Tensor:
        """A tensor of this shape that has no memory."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")

    def to_tensor(self) -> Tensor:
        """A real tensor of this shape; its numbers mean nothing, as indices they are valid."""
        # What was expanded is one number along that dimension.
        shape = [
            1 if stride == 0 else size for size, stride in zip(self.shape, self.stride, strict=True)
        ]
        tensor = torch.empty_strided(shape, self.stride, dtype=self.dtype)
        return tensor.fill_(0.5 if self.dtype.is_floating_point else 0).expand(self.shape)


@dataclass(frozen=True, eq=False)
class Work:
    """One operation.

    Attributes:
        name: Of the operation.
        flops: Floating-point operations of a matrix product or attention; 0 for any other.
        bytes: Read and written, each operand once.
        dtype: Of its result.
        func: The operation itself.
        args: What it was given, tensors as `Shaped`.
        kwargs: The same by name.
    """

    name: str
    flops: int
    bytes: int
    dtype: torch.dtype
    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def operands(self) -> tuple[Shaped, ...]:
        """The tensors it was given by position: `out=` is none."""
        return tuple(inside(self.args, Shaped))

    @property
    def factors(self) -> tuple[Shaped, ...]:
        """What a product multiplies: a vector is its bias."""
        return tuple(x for x in self.operands if len(x.shape) > 1)[-2:]

    @property
    def tensors(self) -> tuple[Shaped, ...]:
        """Every tensor it was given."""
        return (*self.operands, *inside(self.kwargs, Shaped))


def inside(tree: Any, kind: type[Kind]) -> Iterator[Kind]:
    """All of a kind in an operation's arguments or results, lists and tuples of them included.

    PyTorch's trees do this for any structure, and took a tenth of a plan.
    """
    if isinstance(tree, kind):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for branch in tree:
            yield from inside(branch, kind)
    elif isinstance(tree, Mapping):
        for branch in tree.values():
            yield from inside(branch, kind)


def _with(tree: Any, kind: type[Kind], change: Callable[[Kind], Any]) -> Any:
    """The same arguments with all of a kind changed."""
    if isinstance(tree, kind):
        return change(tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)([_with(branch, kind, change) for branch in tree])
    if isinstance(tree, Mapping):
        return {name: _with(branch, kind, change) for name, branch in tree.items()}
    return tree


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
    name = func.name() if hasattr(func, "name") else str(func)
    if getattr(func, "is_view", False) or name.startswith(FREE):
        return None
    tensors = [*inside(args, Tensor), *inside(kwargs, Tensor)]
    everything = {id(x): x for x in (*tensors, *outs)}.values()
    if not everything:
        return None
    touched = [*everything]
    if name.partition(".")[0] in LOOKUPS:
        touched = [*outs, *outs, *tensors[1:]]
    moved = sum(x.numel() * x.element_size() for x in touched)
    flops = flops_of(func, args, kwargs, outs[0] if len(outs) == 1 else tuple(outs)) if outs else 0
    shaped_args, shaped_kwargs = _with((tuple(args), kwargs), Tensor, Shaped.of)
    dtype = outs[0].dtype if outs else tensors[0].dtype
    return Work(name, flops, moved, dtype, func, shaped_args, shaped_kwargs)


def flops_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any = None) -> int:
    """By PyTorch's formula, from tensors or what is `Shaped` like them; 0 where there is none."""
    packet = getattr(func, "overloadpacket", func)
    if func is LINEAR_OF_ONEDNN:
        return 2 * math.prod(args[0].shape) * int(args[1].shape[0])
    formula = flop_registry.get(IN_PLACE.get(packet, packet))
    if formula is None:
        return 0
    args, kwargs = _with((tuple(args), kwargs), Shaped, Shaped.meta)
    try:
        return int(formula(*args, **kwargs, out_val=out))
    except AssertionError:
        # PyTorch 2.11 refuses grouped keys, whose heads are repeated then.
        heads = max(x.shape[1] for x in args if isinstance(x, Tensor) and x.dim() == 4)
        return int(formula(*(_with_heads(x, heads) for x in args), **kwargs, out_val=out))


def _with_heads(x: Any, heads: int) -> Any:
    """The shape of an attention's argument, as if each query head had keys of its own."""
    if not isinstance(x, Tensor) or x.dim() != 4:
        return x
    return torch.empty(x.shape[0], heads, *x.shape[2:], device="meta")
