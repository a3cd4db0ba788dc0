"""A GGUF file written whole or not at all, one tensor in memory at a time."""

from __future__ import annotations

import errno
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lighten import whole_files
from lighten.errors import missing_extra

Array = np.ndarray[Any, Any]
_ALIGNMENT = 32


def require_gguf() -> Any:
    """The `gguf` package.

    Raises:
        MissingExtra: It is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise missing_extra("gguf", "gguf") from None
    return gguf


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that a file will hold.

    Attributes:
        name: In the file.
        shape: As PyTorch orders it.
        kind: ggml's number of its format.
    """

    name: str
    shape: tuple[int, ...]
    kind: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        block, size = require_gguf().GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // int(block) * int(size)

    @property
    def stored_bytes(self) -> int:
        """Bytes that it takes in the file."""
        return -(-self.nbytes // _ALIGNMENT) * _ALIGNMENT

    def packed_shape(self) -> tuple[int, ...]:
        """Shape of its bytes, row by row."""
        return (*self.shape[:-1], self.nbytes // max(math.prod(self.shape[:-1]), 1))


class GgufContent:
    """A GGUF file for `whole_files.write_bytes`.

    Args:
        architecture: llama.cpp's.
        settings: Writes the header's settings into a `gguf.GGUFWriter`.
        tensors: What the file holds, in its order.
        data: Every tensor's numbers in that order, already in their format.

    Attributes:
        size: Bytes of all tensors.
    """

    def __init__(
        self,
        architecture: str,
        settings: Callable[[Any], None],
        tensors: Sequence[TensorPlan],
        data: Callable[[], Iterable[Array]],
    ) -> None:
        self._architecture, self._settings = architecture, settings
        self._tensors, self._data = tensors, data
        self.size = sum(tensor.stored_bytes for tensor in tensors)

    def write(self, path: Path) -> None:
        """Write the file.

        Raises:
            OSError: It cannot be written.
        """
        writer = require_gguf().GGUFWriter(path, self._architecture)
        try:
            self._write_header(writer)
            for tensor, data in _paired(self._tensors, self._data()):
                assert data.nbytes == tensor.nbytes, tensor
                try:
                    writer.write_tensor_data(data)
                except OSError as error:
                    if error.errno is not None:
                        raise
                    # NumPy tells of a write that ended early by its bytes alone; of a plain file
                    # that is a full disk.
                    raise OSError(errno.ENOSPC, str(error)) from error
        finally:
            writer.close()

    def file_bytes(self) -> int:
        """Size of the file, known from its header alone."""
        with tempfile.TemporaryDirectory(prefix="lighten-header-") as scratch:
            path = Path(scratch) / "header.gguf"
            writer = require_gguf().GGUFWriter(path, self._architecture)
            try:
                self._write_header(writer)
            finally:
                writer.close()
            header = path.stat().st_size
        return -(-header // _ALIGNMENT) * _ALIGNMENT + self.size

    def _write_header(self, writer: Any) -> None:
        gguf = require_gguf()
        self._settings(writer)
        for tensor in self._tensors:
            kind = gguf.GGMLQuantizationType(tensor.kind)
            plain = {0: np.float32, 1: np.float16}.get(tensor.kind)
            shape = tensor.shape if plain else tensor.packed_shape()
            writer.add_tensor_info(
                tensor.name, shape, np.dtype(plain or np.uint8), tensor.nbytes, raw_dtype=kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()


def _paired(
    tensors: Sequence[TensorPlan], data: Iterable[Array]
) -> Iterator[tuple[TensorPlan, Array]]:
    values = iter(data)
    for tensor in tensors:
        yield tensor, next(values)


def write(target: Path, content: GgufContent) -> None:
    """Write the file, whole or not at all.

    Raises:
        UserError: The disk is full; an older file stays.
    """
    whole_files.write_bytes(target, content)
