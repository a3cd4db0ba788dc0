"""From the traced timeline to what a device must offer: the peak by part.

On a processor that is the resident set above what the process held before the model was loaded: the
timeline through glibc's heap, with the code and tables that load beside the weights. On a CUDA
device it is what PyTorch's caching allocator reserves, and the driver's own context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lighten.adapters.shards import Shards
from lighten.models.load import weight_files
from lighten.plan.allocators import CachingAllocator, Heap, replay
from lighten.plan.follow import OUTSIDE, Block, Event, Pass, Timeline
from lighten.plan.result import PARTS, Memory, MemoryPart

MIB = 2**20
# A tokenizer in memory, by its file: vocabulary and merges as hash tables. Reading one of 3.4 MB
# takes 49 MiB (tokenizers 0.23), of which all but 19 serve what a process needs besides.
TOKENIZER_FACTOR = 5.6
# The driver's context and kernels of a CUDA process with lazy loading: 426 MiB on an RTX 6000 Ada
# with PyTorch 2.10 (github.com/unslothai/unsloth-zoo/pull/1053), "around 400MB" in general
# (github.com/pytorch/pytorch/issues/109888).
CUDA_CONTEXT_BYTES = 426 * MIB
# From compute capability 9.0 on: an H100 with PyTorch 2.11 after a whole suite
# (benchmarks/results/gpu_suite-h100.json).
CUDA_CONTEXT_BYTES_90 = 785 * MIB
# cuBLAS's workspace, taken from the caching allocator at the first product: `:4096:2:16:8`, and
# 32 MiB from compute capability 9.0 on (aten/src/ATen/cuda/CublasHandlePool.cpp).
# Each thread has its own: the forward pass's and autograd's.
CUDA_THREADS = 2
CUBLAS_BYTES, CUBLAS_BYTES_90 = 2 * 4096 * 1024 + 8 * 16 * 1024, 32 * MIB
# How far predictions may be from measurements: within what was compared, and beyond
# (benchmarks/plan_accuracy.py: 27 % in one of 31).
WITHIN, BEYOND = 0.30, 0.40

LASTING = PARTS[:5]
PHASES = {"check": "forward"}
# What each lane has of its own, and when; and what its process takes beside: libraries' buffers,
# and pages of its parent's that it writes to (benchmarks/plan_accuracy.py).
EACH = ("activations", "logits", "temporary", "gradients")
IN_LANES = ("forward", "loss", "backward")
LANE_BYTES = 80 * MIB


@dataclass(frozen=True)
class Loading:
    """What loading a base takes.

    Attributes:
        files: Bytes of weight files that are mapped and read meanwhile.
        copies: Bytes of further copies that are alive meanwhile.
        tokenizer: Bytes of the tokenizer's file.
    """

    files: int = 0
    copies: int = 0
    tokenizer: int = 0


def loading_of(source: str, path: Path, weights: int, largest: int, converts: bool) -> Loading:
    """What loading takes for a base from that place.

    Args:
        source: `packaged`, `folder`, `hub` or `gguf`.
        path: Its folder or file.
        weights: Bytes of the base once it is there.
        largest: Bytes of its largest weight.
        converts: Whether the weights change their format on the way; else files are mapped and
            become the weights.
    """
    files = weight_files(path)
    size = sum(file.stat().st_size for file in files)
    tokenizer = path / "tokenizer.json"
    known = tokenizer.stat().st_size if tokenizer.is_file() else 0
    if source == "gguf":
        # Its weights in float32, the model read into, and the plain model they are copied to.
        return Loading(size, weights + largest, size // 20)
    if not files:
        return Loading(weights if converts else 0, 0, known)
    return Loading(size if converts else 0, largest if converts else 0, known)


def saving_events(timeline: Timeline, shapes: Mapping[str, Sequence[int]], states: int) -> int:
    """Add the last checkpoint to the timeline: its files are made in memory, one at a time.

    Args:
        timeline: Of the whole model, after its steps; it grows.
        shapes: Of what learns, by key.
        states: Tensors of the optimiser's state for each.

    Returns:
        Bytes of the weights' files, which are mapped and read again to be verified.
    """
    run = len(timeline.runs)
    timeline.runs.append(Pass("saving"))
    empty = {key: torch.empty(tuple(shape), device="meta") for key, shape in shapes.items()}
    state = {f"{key}:{i}": value for key, value in empty.items() for i in range(states)}
    before: Block | None = None
    for whole in (state, empty):
        for part in Shards(whole, "file").parts:
            sizes = [tensor.numel() * 4 for tensor in part.values()]
            made = Block(sum(sizes), "temporary buffers", run=run)
            # safetensors' writer fills a vector, of which Python's bytes are a copy.
            vector = Block(made.bytes, "temporary buffers", run=run)
            born = [vector, made]
            gone = [vector] if before is None else [vector, before]
            timeline.events += [Event(block, True, run, OUTSIDE) for block in born]
            timeline.events += [Event(block, False, run, OUTSIDE) for block in gone]
            before = made
    return sum(tensor.numel() * 4 for tensor in empty.values())


def processor_memory(
    timeline: Timeline,
    loading: Loading,
    *,
    context: int,
    verified: int = 0,
    lanes: int = 1,
    margin: float,
) -> Memory:
    """The peak resident set.

    Args:
        timeline: Of the whole model.
        loading: What loading takes.
        context: Bytes that come with training and are no tensor's, a tokenizer's aside.
        verified: Bytes of files that are mapped at the very end, as `saving_events` gave them.
        lanes: Micro-batches that are computed side by side.
        margin: Share of the peak that it may be off by.
    """
    context += int(TOKENIZER_FACTOR * loading.tokenizer)
    saving = next(
        (place for place, event in enumerate(timeline.events)
         if timeline.runs[event.run].phase == "saving"), None,
    )  # fmt: skip
    # Free pages are given back before a checkpoint is made.
    heap = Heap()
    held, course = replay(heap, numbered(timeline), saving)
    parts = timeline.alive_at(held.at)
    overhead = held.peak - held.allocated
    if verified and course[-1] + verified > held.peak:
        held = replace(held, peak=course[-1] + verified, at=len(course) - 1)
        parts = timeline.alive_at(held.at)
        overhead = course[-1] - heap.allocated
        parts["temporary buffers"] = parts.get("temporary buffers", 0) + verified
    others = _other_lanes(timeline, lanes - 1)
    parts = {name: parts.get(name, 0) + others.parts.get(name, 0)
             for name in {*parts, *others.parts}}  # fmt: skip
    overhead += others.overhead
    step = sum(parts.values()) + overhead + context + others.context
    weights = {name: parts.get(name, 0) for name in ("base weights", "quantisation constants")}
    load = sum(weights.values()) + loading.files + loading.copies + context
    when = timeline.runs[timeline.events[held.at].run].phase
    if load > step:
        parts, overhead, when = (
            {**weights, "temporary buffers": loading.files + loading.copies},
            0,
            "loading",
        )
    else:
        context += others.context
    parts = {**parts, "allocator overhead": overhead, "device context": context}
    return _memory(timeline, parts, PHASES.get(when, when), margin, None)


def cuda_memory(timeline: Timeline, *, capability: tuple[int, int] | None, margin: float) -> Memory:
    """What a CUDA process takes of its device.

    Args:
        timeline: Of the whole model.
        capability: Compute capability of the device, if known.
        margin: Share of the peak that it may be off by.
    """
    allocator = CachingAllocator()
    recent = (capability or (0, 0)) >= (9, 0)
    workspace = CUBLAS_BYTES_90 if recent else CUBLAS_BYTES
    for _ in range(CUDA_THREADS):
        allocator.take(workspace)
    workspace *= CUDA_THREADS
    held, _ = replay(allocator, numbered(timeline))
    live = timeline.live()
    at = max(range(len(live)), key=live.__getitem__)
    parts = timeline.alive_at(at)
    parts["temporary buffers"] = parts.get("temporary buffers", 0) + workspace
    parts = {
        **parts,
        "allocator overhead": held.peak - sum(parts.values()),
        "device context": CUDA_CONTEXT_BYTES_90 if recent else CUDA_CONTEXT_BYTES,
    }
    when = timeline.runs[timeline.events[at].run].phase
    return _memory(timeline, parts, PHASES.get(when, when), margin, held.most_allocated)


def numbered(timeline: Timeline) -> list[tuple[int, bool, int]]:
    """The timeline as an allocator is fed it."""
    return [(id(event.block), event.born, event.block.bytes) for event in timeline.events]


@dataclass(frozen=True)
class _Others:
    """What all lanes but the first hold by themselves.

    Attributes:
        parts: Bytes of blocks by part.
        overhead: Of their heaps.
        context: What a process has that computes.
    """

    parts: dict[str, int]
    overhead: int = 0
    context: int = 0


def _other_lanes(timeline: Timeline, count: int) -> _Others:
    """Processes with heaps of their own, in which micro-batches come and go as in the first lane's.

    What a lane's micro-batches leave, the sums of their gradients, lies in memory that it shares
    with the first, which reads it.
    """
    if count == 0:
        return _Others({})
    own = {
        id(event.block) for event in timeline.events
        if timeline.runs[event.block.run].phase in IN_LANES and event.block.part.startswith(EACH)
    }  # fmt: skip
    events = [event for event in timeline.events if id(event.block) in own]
    alone = Timeline(events, timeline.runs, timeline.work)
    held, _ = replay(Heap(), numbered(alone))
    parts = alone.alive_at(held.at)
    found = {name: count * size for name, size in parts.items()}
    found["gradients"] = found.get("gradients", 0) + count * _most_of(timeline, ("gradients",))
    return _Others(found, count * (held.peak - held.allocated), count * LANE_BYTES)


def lasting_bytes(timeline: Timeline) -> int:
    """The most that weights, adapters, gradients and optimiser state take together."""
    return _most_of(timeline, LASTING)


def _most_of(timeline: Timeline, parts: Sequence[str]) -> int:
    now = most = 0
    for event in timeline.events:
        if event.block.part in parts:
            now += event.block.bytes if event.born else -event.block.bytes
            most = max(most, now)
    return most


def _memory(
    timeline: Timeline, parts: Mapping[str, int], when: str, margin: float, allocated: int | None
) -> Memory:
    made = tuple(MemoryPart(name, max(0, parts.get(name, 0))) for name in PARTS)
    expected = sum(part.bytes for part in made)
    # What is there in any case is no matter of prediction.
    low = max(lasting_bytes(timeline), int(expected * (1 - margin)))
    return Memory(made, min(low, expected), expected, int(expected * (1 + margin)), when, allocated)
