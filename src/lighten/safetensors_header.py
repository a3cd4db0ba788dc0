"""What a safetensors file holds, read from its header alone; it needs no PyTorch.

Source: github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lighten.errors import UserError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LENGTH_BYTES = 8  # in front of the header, which say how long it is
LARGEST_HEADER = 100_000_000  # bytes, the bound of safetensors itself


def index_of(folder: Path) -> Path | None:
    """The index that says which files hold a model's weights.

    None: there is none, or one file holds all: transformers takes that first, and an index beside
    it is of a model that was saved there before.

    Args:
        folder: The model's.
    """
    index = folder / INDEX
    return index if index.is_file() and not (folder / WHOLE).is_file() else None


def write_index(folder: Path, files: Mapping[str, str], metadata: Mapping[str, Any]) -> None:
    """Write the index of a model that several files hold, as transformers does.

    Args:
        folder: The model's.
        files: The file of each weight.
        metadata: `total_size`, the bytes of all weights, and what else is known of them.
    """
    index = {"metadata": dict(metadata), "weight_map": dict(files)}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Stored:
    """Where a tensor is.

    Attributes:
        path: Its file.
        kind: Its format in the file, such as `BF16`.
        shape: Its shape.
        start: Its first byte in the file.
        bytes: How many it has.
    """

    path: Path
    kind: str
    shape: tuple[int, ...]
    start: int
    bytes: int


def read_header(path: Path) -> dict[str, Stored]:
    """Where each tensor of a file is, by its name.

    Raises:
        UserError: It cannot be read, or is not a whole safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            text = file.read(length) if length <= LARGEST_HEADER else b""
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    try:
        header: Any = json.loads(text)
        tensors = {
            name: _stored(path, entry, LENGTH_BYTES + length)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a whole safetensors file: its header is torn; fetch or copy it anew"
        ) from error
    # Memory that is mapped beyond a file's end cannot be read, and the process would be ended.
    for name, tensor in tensors.items():
        if tensor.start + tensor.bytes > size:
            raise UserError(
                f"{path} is not a whole safetensors file: it ends before {name}; fetch or copy it "
                "anew"
            )
    # The format allows nothing after the last tensor, and its own library reads no such file.
    end = max((t.start + t.bytes for t in tensors.values()), default=LENGTH_BYTES + length)
    if end < size:
        raise UserError(
            f"{path} is not a whole safetensors file: it goes on after its last tensor; fetch or "
            "copy it anew"
        )
    return tensors


def _stored(path: Path, entry: Any, data: int) -> Stored:
    """A header's entry, whose numbers begin behind the header at `data`."""
    start, end = entry["data_offsets"]
    shape = tuple(int(dimension) for dimension in entry["shape"])
    return Stored(path, str(entry["dtype"]), shape, data + int(start), int(end) - int(start))
