"""What a plan says: the peak memory by part, the time of a step, and whether it fits."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

# The layers of the stacked bar, bottom to top.
PARTS = (
    "base weights", "quantisation constants", "adapters", "gradients", "optimiser",
    "activations: attention", "activations: linear", "activations: norms", "activations: other",
    "logits and loss", "temporary buffers", "allocator overhead", "device context", "encoded rows",
)  # fmt: skip

# Tokens of a micro-batch that is planned: tracing a larger one would take minutes.
MOST_TOKENS = 2**23


@dataclass(frozen=True)
class MemoryPart:
    """One layer of the stacked bar at the moment of the peak.

    Attributes:
        name: One of `PARTS`, in that order.
        bytes: What it holds.
    """

    name: str
    bytes: int


@dataclass(frozen=True)
class Memory:
    """The peak of one device.

    Attributes:
        parts: The peak by part; they sum to `expected`.
        low: Bytes that the peak surely reaches.
        expected: Bytes predicted.
        high: Bytes that the peak surely stays below, in the tested domain.
        when: `forward`, `backward`, `loss`, `optimiser step` or `loading`.
        allocated: CUDA's predicted `max_memory_allocated`; `expected` is then what the process
            reserves, with the device's context. None on a CPU.
        mapped: Bytes by which a process can be larger while it loads, for the pages of weight files
            that the system takes back where memory is short: a measured peak has them.
    """

    parts: tuple[MemoryPart, ...]
    low: int
    expected: int
    high: int
    when: str
    allocated: int | None
    mapped: int = 0


@dataclass(frozen=True)
class StepTime:
    """The time of one optimiser step.

    Attributes:
        seconds: Predicted.
        low: Seconds it surely takes.
        high: Seconds it surely stays below, in the tested domain.
        flops: Floating-point operations.
        bytes_moved: Bytes read and written.
        rates: Where the machine's rates come from.
        whole: False: what it takes to read a streamed base or a file, or to run the optimiser on
            the processor beside a GPU, is not known, and not in it.
    """

    seconds: float
    low: float
    high: float
    flops: float
    bytes_moved: float
    rates: str
    whole: bool = True


@dataclass(frozen=True)
class Shape:
    """The planned micro-batch.

    Attributes:
        rows: Examples side by side.
        tokens_per_row: The longest of them, in tokens.
        micro_batches: Micro-batches of an optimiser step.
        workers: Micro-batches computed at the same time.
    """

    rows: int
    tokens_per_row: int
    micro_batches: int
    workers: int = 1


@dataclass(frozen=True)
class States:
    """Bytes of a model's states on one device that holds all of them.

    Attributes:
        frozen: Weights that do not learn.
        trained: Weights that learn, as the forward pass reads them.
        gradients: Their gradients.
        optimiser: Moments, and float32 copies of the weights where there are any.
        packed: Of the frozen ones those of decoder layers in few bits, which alone are spread of a
            base that has any.
        adapters: Of those that learn what stands beside the base: it stays whole on every rank.
        layers: Of the base's those of decoder layers, learning or not; None: all of them.
        paged: Optimiser state in main memory, which a paged optimiser brings to a GPU that has
            room; no part of `optimiser`.
    """

    frozen: float
    trained: float
    gradients: float
    optimiser: float
    packed: float = 0.0
    adapters: float = 0.0
    layers: float | None = None
    paged: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.frozen + self.trained + self.gradients + self.optimiser

    @property
    def spread(self) -> tuple[float, float]:
        """What ZeRO 3 and FSDP spread of the weights: frozen ones, and those that learn.

        Decoder layers, and all else of the base that learns (embedding, head, norms).
        """
        learns = self.trained - self.adapters
        if self.packed:
            return self.packed, 0.0
        return (self.frozen if self.layers is None else max(0.0, self.layers - learns)), learns

    @property
    def outside(self) -> float:
        """Of the base's weights that learn those outside of decoder layers: gathered together."""
        learns = self.trained - self.adapters
        return 0.0 if self.layers is None else max(0.0, learns - self.layers)


@dataclass(frozen=True)
class Moment:
    """What is alive at one moment of a step on one device, weights left out.

    Attributes:
        gradients: Bytes of gradients, of those that are there by then.
        optimiser: Bytes of the optimiser's state.
        beside: Bytes of all that is no state: activations, logits, buffers.
    """

    gradients: int
    optimiser: int
    beside: int


@dataclass(frozen=True)
class Change:
    """One way to need less memory, planned like the rest.

    Attributes:
        what: In words.
        settings: The recipe's settings that make it.
        saves_bytes: Of the expected peak; negative where it needs more.
        slowdown: Seconds per step over those of the plan, 1 being equal; None where time is not
            known.
        fits: Whether it would fit.
        differing: Of the settings, those that the recipe does not have already: what to write.
    """

    what: str
    settings: dict[str, Any]
    saves_bytes: int
    slowdown: float | None
    fits: bool | None
    differing: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataCost:
    """What the data of a run take of main memory and disk.

    Attributes:
        rows: Of training and held-out data.
        tokens: Theirs.
        encoding_bytes: The peak while they are encoded, over all processes, above what the process
            held before; 0 where they are in the cache already.
        resident_bytes: Afterwards. They are mapped from disk, where they take the same.
    """

    rows: int
    tokens: int
    encoding_bytes: int
    resident_bytes: int


@dataclass(frozen=True)
class Plan:
    """The prediction for a recipe on a device.

    Attributes:
        model: The base's name.
        device: What it is planned for.
        method: `lora`, `qlora`, `dora`, `qdora`, `full`, `last_layers`, or the `peft_type` of the
            recipe in small letters.
        shape: The micro-batch that decides the peak.
        memory: The peak of the device.
        time: The time of a step; None where no rate of the device is known.
        capacity: Bytes that the device offers; None where that is not known.
        host_bytes: Main memory needed.
        disk_bytes: Space needed on disk.
        download_bytes: What would be downloaded; None where that is not known.
        choices: What was chosen and why.
        outside: In what way the question is outside the tested domain.
        step_tokens: Real tokens of the planned step, which is the largest of the run.
        steps: Optimiser steps of the run; None where the data is not known.
        run_seconds: Of all steps, each with its own tokens; None where time or data is not known.
        notes: What a reader should know: assumptions, and corrections by runs on this machine.
        changes: What would need less memory, the cheapest first; empty where none was looked for.
        traced: `expected` bytes and `seconds` before runs on this machine corrected them; None
            where nothing did.
        states: Weights, gradients and optimiser state as a whole, whatever of them is alive at the
            peak: what many devices share out. None for a plan that was not traced.
        fullest: The moment of a step at which most is alive beside the states.
        data: What the data take; None where they were not read.
    """

    model: str
    device: str
    method: str
    shape: Shape
    memory: Memory
    time: StepTime | None
    capacity: int | None
    host_bytes: int
    disk_bytes: int
    download_bytes: int | None
    choices: dict[str, str]
    outside: tuple[str, ...]
    step_tokens: int | None = None
    steps: int | None = None
    run_seconds: float | None = None
    notes: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    traced: dict[str, float] | None = None
    states: States | None = None
    fullest: Moment | None = None
    data: DataCost | None = None

    def fits(self) -> bool | None:
        """Whether the device is large enough; None where the prediction cannot tell."""
        if self.capacity is None or self.memory.low <= self.capacity < self.memory.high:
            return None
        return self.memory.high <= self.capacity

    def __repr__(self) -> str:
        fits = {True: "fits", False: "does not fit", None: "cannot tell"}[self.fits()]
        room = "" if self.capacity is None else f" of {self.capacity / 2**30:.2f}"
        return (
            f"Plan({self.model}, {self.method}, on {self.device}: "
            f"{self.memory.expected / 2**30:.2f}{room} GiB, {fits})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, with `fits` among them."""
        return {**asdict(self), "fits": self.fits()}

    def _repr_html_(self) -> str:
        """The stacked bar, for notebooks."""
        from lighten.reporting.planned import figure

        return figure(self.to_dict(), styled=True)
