"""A base whose layers are streamed, on fake tensors; and the time that reading it takes."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lighten.adapters.decoder import decoder_layers
from lighten.adapters.frozen import out_in_features
from lighten.errors import UserError
from lighten.models.load import weight_files
from lighten.parallel.streamed.build import LEFT_IN_FILE_BYTES
from lighten.parallel.streamed.feed import SLOTS, LayerPieces, Piece
from lighten.parallel.streamed.layers import (
    Absent,
    Replaced,
    StreamedLinear,
    StreamedLinear4bit,
    StreamedLinear8bit,
)
from lighten.parallel.streamed.shards import DTYPES, Shards
from lighten.planning.result import StepTime

RATE = "LIGHTEN_READ_RATE"  # bytes per second, where a plan shall not measure
MEASURED_BYTES = 256 * 2**20


class PlannedFeed:
    """As much of a `LayerFeed` as a trace asks for: slots, and which piece lies where.

    Args:
        layers: What is streamed of each layer.
    """

    def __init__(self, layers: list[LayerPieces]) -> None:
        self.layers = layers
        size = max(layer.bytes for layer in layers)
        self.slots = [torch.empty(size, dtype=torch.uint8) for _ in range(SLOTS)]

    @property
    def base_bytes(self) -> int:
        """Of all layers, in their slots' form."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def slot_bytes(self) -> int:
        """Of the slots together."""
        return sum(slot.nbytes for slot in self.slots)

    def get(self, layer: int, piece: Piece) -> Tensor:
        """A piece, without numbers."""
        return piece.of(self.slots[layer % SLOTS])


def stream(model: PreTrainedModel, compute: torch.dtype) -> PlannedFeed:
    """Put streamed layers in the place of the decoder layers' linear ones, dense or packed.

    Args:
        model: On fake tensors.
        compute: The format of the products.

    Raises:
        UserError: The architecture does not say which of its layers are alike, or stacks experts.
    """
    layers = decoder_layers(model)
    stacked = any(parameter.dim() == 3 for layer in layers for parameter in layer.parameters())
    if not layers or stacked:
        raise UserError(f"offload_base: the layers of {type(model).__name__} cannot be streamed")
    paths = {id(module): path for path, module in model.named_modules()}
    absent = []
    for place, layer in enumerate(layers):
        pieces, absent_weights = LayerPieces(), Absent(place)
        for module in list(layer.modules()):
            streamed = _streamed(module, compute, pieces, absent_weights)
            if streamed is not None:
                model.set_submodule(paths[id(module)], streamed)
        absent.append((pieces, absent_weights))
    feed = PlannedFeed([pieces for pieces, _ in absent])
    for _, absent_weights in absent:
        absent_weights.feed = feed
    return feed


def without_embeddings(model: PreTrainedModel) -> None:
    """Take the memory of embeddings, which lie in their files, but for what is the head too.

    Args:
        model: On fake tensors, of whose files a processor reads the format that it computes in.
    """
    used = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for module in model.modules():
        weight = module.weight if isinstance(module, nn.Embedding) else None
        if weight is not None and used[id(weight)] == 1 and weight.nbytes >= LEFT_IN_FILE_BYTES:
            hole = weight.new_empty((1, 1)).expand(weight.shape)
            module.weight = nn.Parameter(hole, requires_grad=False)


def _streamed(
    module: nn.Module, compute: torch.dtype, pieces: LayerPieces, absent: Absent
) -> nn.Module | None:
    packed = hasattr(module, "dense_weight")
    if not packed and type(module) not in (nn.Linear, Conv1D):
        return None
    layer: Any = module
    source = layer.source_cls if packed else type(module)
    was = Replaced(source, out_in_features(module), layer.bias, compute, layer.weight.device)
    if not packed:
        return StreamedLinear(was, absent, pieces.add("", compute, layer.weight.shape))
    if layer.weight.dtype == torch.int8:
        numbers = pieces.add("", torch.int8, layer.weight.shape)
        row_scales = pieces.add("", torch.float32, layer.weight.SCB.shape)
        return StreamedLinear8bit(was, absent, numbers, row_scales)
    state = layer.weight.quant_state
    weight_piece = pieces.add("", torch.uint8, layer.weight.shape)
    scales = pieces.add("", state.absmax.dtype, state.absmax.shape)
    state.absmax = None
    # The weight knows its layer: both would stay until Python looks for garbage.
    del layer.weight.module
    return StreamedLinear4bit(was, absent, weight_piece, scales, state)


def with_reading(
    time_of_step: StepTime, feed: Any, passes: int, folder: Path | None, *, where: str,
    stored: torch.dtype, is_here: bool, on_gpu: bool, link: float | None = None,
) -> tuple[StepTime, str]:  # fmt: skip
    """The time of a step that reads the base, and a sentence about it.

    Computing and reading go on at the same time: the step takes as long as the longer of them.

    Args:
        time_of_step: Of the computation.
        feed: What is streamed.
        passes: Micro-batches of the step; each reads the base up and down.
        folder: The files that are read; None: they are made of others, and are not there yet.
        where: `disk`, or `cpu` for main memory.
        stored: Format of dense weights in their files.
        is_here: The device is this machine's.
        on_gpu: It is a GPU.
        link: From main memory to it, in bytes per second, if known.
    """
    size = feed.base_bytes if where == "cpu" else file_bytes(feed, stored)
    # At each turn the layers in the slots are there already.
    share = max(0.0, 1.0 - SLOTS / len(feed.layers))
    read = int(2 * passes * share * size)
    rate, how = read_rate(
        folder, where=where, is_here=is_here, link=link,
        copied=on_gpu or _is_converted(feed, stored),
    )  # fmt: skip
    if rate is None:
        return replace(time_of_step, whole=False), (
            f"each step reads {read / 1e9:.1f} GB of layers, whose time is not in that of the "
            f"step ({how}; {RATE}=BYTES_PER_SECOND says the rate)"
        )
    seconds = read / rate
    sentence = f"each step reads {read / 1e9:.1f} GB of layers at {rate / 1e6:,.0f} MB/s ({how})"
    slower = replace(
        time_of_step,
        seconds=max(time_of_step.seconds, seconds),
        low=max(time_of_step.low, seconds / 1.5),
        high=max(time_of_step.high, seconds * 1.5),
        bytes_moved=time_of_step.bytes_moved + read,
    )
    return slower, sentence + (
        "" if seconds < time_of_step.seconds else ", which is what it waits for"
    )


def file_bytes(feed: Any, stored: torch.dtype) -> int:
    """Of the streamed layers as they lie in their files."""
    total = 0
    for layer in feed.layers:
        for piece in layer.pieces:
            size = stored.itemsize if _is_dense(piece) else piece.dtype.itemsize
            total += piece.bytes // piece.dtype.itemsize * size
    return total


def _is_dense(piece: Piece) -> bool:
    return piece.dtype.is_floating_point and len(piece.shape) == 2  # scales have one


def _is_converted(feed: Any, stored: torch.dtype) -> bool:
    return any(
        piece.dtype != stored for layer in feed.layers for piece in layer.pieces if _is_dense(piece)
    )


def read_rate(
    folder: Path | None, *, where: str, is_here: bool, link: float | None, copied: bool
) -> tuple[float | None, str]:
    """Bytes per second that layers are read at, and how that is known.

    Args:
        folder: As of `with_reading`.
        where: `disk`, or `cpu` for main memory.
        is_here: The device is this machine's.
        link: From main memory to it, in bytes per second, if known.
        copied: They are, into a buffer or a slot; otherwise they are looked at where they lie.

    Raises:
        UserError: `LIGHTEN_READ_RATE` is no number.
    """
    if text := os.environ.get(RATE):
        try:
            rate = float(text)
        except ValueError:
            rate = 0.0
        if not rate > 0:
            raise UserError(f"{RATE} is {text!r}; give bytes per second, such as 2e9")
        return rate, RATE
    if where == "cpu" and link is not None:
        return link, "its link to main memory, by its datasheet"
    if where == "cpu":
        return None, "copies from main memory to the GPU are not measured"
    if not is_here:
        return None, "the disk is another machine's"
    if folder is None or not weight_files(folder):
        return None, "the model's weights, as they are read, are not on this machine yet"
    return _measured(folder, copied)


def _measured(folder: Path, copied: bool) -> tuple[float | None, str]:
    with _disable_current_modes():
        shards = Shards.of(folder)
        readable = sorted(
            (name for name, shard in shards.items() if shard.kind in DTYPES),
            key=lambda name: -shards[name].bytes,
        )
        total, began = 0, time.perf_counter()
        for name in readable:
            shard = shards[name]
            if copied:
                shards.read(name, torch.empty(shard.shape, dtype=DTYPES[shard.kind]))
            else:
                shards.bring(name)
                shards.drop(name)
            total += shard.bytes
            if total >= MEASURED_BYTES:
                break
        seconds = time.perf_counter() - began
    if not total:
        return None, "its files hold nothing that could be read"
    return total / seconds, f"measured on {total / 1e6:,.0f} MB of its files"
