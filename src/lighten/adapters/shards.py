"""Many tensors as safetensors files of bounded size, of which one at a time is in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

# A file is twice in memory while it is made.
SHARD_BYTES = 2**28


class Shards(Mapping[str, bytes]):
    """Files by name: `stem.safetensors`, or numbered ones; each is made when it is asked for.

    Args:
        tensors: By key. Anything live is copied when its file is made.
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

    @property
    def parts(self) -> list[dict[str, Tensor]]:
        """The tensors of each file."""
        return list(self._parts.values())

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, name: str) -> bytes:
        own = {key: value.detach().cpu().contiguous() for key, value in self._parts[name].items()}
        return to_bytes(own, metadata={"format": "pt"})


def listing(folder: Path, stem: str) -> list[Path]:
    """The files that `Shards` of this stem left in a folder."""
    numbered = sorted(folder.glob(f"{stem}-[0-9]*-of-[0-9]*.safetensors"))
    whole = folder / f"{stem}.safetensors"
    return [whole] if whole.is_file() else numbered


def load(folder: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of all files of a stem; they are mapped, so that what is not read costs nothing.

    Raises:
        SafetensorError: A file is broken.
    """
    found: dict[str, Tensor] = {}
    for path in listing(folder, stem):
        found |= load_file(path)
    return found


def _numbered(stem: str, number: int, count: int) -> str:
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors"
