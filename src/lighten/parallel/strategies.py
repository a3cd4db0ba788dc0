"""Who holds what of a training's weights, gradients and optimiser state, and how ranks sum up.

| strategy | the frozen base | what learns | gradients | optimiser state |
| --- | --- | --- | --- | --- |
| single, ddp | whole | whole | whole | whole |
| zero1 | whole | whole | whole | spread |
| zero2 | whole | whole | spread | spread |
| fsdp, zero3, of adapters | layers spread | whole | whole | whole |
| fsdp, zero3, of the base's own weights | spread | spread | spread | spread |

The stages are those of ZeRO (arXiv 1910.02054). Whatever is spread, a step's result is that of one
process: losses are weighted by the tokens of the whole step before they are differentiated, and
gradients are summed, never averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lighten.adapters import Trained, dtensors
from lighten.errors import UserError
from lighten.parallel import ranks

Result = TypeVar("Result")


class Strategy:
    """Every rank holds everything (`single`, `ddp`); other strategies are made from this one.

    Attributes:
        name: As the recipe says it.
        in_step: Ranks wait for each other within a pass, so that all have to make as many.

    Args:
        name: As the recipe says it.
        accelerator: The ranks.
    """

    in_step = False

    def __init__(self, name: str, accelerator: Accelerator) -> None:
        self.name = name
        self._accelerator = accelerator

    def spread(self, trained: Trained) -> None:
        """Lay the base out, before optimisers are made; its forwards are what they will be.

        Raises:
            UserError: What learns cannot be trained so, or a rank holds more than it should.
        """

    def learning(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """What the optimiser of one adapter moves, by the keys of its parameters."""
        return dict(parameters)

    def within(self, work: Callable[[], Result]) -> Result:
        """Do work that runs the model."""
        return work()

    def passes(self, count: int) -> int:
        """How many passes every rank makes where this one has so many micro-batches."""
        return count

    def end_pass(self) -> None:
        """A micro-batch is through the model, its backward pass too."""

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make the gradients of what learns those of all ranks together.

        Raises:
            PeerLost: A rank has ended.
        """
        if self._accelerator.num_processes == 1:
            return
        # Adapters are small: one flat sum per step, whatever each rank's micro-batches were, costs
        # less than hooks that fire per backward pass.
        gradients = _gradients(parameters)
        flat = ranks.total(self._accelerator, torch.cat([g.flatten() for g in gradients]))
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]),
                                    strict=True):  # fmt: skip
            gradient.copy_(summed.view_as(gradient))

    def moved(self, parameters: Sequence[nn.Parameter]) -> None:
        """The optimiser has moved what it holds of these parameters.

        Raises:
            PeerLost: A rank has ended.
        """

    def describe(self) -> str:
        """In words for the user."""
        count = self._accelerator.num_processes
        return "one process" if count == 1 else f"every one of {count} ranks holds everything"


class InStep(Strategy):
    """Strategies whose ranks gather layers together, so that all make as many passes."""

    in_step = True

    def passes(self, count: int) -> int:
        """The most that any rank has to make."""
        if self._accelerator.num_processes == 1:
            return count
        largest = torch.tensor(count, device=self._accelerator.device)
        place = self._accelerator.process_index, self._accelerator.num_processes
        with ranks.lost_peers(*place):
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        return int(largest)


class SpreadState(Strategy):
    """ZeRO 1 and 2: each rank keeps the optimiser's state of its rows of every parameter.

    With stage 2 a step's gradients too are summed to the rank that needs them alone. Within a
    backward pass they are whole: what learns is an adapter, or is laid out by `Sharded`.

    Args:
        name: `zero1` or `zero2`.
        accelerator: The ranks.
    """

    def __init__(self, name: str, accelerator: Accelerator) -> None:
        super().__init__(name, accelerator)
        self._mesh = mesh_of(accelerator)
        self._rows: dict[nn.Parameter, nn.Parameter] = {}

    def learning(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """This rank's rows of each parameter, in the parameter's own memory."""
        for parameter in parameters.values():
            local = dtensors.rows_of(parameter.data, *self._place)
            self._rows[parameter] = nn.Parameter(dtensors.spread(local, parameter, self._mesh))
        shards = {key: self._rows[parameter] for key, parameter in parameters.items()}
        require_share(self.name, "optimiser state", list(shards.values()), self._mesh.size())
        return shards

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Stage 1 sums whole gradients, stage 2 each rank's rows alone."""
        if self.name == "zero1":
            super().sum_gradients(parameters)
            local_gradients = [dtensors.rows_of(g, *self._place) for g in _gradients(parameters)]
        else:
            local_gradients = self._scattered(parameters)
        for parameter, rows in zip(parameters, local_gradients, strict=True):
            shard = self._rows[parameter]
            shard.grad = dtensors.spread(rows, parameter, self._mesh)
            parameter.grad = None

    def moved(self, parameters: Sequence[nn.Parameter]) -> None:
        """Every rank hands out its rows."""
        rank, count = self._place
        sizes = [_rows_size(parameter, count) for parameter in parameters]
        sent = parameters[0].new_zeros(sum(sizes))
        for parameter, room in zip(parameters, sent.split(sizes), strict=True):
            local = dtensors.local_part(self._rows[parameter].data)
            room[: local.numel()].copy_(local.flatten())
        received = [torch.empty_like(sent) for _ in range(count)]
        with ranks.lost_peers(rank, count):
            torch.distributed.all_gather(received, sent)
        for other, part in enumerate(received):
            for parameter, room in zip(parameters, part.split(sizes), strict=True):
                rows = dtensors.rows_of(parameter.data, other, count)
                rows.copy_(room[: rows.numel()].view_as(rows))

    def describe(self) -> str:
        """In words for the user."""
        what = "optimiser state" if self.name == "zero1" else "gradients and optimiser state"
        return f"{what} spread over {self._mesh.size()} ranks"

    @property
    def _place(self) -> tuple[int, int]:
        return self._mesh.get_local_rank(), self._mesh.size()

    def _scattered(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """This rank's rows of the summed gradients."""
        rank, count = self._place
        sizes = [_rows_size(parameter, count) for parameter in parameters]
        sent = [parameters[0].new_zeros(sum(sizes)) for _ in range(count)]
        gradients = _gradients(parameters)
        for other, part in enumerate(sent):
            for gradient, room in zip(gradients, part.split(sizes), strict=True):
                rows = dtensors.rows_of(gradient, other, count)
                room[: rows.numel()].copy_(rows.flatten())
        received = torch.empty_like(sent[0])
        with ranks.lost_peers(rank, count):
            torch.distributed.reduce_scatter(received, sent)
        shards = []
        for parameter, room in zip(parameters, received.split(sizes), strict=True):
            rows = dtensors.rows_of(parameter.data, rank, count)
            shards.append(room[: rows.numel()].view_as(rows).clone())
        return shards


def mesh_of(accelerator: Accelerator) -> DeviceMesh:
    """All ranks in one dimension."""
    return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))


def require_share(name: str, what: str, tensors: Sequence[Tensor], count: int) -> None:
    """See to it that this rank holds no more than its share of what is spread.

    Args:
        name: The strategy.
        what: Is spread, for the error.
        tensors: What is spread.
        count: Of the ranks.

    Raises:
        UserError: It holds more: the engine has not done what the strategy says.
    """
    held = sum(dtensors.local_part(tensor).numel() * tensor.element_size() for tensor in tensors)
    share = sum(_rows_size(tensor, count) * tensor.element_size() for tensor in tensors)
    refuse_more(name, what, held=held, share=share)


def refuse_more(name: str, what: str, *, held: int, share: int) -> None:
    """See to it that a rank holds no more bytes than its share.

    Args:
        name: The strategy.
        what: Is spread, for the error.
        held: By this rank, in bytes.
        share: Of it, in bytes.

    Raises:
        UserError: It holds more: the engine has not done what the strategy says.
    """
    if held > share:
        raise UserError(
            f"strategy: {name} should leave {share:,} bytes of {what} on a rank, but this one "
            f"holds {held:,}; use strategy: ddp, and report this with your version of PyTorch "
            f"({torch.__version__})"
        )


def _gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """One gradient per parameter, zero where none has arrived."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _rows_size(tensor: Tensor, count: int) -> int:
    """Numbers in the most rows that a rank holds."""
    return -(-tensor.shape[0] // count) * (tensor.numel() // max(1, tensor.shape[0]))
