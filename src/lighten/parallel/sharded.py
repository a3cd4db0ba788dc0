"""Weights spread over ranks by PyTorch's `fully_shard` (FSDP2), gathered where they are needed.

Each decoder layer is gathered once for the forward and once for the backward pass of a micro-batch,
whatever number of adapters learn on it. Of a base that learns itself gradients and optimiser state
are spread too. What is frozen outside of the layers (embedding, head, norm) stays whole: it would
be gathered for the whole pass, and save nothing at its peak.

What a rank has of a base that learns may wait outside of a GPU's memory (`CPUOffloadPolicy`): a
layer is copied there for each pass, its gradients are copied back, and the optimiser moves the
weights on the processor. One process alone trains so too, over a mesh of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lighten.adapters import Trained, dtensors
from lighten.adapters.decoder import decoder_layers
from lighten.adapters.frozen import is_quantized
from lighten.adapters.whole import make_float32
from lighten.errors import UserError
from lighten.machine.heap import drop_mapped_weights
from lighten.parallel import ranks
from lighten.parallel.offloaded.stores import MainMemory, Scratch, Store
from lighten.parallel.strategies import InStep, mesh_of, require_share

Result = TypeVar("Result")


class Sharded(InStep):
    """FSDP2: `fsdp` and `zero3`, and `zero2` of a base that learns.

    Args:
        name: `fsdp`, `zero3` or `zero2`; with the last, layers stay whole from their forward to
            their backward pass.
        accelerator: The ranks.
        weights_store: Makes what this rank's part of weights that learn waits in, with their
            gradients in main memory; None: both are on the device.
    """

    def __init__(
        self,
        name: str,
        accelerator: Accelerator,
        weights_store: Callable[[], Store] | None = None,
    ) -> None:
        super().__init__(name, accelerator)
        self._store = None if weights_store is None else weights_store()
        # Copies from pinned memory are faster, and gradients go there while the GPU computes. A
        # file cannot be pinned.
        pinned = isinstance(self._store, MainMemory) and accelerator.device.type == "cuda"
        self._offload = (
            OffloadPolicy() if self._store is None else CPUOffloadPolicy(pin_memory=pinned)
        )
        self._root: _Root | None = None
        self._layers = 0
        self._away: set[nn.Parameter] = set()

    def spread(self, trained: Trained) -> None:
        """Give each rank its rows of the base's weights; others are freed layer by layer."""
        if not hasattr(FSDPModule, "reset_iter_state"):
            raise UserError(
                f"strategy: {self.name} needs PyTorch 2.13 or later, and this is "
                f"{torch.__version__}; use strategy: ddp, zero1 or zero2 of adapters"
            )
        model, mesh = trained.model, mesh_of(self._accelerator)
        layers = decoder_layers(model)
        if not layers:
            raise UserError(
                f"strategy: {self.name} spreads decoder layers, and {type(model).__name__} does "
                "not say which they are; use strategy: ddp"
            )
        if packed := [m for layer in layers for m in layer.modules() if is_quantized(m)]:
            raise UserError(
                f"strategy: {self.name} spreads dense weights and bitsandbytes' packed ones, and "
                f"{type(packed[0]).__name__} of this base is neither; use strategy: ddp"
            )
        # Adapters of PEFT's are parameters of the base's modules: they stay whole, as ours do.
        adapters = set() if trained.learns_base else _learning(trained)
        if self.name == "zero2":  # frozen weights stay as they are
            layers = [layer for layer in layers if any(p.requires_grad for p in layer.parameters())]
        in_float32 = trained.dtype == torch.float32
        for layer in layers:
            learns = trained.learns_base and all(p.requires_grad for p in layer.parameters())
            if learns or in_float32:
                make_float32(layer)
            fully_shard(
                layer, mesh=mesh, reshard_after_forward=self.name != "zero2",
                ignored_params=adapters, offload_policy=self._offload,
            )  # fmt: skip
            self._put_away(layer)
            drop_mapped_weights()  # read for this rank's rows
            if isinstance(self._store, Scratch):
                layer.register_forward_hook(self._release_after_forward)
        inside = {id(p) for layer in layers for p in layer.parameters()}
        outside = {p for p in model.parameters() if id(p) not in inside}
        beside = adapters | {p for p in outside if not p.requires_grad}
        self._root = _Root(model)
        fully_shard(self._root, mesh=mesh, ignored_params=beside, offload_policy=self._offload)
        self._put_away(self._root)
        for module in self._root.modules():
            if isinstance(module, FSDPModule) and mesh.size() > 1:
                # The loss is weighted by all ranks' tokens already: gradients are summed. A factor
                # alone is a reduction that gloo does not have.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        for parameter in beside | _learning(trained):
            whole = not isinstance(parameter, DTensor)
            if whole and parameter.device != self._accelerator.device:
                parameter.data = parameter.data.to(self._accelerator.device)
        self._layers = len(layers)
        spread = [p for p in model.parameters() if isinstance(p, DTensor)]
        require_share(self.name, "weights", spread, mesh.size())
        if missing := [p for layer in layers for p in layer.parameters()
                       if not isinstance(p, DTensor) and p not in adapters]:  # fmt: skip
            raise UserError(
                f"strategy: {self.name} should spread every weight of the decoder layers, but "
                f"{len(missing)} of them are whole on this rank; use strategy: ddp"
            )

    @torch.no_grad()
    def _put_away(self, module: nn.Module) -> None:
        """Move this rank's part of a module's weights to a file, unless they are there.

        A rank that has fewer rows than others keeps those in memory: FSDP fills them up, in memory
        of its own, when the first pass begins.
        """
        if not isinstance(self._store, Scratch):
            return
        spread = [p for p in module.parameters() if isinstance(p, DTensor) and p not in self._away]
        even = [p for p in spread if p.shape[0] % self._accelerator.num_processes == 0]
        held = [dtensors.local_part(parameter.detach()) for parameter in even]
        for parameter, local, room in zip(even, held, self._store.zeros_like(held), strict=True):
            room.copy_(local)
            parameter._local_tensor = room  # FSDP takes it for its own in its first pass
            local.untyped_storage().resize_(0)
            self._away.add(parameter)
        self._store.release([p._local_tensor for p in even])

    def _release_after_forward(self, _layer: nn.Module, _args: Any, output: Any) -> None:
        """A layer was gathered for its forward pass; another one will be before its backward."""
        assert self._store is not None
        store = self._store
        store.release_all()
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda _gradient: store.release_all())

    def within(self, work: Callable[[], Result]) -> Result:
        """Run the model under the root, which gathers what learns outside of the layers."""
        assert self._root is not None
        count = self._accelerator.num_processes
        with ranks.lost_within(self._accelerator.process_index, count):
            result = cast(Result, self._root(work))
            if not torch.is_grad_enabled():
                # No backward pass lets go of what was gathered, or forgets the order of the layers,
                # by which the next one would gather ahead.
                cast(FSDPModule, self._root).reset_iter_state()
        return result

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Those of spread weights were summed in the backward pass."""
        plain = [p for p in parameters if not isinstance(p, DTensor)]
        if plain:
            super().sum_gradients(plain)

    def describe(self) -> str:
        """In words for the user."""
        count = self._accelerator.num_processes
        if self.name == "zero2":
            return (
                f"gradients and optimiser state spread over {count} ranks; layers are gathered "
                "once per micro-batch"
            )
        if count == 1:
            where = "a file" if self._away else "main memory"
            return f"one process, {self._layers} layers brought once per pass from {where}"
        gathered = f"{self._layers} layers spread over {count} ranks, gathered once per pass"
        if self._away:
            return f"{gathered} from a file on each"
        return gathered if self._store is None else f"{gathered} from each one's main memory"


class _Root(nn.Module):
    """What `fully_shard` takes for the model: whatever is run inside of its forward.

    The loss is formed from the head's weight, beside the model's own forward.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Result]) -> Result:
        """Do the work."""
        return work()


def _learning(trained: Trained) -> set[nn.Parameter]:
    return {p for name in trained.names for p in trained.parameters(name).values()}
