"""Decoder layers in 4 bits, to be streamed: as a checkpoint holds them, or quantised once and kept.

The kept files have bitsandbytes' own names and contents, as transformers saves a quantised model:
`…weight` (packed), `…weight.absmax` and the rest of its `QuantState`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lighten.errors import DiskFull
from lighten.machine.disk import require_cache_room
from lighten.machine.hardware import cache_folder
from lighten.models import quantized
from lighten.models.quantized import Storage
from lighten.parallel.streamed.shards import DTYPES, Loaded, Shards
from lighten.whole_files import whole_folder

log = logging.getLogger(__name__)
# Raised when what is written changes, so that an old copy is not taken for it.
LAYOUT = 1
INT8_SCALES = "SCB"  # bitsandbytes' name beside `weight`
_DONE = "complete"

# A linear layer by its path in the model: the module, and its dense weight's name in the files.
Linear = tuple[str, nn.Module, str]


def quantised(
    folder: Path, shards: Shards, layers: Sequence[Sequence[Linear]], storage: Storage,
    compute: torch.dtype,
) -> Shards:  # fmt: skip
    """The linear layers in few bits, quantised at the first call, a layer at a time.

    Args:
        folder: Of the model.
        shards: Its files' tensors.
        layers: The linear layers of each decoder layer.
        storage: Of 4 bits.
        compute: The format that weights are rounded from.

    Raises:
        UserError: There is no room for the copy.
    """
    copy = cache_folder() / "streamed" / _fingerprint(shards, storage, compute) / str(LAYOUT)
    if not (copy / _DONE).is_file():
        stored = [shards[name] for layer in layers for _, _, name in layer]
        numbers = sum(tensor.bytes // DTYPES[tensor.kind].itemsize for tensor in stored)
        needed = int(0.57 * numbers)  # half a byte, and a float32 for 64 of them
        require_cache_room(copy, needed, f"offload_base: {folder} in 4 bits")
        log.warning(
            "quantising %s to %s once; the copy (%.1f GB) is kept in %s",
            folder, storage, needed / 1e9, copy,
        )  # fmt: skip
        with whole_folder(copy) as partial:
            for place, layer in enumerate(layers):
                tensors = packed_layer(layer, shards, storage, compute)
                try:
                    save_file(tensors, partial / f"layer-{place:05d}.safetensors")
                except SafetensorError as error:  # how its files tell of a full disk
                    raise DiskFull(f"{copy} could not be written ({error}); free space there, or "
                                   "set LIGHTEN_CACHE to another folder") from error  # fmt: skip
            (partial / _DONE).touch()
    return Shards(sorted(copy.glob("*.safetensors")))


def packed_layer(
    linears: Sequence[Linear], shards: Shards, storage: Storage, compute: torch.dtype
) -> dict[str, Tensor]:
    """A decoder layer's linear layers in few bits, under bitsandbytes' names.

    Args:
        linears: Which.
        shards: The model's tensors.
        storage: What they become.
        compute: The format that weights are rounded from.
    """
    tensors: dict[str, Tensor] = {}
    for path, module, name in linears:
        tensors |= _packed(path, module, name, shards, storage, compute)
    return tensors


def _packed(
    path: str, module: nn.Module, name: str, shards: Shards, storage: Storage, compute: torch.dtype
) -> dict[str, Tensor]:
    weight = torch.empty(module.weight.shape, dtype=compute)  # type: ignore[arg-type]
    shards.read(name, weight)
    with torch.device("meta"):
        plain: Any = type(module)(1, 1)  # Linear or Conv1D, of which the weight alone is read
    plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), None
    packed: Any = quantized.quantised(plain, storage, compute, "cpu")
    if storage.kind == "int8":
        return {f"{path}.weight": packed.weight.data, f"{path}.{INT8_SCALES}": packed.weight.SCB}
    state = packed.weight.quant_state.as_dict(packed=True)
    tensors = {f"{path}.weight": packed.weight.data}
    return tensors | {f"{path}.weight.{key}": value.clone() for key, value in state.items()}


def _fingerprint(shards: Shards, storage: Storage, compute: torch.dtype) -> str:
    """Of the files as they are now, and of what is made of them."""
    files = sorted({stored.path.resolve() for stored in shards.values()})
    lines = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return hashlib.sha256("\n".join([*lines, str(storage), str(compute)]).encode()).hexdigest()[:24]


def state_of(weight: str, shards: Shards | Loaded, device: torch.device) -> Any | None:
    """The `QuantState` of a packed weight without its scales; None: it is not packed.

    Args:
        weight: Name of the weight in the files.
        shards: Their tensors.
        device: Where it is dequantised.
    """
    prefix = f"{weight}."
    names = [name for name in shards if name.startswith(prefix)]
    if not any(".quant_state.bitsandbytes__" in name for name in names):
        return None
    quantized.require_bitsandbytes()
    from bitsandbytes.functional import QuantState

    parts = {}
    for name in names:
        parts[name] = torch.empty(shards[name].shape, dtype=DTYPES[shards[name].kind])
        shards.read(name, parts[name])
    state = QuantState.from_dict(parts, device=device)
    state.absmax = None
    return state
