"""Many tensors as safetensors files of bounded size, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from lighten import safetensors_stream
from lighten.adapters import dtensors

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
        safetensors_stream.write(
            path,
            [safetensors_stream.entry(key, tuple(value.shape), value.dtype, _blocks(value))
             for key, value in self._tensors.items()],
        )  # fmt: skip

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

    Each is mapped by itself: what was read of it stays in memory for as long as it is there, and no
    longer for the sake of others in its file.

    Raises:
        SafetensorError: A file is broken.
    """
    tensors: dict[str, Tensor] = {}
    for path in listing(folder, stem):
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
        for key in keys:
            with safe_open(path, "pt") as file:
                tensors[key] = file.get_tensor(key)
    return tensors


def _blocks(value: Tensor) -> Callable[[], list[Tensor]]:
    return lambda: [dtensors.full_tensor(value.detach()).cpu()]


def _numbered(stem: str, number: int, count: int) -> str:
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors"
