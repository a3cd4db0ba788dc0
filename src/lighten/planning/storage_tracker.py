"""Follow every storage from its birth to its death while the engine's own code runs.

`StorageTracker` is a dispatch mode: it sees each operation below autograd, on real tensors and on
fake ones alike, notes the storages that are new, and hears of their end through weak references.
What it keeps is a timeline: births and deaths in order, each with the phase of the step and the
decoder layer it happened in, and the work of each operation beside.

A fake tensor has no values: where the engine asks for one (a loss for the log, a norm for the
check) it is told 1.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lighten.engine.adapter_optimizer import AdapterOptimizer
from lighten.engine.scaling import LossScaler
from lighten.planning.fake_results import FakeResults
from lighten.planning.operation_cost import LINEAR_OF_ONEDNN, Work, inside, work_of

# Whose frame is above what autograd does by itself, and what PyTorch puts between.
ENGINE, WRAPPERS = "_engine_run_backward", ("_dynamo/eval_frame.py", "torch/_compile.py")
DEVICE = torch.ops.prim.device.default  # what a fake tensor is asked for its device by
OUTSIDE = -1  # the layer of what belongs to none
UNTIMED = ("loading", "check")  # phases that are no part of a step
ATTENTION = re.compile(r"attn|attention")
LINEAR = re.compile(r"linear|conv1d|mlp|experts|dense|proj")

# oneDNN makes a kernel for each shape of a product in these formats and keeps it. Its descriptors
# lie in the heap among the activations of the moment, and no later block closes the gaps between
# them: 0.53 to 0.62 MiB each, whatever the shape (torch 2.13 on a Xeon with AMX).
PRODUCTS = (
    torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default,
)  # fmt: skip
FORMATS_OF_ONEDNN = (torch.bfloat16, torch.float16)
BLOCKS_OF_KERNEL, BLOCK_OF_KERNEL_BYTES = 2, 280 * 2**10
KERNEL_BYTES = BLOCKS_OF_KERNEL * BLOCK_OF_KERNEL_BYTES


@dataclass(eq=False)
class Block:
    """One storage.

    Attributes:
        bytes: What was asked for.
        part: A name of `PARTS`; found out later for gradients, optimiser state and temporaries.
        layer: The unit of decoder layers it belongs to, or `OUTSIDE`.
        run: Number of the pass it was born in: a forward, a backward, an optimiser step.
        ordinal: Its place among those of its run and layer.
    """

    bytes: int
    part: str
    layer: int = OUTSIDE
    run: int = 0
    ordinal: int = 0


class Event(NamedTuple):
    """A birth or a death.

    Attributes:
        block: Of which storage.
        born: Whether it is a birth.
        run: Number of the pass in which it happens.
        place: The unit of decoder layers that runs at that moment, or `OUTSIDE`.
    """

    block: Block
    born: bool
    run: int
    place: int

    @property
    def layer(self) -> int:
        """The unit of decoder layers it counts to.

        Outside of layers (the optimiser, the end of a backward pass) that is the block's own.
        """
        return self.place if self.place != OUTSIDE else self.block.layer


@dataclass(frozen=True)
class Pass:
    """A stretch of a step.

    Attributes:
        phase: `loading`, `check`, `forward`, `loss`, `backward` or `optimiser step`.
        micro_batch: Which one, from 0; of an optimiser step the last.
        step: Which optimiser step, from 0.
    """

    phase: str
    micro_batch: int = 0
    step: int = 0


@dataclass
class Timeline:
    """What was followed.

    Attributes:
        events: Births and deaths in order.
        runs: The passes that events are numbered by.
        work: Every operation of the steps with its run and layer.
    """

    events: list[Event] = field(default_factory=list)
    runs: list[Pass] = field(default_factory=list)
    work: list[tuple[int, int, Work]] = field(default_factory=list)

    def live(self) -> list[int]:
        """Bytes alive after each event."""
        sizes, alive = [], 0
        for event in self.events:
            alive += event.block.bytes if event.born else -event.block.bytes
            sizes.append(alive)
        return sizes

    def forget_what_went_before(self, first_run: int) -> None:
        """Leave out what was born and died before a pass.

        A fake base is made whole and then quantised; a real one weight by weight.
        """
        dead_blocks = {
            event.block for event in self.events if not event.born and event.run < first_run
        }
        self.events = [event for event in self.events if event.block not in dead_blocks]

    def alive_at(self, place: int) -> dict[str, int]:
        """Bytes by part after the event of that index."""
        parts: dict[str, int] = {}
        for event in self.events[: place + 1]:
            size = event.block.bytes if event.born else -event.block.bytes
            parts[event.block.part] = parts.get(event.block.part, 0) + size
        return parts


class StorageTracker(TorchDispatchMode):
    """Records a `Timeline` of whatever runs inside.

    Attributes:
        timeline: So far.

    Args:
        kernels: Whether products make kernels in the same memory, as on a processor.
    """

    def __init__(self, *, kernels: bool = False) -> None:
        super().__init__()
        self.kernels = kernels
        self._results = FakeResults()
        # The first of two gradients that autograd has just added, and their sum.
        self._summed: tuple[Block | None, Block | None] = (None, None)
        self._products: set[tuple[Any, ...]] = set()
        self.timeline = Timeline(runs=[Pass("loading")])
        self._storages: dict[int, tuple[weakref.ref[Any], Block]] = {}
        self._names: dict[int, str] = {}
        self._units: dict[int, int] = {}
        self._stack: list[nn.Module] = []
        self._layer = OUTSIDE
        self._inside = 0  # layers that run at the moment
        self._counts: dict[tuple[int, int], int] = {}
        self._open = True

    # What happens

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and note what came of it."""
        if func is DEVICE and isinstance(args[0], FakeTensor):
            return args[0].device  # every second call: nothing is computed, nothing to note
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _fake_item(args[0].dtype)
        out = self._results.run(func, args, kwargs)
        self._note(func, args, kwargs, out)
        if func is torch.ops.aten.add.Tensor and _called_by_autograd():
            self._summed = (self._block_of(args[0]), self._block_of(out))
        return out

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        tensors = [*inside(out, Tensor)]
        run = len(self.timeline.runs) - 1
        if self.timeline.runs[-1].phase not in UNTIMED:
            work = work_of(func, args, kwargs, tensors)
            if work is not None:
                self.timeline.work.append((run, self._layer, work))
        if self.kernels and self._makes_kernel(func, args):
            for _ in range(BLOCKS_OF_KERNEL):
                self._born(BLOCK_OF_KERNEL_BYTES, "device context", OUTSIDE)
        fresh = [x for x in tensors if id(x.untyped_storage()) not in self._storages]
        inputs = [*inside(args, Tensor)] if fresh else []
        for place, tensor in enumerate(fresh):
            # A result of a list (one norm per gradient) belongs where its own input does.
            sources = inputs[place : place + 1] if len(fresh) > 1 else inputs[:1]
            self._birth(tensor, sources)

    def _makes_kernel(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Whether this is the first product of its shapes in a format that oneDNN multiplies."""
        if func not in PRODUCTS and func is not LINEAR_OF_ONEDNN:
            return False
        tensors = [x for x in args if isinstance(x, Tensor)]
        key = (func, *((x.shape, x.stride(), x.dtype) for x in tensors))
        multiplied = func is LINEAR_OF_ONEDNN or tensors[0].dtype in FORMATS_OF_ONEDNN
        if not multiplied or key in self._products:
            return False
        self._products.add(key)
        return True

    def _birth(self, tensor: Tensor, sources: list[Tensor]) -> Block:
        storage = tensor.untyped_storage()
        if (record := self._storages.get(id(storage))) is not None:
            return record[1]
        layer = self._layer
        if layer == OUTSIDE and sources:
            source = self._storages.get(id(sources[0].untyped_storage()))
            layer = source[1].layer if source is not None else OUTSIDE
        block = self._born(storage.nbytes(), self._part(), layer)
        key = id(storage)

        def storage_died(_: Any) -> None:
            _, freed = self._storages.pop(key, (None, block))
            if self._open and not self._taken_over(freed):
                self._event(freed, False)

        self._storages[key] = (weakref.ref(storage, storage_died), block)
        return block

    def _block_of(self, tensor: Tensor) -> Block | None:
        record = self._storages.get(id(tensor.untyped_storage()))
        return None if record is None else record[1]

    def _taken_over(self, freed: Block) -> bool:
        """Whether the sum that was just made lies where this block was.

        Autograd adds two gradients of one tensor in place where nobody else has the first, but not
        where they are fake (`can_accumulate_inplace` in torch/csrc/autograd/input_buffer.cpp).
        """
        (first, total), self._summed = self._summed, (None, None)
        events = self.timeline.events
        if first is not freed or total is None or total.bytes != freed.bytes:
            return False
        if not (events and events[-1].born and events[-1].block is total):
            return False
        key = next(key for key, (_, block) in self._storages.items() if block is total)
        self._storages[key] = (self._storages[key][0], freed)
        events.pop()
        return True

    def _born(self, size: int, part: str, layer: int) -> Block:
        run = len(self.timeline.runs) - 1
        block = Block(size, part, layer, run, self._next(run, layer))
        self._event(block, True)
        return block

    def _next(self, run: int, layer: int) -> int:
        ordinal = self._counts.get((run, layer), 0)
        self._counts[run, layer] = ordinal + 1
        return ordinal

    def _event(self, block: Block, born: bool) -> None:
        run = len(self.timeline.runs) - 1
        self.timeline.events.append(Event(block, born, run, self._layer))

    def _part(self) -> str:
        phase = self.timeline.runs[-1].phase
        if phase == "loss" or (phase == "check" and not self._stack):
            return "logits and loss"
        if not self._stack:
            return "temporary buffers"
        module = self._stack[-1]
        name = self._names.get(id(module), "").lower()
        kind, last = type(module).__name__.lower(), name.rpartition(".")[2]
        if "norm" in kind or "norm" in last or last.startswith("ln_"):
            return "activations: norms"
        if last == "lm_head":
            return "logits and loss"
        if LINEAR.search(kind) or LINEAR.search(last):
            return "activations: linear"
        if ATTENTION.search(name):
            return "activations: attention"
        return "activations: linear" if ".mlp" in name else "activations: other"

    # What the trace is told

    def begin(self, phase: str, micro_batch: int = 0, step: int = 0) -> None:
        """From now on another pass runs."""
        self._layer = OUTSIDE
        self.timeline.runs.append(Pass(phase, micro_batch, step))

    def within(self, unit: int) -> None:
        """From now on this unit of decoder layers runs."""
        self._layer = unit

    def mark(self, tensor: Tensor, part: str, layer: int | None = None) -> None:
        """Say what a storage is; one that was there before is born now."""
        block = self._birth(tensor, [])
        block.part = part
        if layer is not None and layer != block.layer:
            block.layer, block.ordinal = layer, self._next(block.run, layer)

    def layer_of(self, tensor: Tensor) -> int:
        """The unit of decoder layers that a storage belongs to."""
        record = self._storages.get(id(tensor.untyped_storage()))
        return OUTSIDE if record is None else record[1].layer

    def settle(self, first_run: int) -> None:
        """Call what did not outlive the pass that made it temporary, from a pass on.

        Before its own backward pass recomputes it, or right away.
        """
        died: dict[Block, int] = {}
        for event in self.timeline.events:
            if not event.born and event.run >= first_run:
                died[event.block] = event.run
        for block, run in died.items():
            phase = self.timeline.runs[block.run].phase
            early = run == block.run and phase in ("forward", "check")
            if early and block.part.startswith("activations"):
                block.part = "temporary buffers"

    @contextmanager
    def modules(self, model: nn.Module, units: Mapping[int, int]) -> Iterator[None]:
        """Know which module runs.

        Args:
            model: Whose modules.
            units: Unit of decoder layers by the id of a layer.
        """
        self._names = {id(module): name for name, module in model.named_modules()}
        self._units = dict(units)
        hooks = [
            nn.modules.module.register_module_forward_pre_hook(self._enter),
            nn.modules.module.register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, module: nn.Module, _: Any) -> None:
        if id(module) in self._names:
            self._stack.append(module)
        if (unit := self._units.get(id(module))) is not None:
            self._layer, self._inside = unit, self._inside + 1
        elif not self._inside and self.timeline.runs[-1].phase != "backward":
            self._layer = OUTSIDE  # in a backward pass it is a part of a layer that is recomputed

    def _leave(self, module: nn.Module, _: Any, out: Any) -> None:
        if self._stack and self._stack[-1] is module:
            self._stack.pop()
        if (unit := self._units.get(id(module))) is None:
            return
        # What goes before the next module runs (the last layer's own input) goes with this layer.
        self._inside -= 1
        hidden = out[0] if isinstance(out, tuple) else out
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            # Its gradient is there: the layer's own backward pass begins.
            hidden.register_hook(lambda _: self.within(unit))

    def close(self) -> None:
        """Hear of no more deaths."""
        self._open = False


class StepMarker(LossScaler):
    """Tells the trace where the backward pass and the optimiser begin; scales nothing."""

    def __init__(self, tracker: StorageTracker) -> None:
        super().__init__(enabled=False)
        self.tracker, self.step_number, self.micro_batch = tracker, 0, -1

    def backward(self, loss: Tensor) -> None:
        """The loss is there; the backward pass begins."""
        self.tracker.begin("backward", self.micro_batch, self.step_number)
        loss.backward()

    def unscale(self, adapter: AdapterOptimizer) -> None:
        """All gradients are there."""
        for group in adapter.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.tracker.mark(parameter.grad, "gradients")
        if self.tracker.timeline.runs[-1].phase != "optimiser step":
            self.tracker.begin("optimiser step", self.micro_batch, self.step_number)

    def next_batch(self, _module: nn.Module, _args: Any) -> None:
        """A forward pre-hook of the backbone."""
        if torch.is_grad_enabled():
            self.micro_batch += 1
            self.tracker.begin("forward", self.micro_batch, self.step_number)

    def backbone_done(self, _module: nn.Module, _args: Any, _out: Any) -> None:
        """A forward hook of the backbone."""
        if torch.is_grad_enabled():
            self.tracker.begin("loss", self.micro_batch, self.step_number)


def _called_by_autograd() -> bool:
    """Whether no Python code but autograd's engine asked for the operation that is dispatched."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename.endswith(WRAPPERS) and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_name == ENGINE


def _fake_item(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1
