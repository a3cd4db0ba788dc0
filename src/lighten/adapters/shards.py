"""Many tensors as safetensors files of bounded size, none of which is ever in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lighten.adapters import dtensors

# What a file holds of a GPU is copied to main memory while it is written, and a file is mapped
# while it is verified.
SHARD_BYTES = 2**28
# Files of weights in checkpoints: trained.safetensors, or trained-00001-of-00002.safetensors, ...
STEM = "trained"


class Shard:
    """A file that is written from the tensors' own memory.

    Attributes:
        size: Bytes of the tensors.

    Args:
        tensors: By key.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.size = sum(value.numel() * value.element_size() for value in tensors.values())

    def write(self, path: Path) -> None:
        """Write the file.

        Raises:
            OSError: It cannot be written.
        """
        shard = {
            key: dtensors.full_tensor(value.detach()).cpu().contiguous()
            for key, value in self._tensors.items()
        }
        try:
            save_file(shard, path, metadata={"format": "pt"})
        except SafetensorError as error:  # its only word of what the system said
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error

    def take_part(self) -> None:
        """What the other ranks do while one writes the file: hand over the rows that they hold."""
        for value in self._tensors.values():
            dtensors.full_tensor(value.detach())


class Shards(Mapping[str, Shard]):
    """Files by name: `stem.safetensors`, or numbered ones.

    Args:
        tensors: By key.
        stem: Start of the names.
    """

    def __init__(self, tensors: Mapping[str, Tensor], stem: str) -> None:
        parts: list[dict[str, Tensor]] = [{}]
        room = SHARD_BYTES
        for key, value in tensors.items():
            size = value.numel() * value.element_size()
            if size > room and parts[-1]:
                parts.append({})
                room = SHARD_BYTES
            parts[-1][key] = value
            room -= size
        count = len(parts)
        self._parts = {
            f"{stem}.safetensors" if count == 1 else _numbered(stem, number, count): part
            for number, part in enumerate(parts, 1)
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, name: str) -> Shard:
        return Shard(self._parts[name])


def listing(folder: Path, stem: str) -> list[Path]:
    """The files that `Shards` of this stem left in a folder."""
    numbered = sorted(folder.glob(f"{stem}-[0-9]*-of-[0-9]*.safetensors"))
    single = folder / f"{stem}.safetensors"
    return [single] if single.is_file() else numbered


def load(folder: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of all files of a stem; they are mapped, so that what is not read costs nothing.

    Raises:
        SafetensorError: A file is broken.
    """
    tensors: dict[str, Tensor] = {}
    for path in listing(folder, stem):
        tensors |= load_file(path)
    return tensors


def _numbered(stem: str, number: int, count: int) -> str:
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors"
