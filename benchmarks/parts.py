"""The parts of one micro-batch of a real run, each runnable by itself.

Hooks keep what every layer was given in a forward pass; a part then runs through all layers in
turn, forward and backward, so that weights come from memory as they do in a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks import arithmetic, machine
from benchmarks.arithmetic import Work
from lighten.adapters.frozen import product, weight_of
from lighten.adapters.layers import CohortLinear
from lighten.cpu import gates
from lighten.data.batches import MicroBatch
from lighten.engine.forward_backward import shares_of
from lighten.training.setup import Setup

PARTS = ("linear", "low-rank", "attention", "norm", "activation", "loss", "optimiser")


@dataclass
class Captured:
    """What the layers of one forward pass were given.

    Attributes:
        linears: Adapted layers with their inputs.
        norms: Norms with their inputs.
        activations: Gated feed-forward layers with what they activate.
        attentions: Arguments of the attention function, as the layers call it.
        hidden: What the loss was given.
    """

    linears: list[tuple[CohortLinear, Tensor]] = field(default_factory=list)
    norms: list[tuple[nn.Module, Tensor]] = field(default_factory=list)
    activations: list[tuple[nn.Module, Tensor]] = field(default_factory=list)
    attentions: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    hidden: Tensor | None = None


@contextmanager
def capturing(setup: Setup, captured: Captured) -> Iterator[None]:
    """Hooks on every layer of the base while the block runs."""
    model = setup.base.model
    name = str(model.config._attn_implementation)
    attend = ALL_ATTENTION_FUNCTIONS[name]

    def watched(*args: Any, **kwargs: Any) -> Any:
        captured.attentions.append((args, kwargs))
        return attend(*args, **kwargs)

    def keep(where: list[Any]) -> Callable[..., None]:
        return lambda module, args: where.append((module, args[0]))

    def keep_output(layer: nn.Module) -> Callable[..., None]:
        return lambda _module, _args, out: captured.activations.append((layer, out))

    hooks = []
    for path, module in model.named_modules():
        module_name = path.rpartition(".")[2]
        if isinstance(module, CohortLinear):
            hooks.append(module.register_forward_pre_hook(keep(captured.linears)))
        elif "norm" in type(module).__name__.lower():
            hooks.append(module.register_forward_pre_hook(keep(captured.norms)))
        if module_name == "gate_proj":
            # What is activated, whether or not its gate is one kernel, and by which layer.
            layer = model.get_submodule(path.rpartition(".")[0])
            hooks.append(module.register_forward_hook(keep_output(layer)))
    ALL_ATTENTION_FUNCTIONS[name] = watched
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[name] = attend
        for hook in hooks:
            hook.remove()


def capture(setup: Setup, batch: MicroBatch) -> Captured:
    """One forward pass of the micro-batch, watched."""
    captured = Captured()
    with setup.objective.at(batch, shares_of(batch)), capturing(setup, captured):
        captured.hidden = setup.objective._positions(batch)
    return captured


class Parts:
    """The parts of a micro-batch, each runnable by itself.

    Args:
        setup: A run ready for its first step.
        batch: The micro-batch.
    """

    def __init__(self, setup: Setup, batch: MicroBatch) -> None:
        self.setup, self.batch = setup, batch
        self.captured = capture(setup, batch)

    def run(self, part: str) -> float:
        """Seconds of a part, forward and backward."""
        device = self.setup.accelerator.device.type
        with self.setup.objective.at(self.batch, shares_of(self.batch)):
            if part == "low-rank":
                return self._sum(device, self._adapted) - self._sum(device, self._frozen)
            operation = {
                "linear": self._frozen, "attention": self._attention, "norm": self._norms,
                "activation": self._activations, "loss": self._loss, "optimiser": self._optimiser,
            }[part]  # fmt: skip
            return self._sum(device, operation)

    @staticmethod
    def _sum(device: str, calls: Callable[[], Iterator[Callable[[], None]]]) -> float:
        total = 0.0
        for call in calls():  # making a call's inputs is not part of it
            machine.synchronize(device)
            began = time.perf_counter()
            call()
            machine.synchronize(device)
            total += time.perf_counter() - began
        return total

    def _frozen(self) -> Iterator[Callable[[], None]]:
        for layer, x in self.captured.linears:
            flat = x.detach().reshape(-1, x.shape[-1])
            grad = flat.new_ones(len(flat), weight_of(layer.base).shape[0])

            def call(layer: CohortLinear = layer, flat: Tensor = flat, grad: Tensor = grad,
                     back: bool = x.requires_grad) -> None:  # fmt: skip
                product(layer.base, flat)
                if back:
                    torch.mm(grad, weight_of(layer.base))

            yield call

    def _adapted(self) -> Iterator[Callable[[], None]]:
        for layer, x in self.captured.linears:
            yield _both_ways(layer, x, trained=_factors(layer))

    def _norms(self) -> Iterator[Callable[[], None]]:
        return (_both_ways(module, x) for module, x in self.captured.norms)

    def _activations(self) -> Iterator[Callable[[], None]]:
        """The activation times the other half of a gated layer."""
        for layer, x in self.captured.activations:
            up = x.detach().clone().requires_grad_()

            def gated(x: Tensor, layer: nn.Module = layer, up: Tensor = up) -> Tensor:
                return gates.activated(layer, x, up)

            yield _both_ways(gated, x, trained=[up])

    def _attention(self) -> Iterator[Callable[[], None]]:
        name = str(self.setup.base.model.config._attn_implementation)
        attend = ALL_ATTENTION_FUNCTIONS[name]
        for (module, *qkv, mask), kwargs in self.captured.attentions:
            inputs = [x.detach().requires_grad_() for x in qkv]

            def call(module: nn.Module = module, inputs: list[Tensor] = inputs, mask: Any = mask,
                     kwargs: dict[str, Any] = kwargs) -> None:  # fmt: skip
                out = attend(module, *inputs, mask, **kwargs)[0]
                torch.autograd.grad(out, inputs, torch.ones_like(out))

            yield call

    def _loss(self) -> Iterator[Callable[[], None]]:
        objective, batch = self.setup.objective, self.batch
        assert self.captured.hidden is not None
        hidden = self.captured.hidden.detach().requires_grad_()
        weights = torch.full_like(batch.labels, 1 / len(batch.labels), dtype=torch.float32)

        def call() -> None:
            with mock.patch.object(objective, "_positions", return_value=hidden):
                total, _ = objective(batch, shares_of(batch), weights)
            torch.autograd.grad(total, hidden)

        yield call

    def _optimiser(self) -> Iterator[Callable[[], None]]:
        for member in self.setup.adapters:
            for parameter in member.parameters.values():
                parameter.grad = torch.zeros_like(parameter)

            def call(member: Any = member) -> None:
                member.gradient_norm()
                member.optimizer.step()
                member.optimizer.zero_grad(set_to_none=True)

            yield call

    def work(self, part: str) -> Work:
        """What a part has to do at least."""
        captured, batch, total = self.captured, self.batch, Work()
        size = self.setup.base.model.dtype.itemsize
        if part in ("linear", "low-rank"):
            for layer, x in captured.linears:
                O, I = weight_of(layer.base).shape  # noqa: E741
                shape = x.numel() // I, I, O
                if part == "linear":
                    stored = layer.weight.numel() * layer.weight.element_size()
                    total += arithmetic.linear(*shape, size, stored, backward=x.requires_grad)
                for factor in layer.lora_A.values() if part == "low-rank" else ():
                    total += arithmetic.low_rank(*shape, len(factor), backward=x.requires_grad)
        elif part == "attention":
            for (_, query, key, *_), _ in captured.attentions:
                width, kv_width = (x.shape[1] * x.shape[3] for x in (query, key))
                total += arithmetic.attention(batch.lengths, width, kv_width, size)
        elif part == "norm":
            for _, x in captured.norms:
                total += arithmetic.elementwise(x.numel(), size)
        elif part == "activation":
            for _, x in captured.activations:
                total += arithmetic.elementwise(x.numel(), size, inputs=2)
        elif part == "loss":
            V, H = self.setup.base.model.get_output_embeddings().weight.shape
            total = arithmetic.loss(len(batch.labels), H, V, size)
        else:
            for member in self.setup.adapters:
                count = sum(p.numel() for p in member.parameters.values())
                total += arithmetic.optimiser(count)
        return total


def _factors(layer: CohortLinear) -> list[Tensor]:
    return [*layer.lora_A.values(), *layer.lora_B.values()]


def _both_ways(
    module: Callable[[Tensor], Tensor], x: Tensor, trained: list[Tensor] | None = None
) -> Callable[[], None]:
    """A call of the module and of the gradients that a step takes from it."""
    leaf = x.detach().requires_grad_(x.requires_grad)
    leaves = [*([leaf] if x.requires_grad else []), *(trained or [])]

    def call() -> None:
        out = module(leaf)
        if leaves and out.requires_grad:
            torch.autograd.grad(out, leaves, torch.ones_like(out))

    return call
