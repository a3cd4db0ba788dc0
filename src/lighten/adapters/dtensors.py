"""Tensors of which each rank holds some rows: PyTorch's DTensor, cut along its first dimension.

Plain tensors go through everything here as they are, so that whoever saves or restores weights
need not know how they lie on the ranks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta


def rows_of(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """The rows that a rank holds of a whole tensor, as a view; the last ranks may have none."""
    size = -(-tensor.shape[0] // ranks)
    start = min(rank * size, tensor.shape[0])
    return tensor.narrow(0, start, min(size, tensor.shape[0] - start))


def spread(local: Tensor, like: Tensor, mesh: DeviceMesh) -> DTensor:
    """A tensor of the shape of another one from this rank's rows, which stay where they are.

    `DTensor.from_local` would move them to the mesh's device: what waits in main memory, to a GPU.

    Args:
        local: This rank's rows.
        like: A tensor of the whole shape.
        mesh: The ranks, in one dimension.
    """
    stride = torch.empty(like.shape, device="meta").stride()
    spec = DTensorSpec(mesh, (Shard(0),), TensorMeta(like.shape, stride, local.dtype))
    return DTensor(local, spec, requires_grad=False)


def full_tensor(tensor: Tensor) -> Tensor:
    """All rows; every rank has to call it at the same time where each holds some of them."""
    if not isinstance(tensor, DTensor):
        return tensor
    gathered: Tensor = tensor.full_tensor()
    return gathered


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, in its own memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    local: Tensor = tensor.to_local()
    return local


@torch.no_grad()
def copy_rows(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor's values into a live one, or into the rows that this rank holds of it."""
    if not isinstance(target, DTensor):
        target.copy_(value)
        return
    mesh = target.device_mesh
    target.to_local().copy_(rows_of(value, mesh.get_local_rank(), mesh.size()))


def any_spread(tensors: Iterable[Tensor]) -> bool:
    """Whether ranks hold different rows of any of them."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)
