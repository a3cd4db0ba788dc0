"""A safetensors file written tensor by tensor, some rows in memory at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lighten.safetensors_header import LENGTH_BYTES

# In the order in which safetensors puts tensors of several formats into a file, from the last.
KINDS = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32",
    torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A tensor of a file.

    Attributes:
        name: Its key.
        kind: Its format in the file, such as `BF16`.
        shape: Its shape.
        nbytes: Its bytes.
        blocks: Gives its bytes one after another.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int
    blocks: Callable[[], Iterable[bytes | memoryview]]


def entry(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, blocks: Callable[[], Iterable[Tensor]]
) -> Entry:
    """A tensor that comes as blocks of numbers and is rounded to a format once.

    Args:
        name: Its key.
        shape: Its shape.
        dtype: What it is rounded to.
        blocks: Gives its numbers, some rows at a time.
    """

    def data() -> Iterable[memoryview]:
        for block in blocks():
            rounded = block.to(dtype).contiguous().reshape(-1)
            yield rounded.view(torch.uint8).numpy().data

    return Entry(name, KINDS[dtype], shape, math.prod(shape) * dtype.itemsize, data)


def write(path: Path, entries: Sequence[Entry]) -> None:
    """Write a file.

    Raises:
        OSError: It cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for tensor in entries:
        header[tensor.name] = {
            "dtype": tensor.kind,
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.nbytes],
        }
        place += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little"))
        file.write(text)
        for tensor in entries:
            written = sum(file.write(block) for block in tensor.blocks())
            assert written == tensor.nbytes, (tensor.name, written, tensor.nbytes)
