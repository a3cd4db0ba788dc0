"""The header of a GGUF file: its settings and where each tensor lies, without the vocabulary.

`gguf.GGUFReader` makes arrays of every token and merge, which takes most of a minute for the 262
thousand words of Gemma 3; here lists of texts are stepped over and counted.
"""

from __future__ import annotations

import functools
import hashlib
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lighten.errors import UserError, missing_extra

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q",
            11: "<q", 12: "<d"}  # fmt: skip
_TEXT, _LIST = 8, 9
_VERSIONS = (2, 3)
# Longer lists of numbers are per token, and no setting of the model.
_LONGEST_LIST = 4096
_MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        shape: As PyTorch orders it, the fastest dimension last.
        ggml_type: ggml's number of its format.
        offset: Of its first byte in the file.
        nbytes: Its bytes.
    """

    shape: tuple[int, ...]
    ggml_type: int
    offset: int
    nbytes: int

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its weights.

    Attributes:
        path: The file.
        settings: Values by key; of a list of texts, or a long list, the length.
        tensors: By name.
        fingerprint: SHA-256 of the header with the file's size and time of change.
    """

    path: Path
    settings: dict[str, Any]
    tensors: dict[str, StoredTensor]
    fingerprint: str

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.settings["general.architecture"])

    def get(self, key: str, default: Any = None) -> Any:
        """A setting of the architecture, by its key without the architecture's name."""
        return self.settings.get(f"{self.architecture}.{key}", default)

    def dense(self, name: str) -> np.ndarray[Any, Any]:
        """A tensor's numbers, dequantised, in float32."""
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        raw = np.memmap(
            self.path, dtype=np.uint8, mode="r", offset=tensor.offset, shape=(tensor.nbytes,)
        )
        rows = raw.reshape(*tensor.shape[:-1], -1) if tensor.shape else raw
        plain = {0: np.float32, 1: np.float16}.get(tensor.ggml_type)
        if plain is not None:
            return np.asarray(rows.view(plain), dtype=np.float32)
        return np.asarray(dequantize(rows, _format(tensor.ggml_type)), dtype=np.float32)


def read_header(path: Path) -> Header:
    """Read a GGUF file's header.

    Raises:
        UserError: It is no GGUF file, is torn, or has a format that is not known.
    """
    try:
        facts = path.stat()
        return _read(path, facts.st_size, facts.st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


@functools.lru_cache(maxsize=4)
def _read(path: Path, size: int, changed: int) -> Header:
    """The header of the file as it was then: kept, because every verb asks for it several times."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data, size).header(changed)
    except (OSError, ValueError, struct.error, IndexError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} cannot be read as a GGUF file: it ends early or is torn"
        ) from error


class _Reader:
    """Steps through the header once."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.place = path, data, size, 0

    def header(self, changed: int) -> Header:
        if self.data[:4] != b"GGUF":
            raise UserError(f"{self.path} is not a GGUF file: it does not begin with GGUF")
        self.place = 4
        version = self._scalar("<I")
        if version not in _VERSIONS:
            raise UserError(
                f"{self.path} is GGUF version {version}, of which only 2 and 3 in little-endian "
                "order can be read; convert the model anew"
            )
        tensors, values = self._scalar("<Q"), self._scalar("<Q")
        settings: dict[str, Any] = {}
        for _ in range(values):
            key = self._text()
            settings[key] = self._value(self._scalar("<I"))
        if "general.architecture" not in settings:
            raise UserError(f"{self.path} does not say its architecture (general.architecture)")
        if int(settings.get("split.count", 1)) > 1:
            raise UserError(
                f"{self.path} is one of {settings['split.count']} parts; join them with "
                "llama-gguf-split --merge first"
            )
        table = [self._entry() for _ in range(tensors)]
        alignment = int(settings.get("general.alignment", 32))
        start = -(-self.place // alignment) * alignment
        placed = {name: self._placed(name, entry, start) for name, entry in table}
        digest = hashlib.sha256(self.data[: self.place])
        digest.update(f"{self.size} {changed}".encode())
        return Header(self.path, settings, placed, digest.hexdigest())

    def _scalar(self, layout: str) -> Any:
        (value,) = struct.unpack_from(layout, self.data, self.place)
        self.place += struct.calcsize(layout)
        return value

    def _text(self) -> str:
        length = self._scalar("<Q")
        end = self.place + length
        if end > self.size:
            raise IndexError(end)
        text = self.data[self.place : end].decode("utf-8", errors="replace")
        self.place = end
        return text

    def _value(self, value_type: int) -> Any:
        if value_type in _SCALARS:
            return self._scalar(_SCALARS[value_type])
        if value_type == _TEXT:
            return self._text()
        if value_type != _LIST:
            raise ValueError(value_type)
        item_type, count = self._scalar("<I"), self._scalar("<Q")
        if item_type == _TEXT:
            unpack, place, data = struct.Struct("<Q").unpack_from, self.place, self.data
            for _ in range(count):
                place += 8 + unpack(data, place)[0]
            self.place = place
            return count
        if item_type not in _SCALARS:
            raise ValueError(item_type)
        width = struct.calcsize(_SCALARS[item_type])
        place, self.place = self.place, self.place + width * count
        if self.place > self.size:
            raise IndexError(self.place)
        if count > _LONGEST_LIST:
            return count
        return list(struct.unpack_from(f"<{count}{_SCALARS[item_type][1]}", self.data, place))

    def _entry(self) -> tuple[str, tuple[tuple[int, ...], int, int]]:
        name, dimensions = self._text(), self._scalar("<I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(dimensions)
        shape = tuple(reversed([int(self._scalar("<Q")) for _ in range(dimensions)]))
        return name, (shape, int(self._scalar("<I")), int(self._scalar("<Q")))

    def _placed(
        self, name: str, entry: tuple[tuple[int, ...], int, int], start: int
    ) -> StoredTensor:
        shape, ggml_type, offset = entry
        block, size = _block(ggml_type, f"{self.path}: the tensor {name}")
        nbytes = math.prod(shape) // block * size
        if start + offset + nbytes > self.size:
            raise UserError(
                f"{self.path} is torn: it ends before the tensor {name}; fetch or copy it anew"
            )
        return StoredTensor(shape, ggml_type, start + offset, nbytes)


def _block(ggml_type: int, label: str) -> tuple[int, int]:
    """Numbers and bytes of a block of a format."""
    from gguf.constants import GGML_QUANT_SIZES

    try:
        block, size = GGML_QUANT_SIZES[_format(ggml_type)]
    except (ValueError, KeyError):
        raise UserError(
            f"{label} has a format (number {ggml_type}) that the installed gguf does not know; "
            "update it"
        ) from None
    return int(block), int(size)


def _format(ggml_type: int) -> Any:
    try:
        from gguf.constants import GGMLQuantizationType
    except ImportError:
        raise missing_extra("gguf", "gguf") from None
    return GGMLQuantizationType(ggml_type)
