"""Activations wait for the backward pass outside the memory that is scarce.

On a GPU they go to pinned main memory, on a processor to a scratch file. What autograd saves is
caught by `saved_tensors_hooks`, as in torchtune's activation offloading; whole storages are moved,
once each, so that a tensor comes back with the same strides and alignment and every product after
it is bitwise the same.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

from lighten.errors import DiskFull
from lighten.machine.disk import require_on_disk
from lighten.machine.hardware import Choice

SMALLEST_BYTES = 256 * 1024  # what is smaller costs more to move than it frees


class Store(Protocol):
    """Where storages wait."""

    def put(self, flat: Tensor) -> Any:
        """Keep the bytes, given as one uint8 tensor, for as long as the answer lives."""

    def get(self, stored: Any) -> Tensor:
        """The bytes again, on their own device."""


class PinnedMemory:
    """Pinned main memory; copies run on a stream of their own, beside the computation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def put(self, flat: Tensor) -> Tensor:
        """Start the copy; the allocator keeps the source until it is done."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            pinned = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            pinned.copy_(flat, non_blocking=True)
        flat.record_stream(self.stream)
        return pinned

    def get(self, stored: Tensor) -> Tensor:
        """Copy back; the computation waits for the copy, the processor does not."""
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.stream):
            flat = stored.to(self.device, non_blocking=True)
        current.wait_stream(self.stream)
        flat.record_stream(current)
        return flat


@dataclass(eq=False)
class _Stretch:
    """A stretch of the scratch file, free again when this is."""

    start: int
    bytes: int


class ScratchFile:
    """An unnamed file: the system writes it out when memory is short, and forgets it at the end.

    Args:
        folder: Where the file is; on a disk, not in memory.

    Raises:
        UserError: The folder is in memory.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        require_on_disk(folder, "activation_offload", other="an --output_dir")
        # Unbuffered, so that no bytes wait in Python; closed and gone with this object.
        self.file: BinaryIO = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self.end, self.waiting = 0, 0

    def put(self, flat: Tensor) -> _Stretch:
        """Write the bytes behind the others.

        Raises:
            DiskFull: The disk is.
        """
        stretch = _Stretch(self.end, flat.numel())
        view = flat.numpy().data
        self.file.seek(stretch.start)
        try:
            while view:
                view = view[self.file.write(view) :]
        except OSError as error:
            raise DiskFull(
                f"activation_offload: cannot write {stretch.bytes} bytes: {error.strerror}; the "
                "checkpoints are intact, free some space"
            ) from error
        self.end += stretch.bytes
        self.waiting += 1
        weakref.finalize(stretch, self._release).atexit = False
        return stretch

    def get(self, stored: _Stretch) -> Tensor:
        """Read the bytes into fresh memory."""
        flat = torch.empty(stored.bytes, dtype=torch.uint8)
        view = flat.numpy().data
        self.file.seek(stored.start)
        while view:
            count = self.file.readinto(view)  # type: ignore[attr-defined]
            assert count, "the scratch file is shorter than what was written"
            view = view[count:]
        return flat

    def _release(self) -> None:
        self.waiting -= 1
        if not self.waiting:  # after each backward pass
            self.end = 0


@dataclass(eq=False)
class _Waiting:
    """A storage in its store; all tensors saved from it share this."""

    stored: Any


@dataclass(frozen=True)
class _Saved:
    """What a tensor was within its storage."""

    waiting: _Waiting
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Offload:
    """Hooks that move what autograd saves in a forward pass.

    Args:
        model: Its parameters and buffers stay where they are.
        store: Where the rest goes.
        smallest_bytes: Smaller storages stay too.

    Attributes:
        moved_bytes: Written to the store so far.
    """

    def __init__(
        self, model: PreTrainedModel, store: Store, smallest_bytes: int = SMALLEST_BYTES
    ) -> None:
        self.model, self.store, self.smallest_bytes = model, store, smallest_bytes
        self.moved_bytes = 0
        self._staying: set[int] = set()
        # A weak reference keeps a storage's address from being used again, not its memory.
        self._stored: dict[tuple[int, int], tuple[StorageWeakRef, weakref.ref[_Waiting]]] = {}
        self._last: tuple[weakref.ref[_Waiting], Tensor] | None = None

    def forward(self) -> contextlib.AbstractContextManager[Any]:
        """What is saved inside goes to the store and comes back in its backward pass."""
        self._stored.clear()
        self._last = None
        # Looked up anew: gathered or streamed weights lie elsewhere each time.
        self._staying = {
            tensor.untyped_storage()._cdata
            for tensor in (*self.model.parameters(), *self.model.buffers())
        }
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        plain = type(tensor) is Tensor and tensor.layout is torch.strided
        if not plain or tensor.is_conj() or tensor.is_neg():
            return tensor
        storage = tensor.untyped_storage()
        if storage._cdata in self._staying or storage.nbytes() < self.smallest_bytes:
            return tensor
        key = storage._cdata, tensor._version
        waiting = None
        if key in self._stored:
            waiting = self._stored[key][1]()
        if waiting is None:
            flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            waiting = _Waiting(self.store.put(flat))
            self.moved_bytes += storage.nbytes()
            self._stored[key] = StorageWeakRef(storage), weakref.ref(waiting)
        return _Saved(
            waiting,
            tensor.dtype,
            int(tensor.storage_offset()),
            tuple(tensor.shape),
            tensor.stride(),
        )

    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        # Layers that read one tensor (queries, keys, values) ask for it one after the other.
        if self._last is None or self._last[0]() is not saved.waiting:
            self._last = None
            self._last = weakref.ref(saved.waiting), self.store.get(saved.waiting.stored)
        flat = self._last[1]
        tensor = torch.empty(0, dtype=saved.dtype, device=flat.device)
        return tensor.set_(flat.untyped_storage(), saved.offset, saved.shape, saved.strides)


def offload_activations(
    model: PreTrainedModel, device: torch.device, folder: Path
) -> tuple[Offload, Choice]:
    """Move what the backbone's forward saves to pinned memory (GPU) or a scratch file (CPU).

    Args:
        model: The base; its backbone's forward is wrapped.
        device: Where it computes.
        folder: Where the scratch file of a processor goes.

    Raises:
        UserError: The folder is in memory.
    """
    store: Store
    if device.type == "cuda":
        store = PinnedMemory(device)
        choice = Choice("pinned main memory", "activation_offload")
    else:
        store = ScratchFile(folder)
        choice = Choice("scratch file", "activation_offload; the main memory is what is scarce")
    offload = Offload(model, store)
    wrap(model, offload)
    return offload, choice


def wrap(model: PreTrainedModel, offload: Offload) -> None:
    """Let the backbone run inside the hooks."""
    backbone = model.base_model
    forward = backbone.forward

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with offload.forward():
            return forward(*args, **kwargs)

    backbone.forward = run
