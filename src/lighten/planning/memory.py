"""From the traced timeline to what a device must offer: the peak by part.

On a processor that is the resident set above what the process held before the model was loaded: the
timeline through the arena of tensors, with the code and tables that load beside the weights. On a
CUDA device it is what PyTorch's caching allocator reserves, and the driver's own context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lighten.cpu.allocator.arena import LEAST_BYTES
from lighten.models import gguf
from lighten.models.load import weight_files
from lighten.planning.allocators import Arena, CachingAllocator, Course, counted, replay
from lighten.planning.process_overhead import Context
from lighten.planning.result import PARTS, Memory, MemoryPart, Moment
from lighten.planning.storage_tracker import Block, Timeline

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
# How far predictions may be from measurements: within what was compared, where none of 31 trainings
# on a processor and of 39 on a GPU was further off (benchmarks/plan_accuracy.py), and beyond.
WITHIN, BEYOND = 0.10, 0.25

# What glibc's heap holds beside its blocks where tensors lie in it too: with this five trainings
# were predicted within 9 % (docs/lab-notes.md).
HEAP_SHARE = 0.25

ALIKE = 0.99  # shares of a peak that make none of two stages the larger
WEIGHTS, KEPT, LASTING = PARTS[:2], PARTS[:3], PARTS[:5]
PHASES = {"check": "forward"}
# What each worker has of its own, and when.
EACH = ("activations", "logits", "temporary", "gradients", "device context")
IN_WORKERS = ("forward", "loss", "backward")


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


def loading_of(source: str, path: Path, weights: int, converted: int) -> Loading:
    """What loading takes for a base from that place.

    Args:
        source: `packaged`, `folder`, `hub` or `gguf`.
        path: Its folder or file.
        weights: Bytes of the base once it is there.
        converted: Bytes of its files whose weights change their format on the way; of others the
            files are mapped and become the weights.
    """
    if source == "gguf" and (copy := gguf.converted_already(path)) is not None:
        path = copy
    elif source == "gguf":
        # It is converted to float32 first, before there is a model; the copy is then a folder's.
        dense, making = gguf.conversion_bytes(path)
        size = sum(file.stat().st_size for file in weight_files(path))
        return Loading(dense if converted else 0, max(0, making - weights), size // 20)
    tokenizer = path / "tokenizer.json"
    return Loading(converted, 0, tokenizer.stat().st_size if tokenizer.is_file() else 0)


def processor_memory(
    timeline: Timeline,
    loading: Loading,
    *,
    context: Context,
    verified: int = 0,
    workers: int = 1,
    sums: int = 0,
    arena: bool,
    margin: float,
) -> Memory:
    """The peak resident set.

    Args:
        timeline: Of the whole model.
        loading: What loading takes.
        context: What comes with training and is no tensor's.
        verified: Bytes of the files that are mapped and compared with the weights after saving.
        workers: Micro-batches that are computed side by side.
        sums: Bytes of gradients that workers sum beyond the timeline's.
        arena: Whether tensors' large blocks have an arena of their own.
        margin: Share of the peak that it may be off by.
    """
    tokenizer_bytes = int(TOKENIZER_FACTOR * loading.tokenizer)
    process_bytes = context.bytes + tokenizer_bytes
    phases = [timeline.runs[event.run].phase for event in timeline.events]
    forked = next((place for place, phase in enumerate(phases) if phase in IN_WORKERS), len(phases))
    # Free pages are given back before workers are opened.
    course = _course(timeline, arena, [forked] if workers > 1 else [])
    weights = {name: timeline.alive_at(forked - 1).get(name, 0) for name in WEIGHTS}
    loaded = {**weights, "temporary buffers": loading.copies}
    stages = [
        # What comes with the first products is not there yet.
        _Stage("loading", loaded, 0, tokenizer_bytes),
        _stage(timeline, course, process_bytes, 0, forked),
        _stage(timeline, course, process_bytes, forked).with_workers(
            _other_workers(timeline, workers - 1, context.worker_bytes, sums, arena)
        ),
    ]
    # Free pages are given back before a checkpoint is written, too.
    alive = timeline.alive_at(len(phases) - 1)
    mapped = {"temporary buffers": alive.get("temporary buffers", 0) + verified}
    stages.append(_Stage("saving", {**alive, **mapped}, 0, process_bytes + context.saving_bytes))
    # Pages that an earlier stage wrote are there in a later one, as its overhead: where both hold
    # as much, it is the earlier that needs them.
    enough = ALIKE * max(stage.bytes for stage in stages)
    most = min(
        (stage for stage in stages if stage.bytes >= enough), key=lambda stage: stage.overhead
    )
    parts = {**most.parts, "allocator overhead": most.overhead}
    parts["device context"] = parts.get("device context", 0) + most.context
    memory = _memory(timeline, parts, PHASES.get(most.when, most.when), margin, None)
    return replace(memory, mapped=max(0, stages[0].bytes + loading.files - memory.expected))


@dataclass(frozen=True)
class _Stage:
    """What a process holds at the peak of a stretch of its life, or what workers hold beside it.

    Attributes:
        when: The phase of the step.
        parts: Bytes of blocks by part.
        overhead: Of the heap.
        context: What is no block's.
    """

    when: str
    parts: Mapping[str, int]
    overhead: int
    context: int

    @property
    def bytes(self) -> int:
        """All of it."""
        return sum(self.parts.values()) + self.overhead + self.context

    def with_workers(self, workers: _Stage) -> _Stage:
        """The same, with what other processes hold meanwhile."""
        names = {*self.parts, *workers.parts}
        return _Stage(
            self.when,
            {name: self.parts.get(name, 0) + workers.parts.get(name, 0) for name in names},
            self.overhead + workers.overhead,
            self.context + workers.context,
        )


def _stage(
    timeline: Timeline, course: Course, context: int, start: int, end: int | None = None
) -> _Stage:
    held = course.most(start, end)
    if not held.peak:
        return _Stage("loading", {}, 0, 0)
    when = timeline.runs[timeline.events[held.at].run].phase
    return _Stage(when, timeline.alive_at(held.at), held.peak - held.allocated, context)


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
    course = replay(allocator, numbered(timeline))
    live = timeline.live()
    at = max(range(len(live)), key=live.__getitem__)
    parts = timeline.alive_at(at)
    parts["temporary buffers"] = parts.get("temporary buffers", 0) + workspace
    parts = {
        **parts,
        "allocator overhead": course.most().peak - sum(parts.values()),
        "device context": CUDA_CONTEXT_BYTES_90 if recent else CUDA_CONTEXT_BYTES,
    }
    when = timeline.runs[timeline.events[at].run].phase
    return _memory(timeline, parts, PHASES.get(when, when), margin, max(course.allocated))


def numbered(timeline: Timeline) -> list[tuple[int, bool, int]]:
    """The timeline as an allocator is fed it."""
    return [(id(event.block), event.born, event.block.bytes) for event in timeline.events]


def _course(timeline: Timeline, arena: bool, trimmed: Sequence[int] = ()) -> Course:
    """The timeline through a processor's memory.

    Args:
        timeline: Of a process.
        arena: Whether tensors' large blocks have an arena of their own.
        trimmed: Indices of events before which the arena's free pages are given back.
    """
    if not arena:
        return counted(numbered(timeline), HEAP_SHARE)

    def of(tensors: bool) -> list[tuple[int, bool, int]]:
        return [
            (
                id(event.block),
                event.born,
                event.block.bytes if _in_arena(event.block) == tensors else 0,
            )
            for event in timeline.events
        ]

    return replay(Arena(), of(True), trimmed) + counted(of(False))


def _in_arena(block: Block) -> bool:
    """Whether a block has its place in the arena: large, and a tensor's."""
    return block.bytes >= LEAST_BYTES and block.part != "device context"


def _other_workers(timeline: Timeline, count: int, context: int, sums: int, arena: bool) -> _Stage:
    """Processes with heaps of their own, whose micro-batches come and go as in the first worker's.

    What a worker's micro-batches leave, the sums of their gradients, lies in memory that it shares
    with the first, which reads it.
    """
    if count == 0:
        return _Stage("", {}, 0, 0)
    blocks = {
        id(event.block) for event in timeline.events
        if timeline.runs[event.block.run].phase in IN_WORKERS and event.block.part.startswith(EACH)
    }  # fmt: skip
    events = [event for event in timeline.events if id(event.block) in blocks]
    worker_timeline = Timeline(events, timeline.runs, timeline.work)
    most = _stage(worker_timeline, _course(worker_timeline, arena), context, 0)
    parts = {name: count * size for name, size in most.parts.items()}
    parts["gradients"] = parts.get("gradients", 0) + sums
    return _Stage(most.when, parts, count * most.overhead, count * context)


def lasting_bytes(timeline: Timeline) -> int:
    """The most that weights, adapters, gradients and optimiser state take together."""
    return _most_of(timeline, LASTING)


def fullest_moment(timeline: Timeline) -> Moment:
    """The moment of the steps at which most is alive beside weights, gradients and optimiser state.

    Of several the one with the most gradients: later micro-batches add to those that are there.
    """
    alive = dict.fromkeys(("gradients", "optimiser", "beside"), 0)
    most = Moment(0, 0, 0)
    for event in timeline.events:
        part = event.block.part
        if part in KEPT or part == "device context":
            continue
        name = part if part in alive else "beside"
        alive[name] += event.block.bytes if event.born else -event.block.bytes
        if timeline.runs[event.run].phase == "loading":
            continue
        if (alive["beside"], alive["gradients"]) > (most.beside, most.gradients):
            most = Moment(**alive)
    return most


def _most_of(timeline: Timeline, parts: Sequence[str]) -> int:
    alive = most = 0
    for event in timeline.events:
        if event.block.part in parts:
            alive += event.block.bytes if event.born else -event.block.bytes
            most = max(most, alive)
    return most


def _memory(
    timeline: Timeline, parts: Mapping[str, int], when: str, margin: float, allocated: int | None
) -> Memory:
    memory_parts = tuple(MemoryPart(name, max(0, parts.get(name, 0))) for name in PARTS)
    expected = sum(part.bytes for part in memory_parts)
    # What is there in any case is no matter of prediction.
    low = max(lasting_bytes(timeline), int(expected * (1 - margin)))
    return Memory(
        memory_parts, min(low, expected), expected, int(expected * (1 + margin)), when, allocated
    )
