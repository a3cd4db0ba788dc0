"""The modules that stand in a base's place while a cohort is attached.

`CohortLinear` adds low-rank updates to a frozen linear layer; `CohortCopies` holds whole trained
copies of any module (`modules_to_save`). Both ask the shared `Routing` which rows of the batch
belong to which adapter, and both can be fused back into a plain module.
"""

from __future__ import annotations

import copy
import math
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lighten.adapters.fake_quant import FakeQuantLinear
from lighten.adapters.frozen import dense_copy, formats, out_in_features
from lighten.adapters.ops import (
    Dropout,
    Part,
    lone_linears,
    low_rank_linears,
    mixed_seed,
    row_hashes,
)
from lighten.adapters.spec import AdapterSpec
from lighten.adapters.targets import input_name
from lighten.errors import UserError


@dataclass(frozen=True)
class Share:
    """The rows [start, stop) of a batch that take one adapter, or the base alone (None).

    Attributes:
        adapter: Name of the adapter, or None for the base.
        start: First row of the batch.
        stop: One past the last row.
        dropout_keys: One number per row that names its example and step; None turns dropout off.
    """

    adapter: str | None
    start: int
    stop: int
    dropout_keys: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Route:
    """Which rows of a batch take which adapter.

    Attributes:
        shares: The adapters' runs of rows, in order; rows behind the last take the base alone.
        everyone: Without shares, the one adapter that every row takes, or None.
        starts: In a packed batch [1, N], where each row begins, and N at the end.
        merges: Whether adapters may share products; see `ops.MERGED_RANKS`.
        row_hashes: Of the shares, as far as layers have asked: the same for all layers.
    """

    shares: tuple[Share, ...] = ()
    everyone: str | None = None
    starts: tuple[int, ...] | None = None
    merges: bool = True
    row_hashes: dict[tuple[Any, ...], Tensor] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def lone(self) -> str | None:
        """The adapter that every row takes, if it is one."""
        return self.shares[0].adapter if len(self.shares) == 1 else self.everyone

    def widths(self, leading: Sequence[int], path: str) -> tuple[int, ...]:
        """How many flattened rows of x each row of the batch has there.

        Some layers see [B, T, ·], others [B·T, ·]; both are whole multiples of the batch.

        Args:
            leading: Shape of x without its features.
            path: The asking module, for the error.
        """
        rows, batch_rows = math.prod(leading), self.shares[-1].stop
        if self.starts is not None:
            fits = rows == self.starts[-1]
            widths = tuple(b - a for a, b in pairwise(self.starts))
        else:
            fits = leading[0] == batch_rows or (len(leading) == 1 and rows % batch_rows == 0)
            widths = (rows // batch_rows,) * batch_rows
        if not fits:
            raise RuntimeError(
                f"{path} was given {tuple(leading)} rows, which the batch of {batch_rows} "
                "rows does not divide: adapters cannot be told apart there"
            )
        return widths


class _Everywhere:
    """The route of every thread that has none of its own."""

    def __init__(self) -> None:
        self.route = Route()


class Routing(threading.local):
    """The route that a cohort's layers follow now.

    A route for every row holds in all threads, for whoever generates in another. One of a batch's
    rows holds in the thread that runs the batch, so that several may each run their own.

    Args:
        everywhere: Shared by the threads: this method runs anew in each.
    """

    def __init__(self, everywhere: _Everywhere) -> None:
        self._everywhere = everywhere
        self._thread_route: Route | None = None

    @classmethod
    def new(cls) -> Routing:
        """One that leads to the base alone."""
        return cls(_Everywhere())

    @property
    def now(self) -> Route:
        """The route; another object whenever it has changed."""
        return self._everywhere.route if self._thread_route is None else self._thread_route

    @contextmanager
    def following(self, route: Route) -> Iterator[None]:
        """Layers follow this route until the end of the block."""
        if route.shares or self._thread_route is not None:
            with self._in_this_thread(route):
                yield
        else:
            previous, self._everywhere.route = self._everywhere.route, route
            try:
                yield
            finally:
                self._everywhere.route = previous

    def as_now(self) -> Callable[[], AbstractContextManager[None]]:
        """Makes blocks, in any thread, in which layers follow what they follow here now."""
        return partial(self._in_this_thread, self._thread_route)

    @contextmanager
    def _in_this_thread(self, route: Route | None) -> Iterator[None]:
        previous, self._thread_route = self._thread_route, route
        try:
            yield
        finally:
            self._thread_route = previous


def routings(model: nn.Module) -> set[Routing]:
    """What the cohort's layers inside follow; empty where there are none."""
    adapted = (CohortLinear, CohortCopies)
    return {module.routing for module in model.modules() if isinstance(module, adapted)}


class CohortLinear(nn.Module):
    """A frozen linear layer with one low-rank update per adapter that targets it.

    A [r, I] and B [O, r] are float32 parameters under `lora_A[name]` and `lora_B[name]`.
    """

    def __init__(self, base: nn.Module, path: str, routing: Routing) -> None:
        super().__init__()
        self.base = base
        self.path = path
        # Plain dicts: the base's own parameters stay the only ones that its module tree lists, and
        # adapter names may hold dots.
        self.lora_A: dict[str, nn.Parameter] = {}
        self.lora_B: dict[str, nn.Parameter] = {}
        self.specs: dict[str, AdapterSpec] = {}
        self.scales: dict[str, float] = {}
        self.siblings: Siblings | None = None
        self.place = 0  # among them
        self.routing = routing
        # Stable over processes and library versions, unlike hash(): dropout must repeat on resume.
        # One mask for an input, so that all its products with A are one.
        self._salt = zlib.crc32(input_name(path).encode())

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for code that looks at a layer's format or device."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias, for code that takes a layer apart."""
        return self.base.bias  # type: ignore[return-value]

    def add(self, spec: AdapterSpec, generator: torch.Generator) -> None:
        """Add an adapter; at the start its update is zero unless the spec says otherwise."""
        outputs, inputs = out_in_features(self.base)
        rank = spec.rank_at(self.path)
        A = torch.empty(rank, inputs)
        B = torch.zeros(outputs, rank)
        if spec.init_lora_weights == "gaussian":
            A.normal_(std=1 / rank, generator=generator)
        elif spec.init_lora_weights == "orthogonal":
            A, B = _orthogonal(rank, inputs, outputs, generator)
        else:
            bound = 1 / math.sqrt(A.shape[1])  # Kaiming-uniform with a = √5, PEFT's default
            A.uniform_(-bound, bound, generator=generator)
        if spec.init_lora_weights is False:
            bound = 1 / math.sqrt(rank)
            B.uniform_(-bound, bound, generator=generator)
        self.lora_A[spec.name] = nn.Parameter(A.to(self.weight.device))
        self.lora_B[spec.name] = nn.Parameter(B.to(self.weight.device))
        self.specs[spec.name] = spec
        self.scales[spec.name] = spec.scale_at(self.path)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] → [..., O], each row with its own adapter's update."""
        if self.siblings is not None:
            return self.siblings.output(self, x)
        return joint_outputs([self], x)[0]

    def parts(self, x: Tensor, layer: int) -> list[tuple[str, Part]]:
        """What the adapters add to this layer on x, as the given one of several layers."""
        route = self.route
        if not route.shares:
            if (name := route.everyone) is None or name not in self.specs:
                return []
            rows = math.prod(x.shape[:-1])
            return [(name, Part(0, rows, self.scales[name], layer=layer))]
        widths = route.widths(x.shape[:-1], self.path)
        starts = (0, *accumulate(widths))
        return [
            (
                share.adapter,
                Part(
                    starts[share.start],
                    starts[share.stop],
                    self.scales[share.adapter],
                    self._dropout(share, widths[share.start : share.stop], x.device),
                    layer,
                ),
            )
            for share in route.shares
            if share.adapter in self.specs
        ]

    @property
    def route(self) -> Route:
        """Which rows take which adapter now."""
        return self.routing.now

    @property
    def lone(self) -> str | None:
        """The adapter that changes this layer on every row, if it is one."""
        return self.routing.now.lone

    def _dropout(
        self, share: Share, widths: tuple[int, ...], device: torch.device
    ) -> Dropout | None:
        assert share.adapter is not None
        spec = self.specs[share.adapter]
        if spec.dropout == 0.0 or share.dropout_keys is None:
            return None
        key = spec.seed, share.dropout_keys, widths
        hashes = self.route.row_hashes
        if key not in hashes:
            seeds = [mixed_seed(spec.seed, number) for number in share.dropout_keys]
            hashes[key] = row_hashes(seeds, widths, device)
        return Dropout(spec.dropout, hashes[key], self._salt)

    def delta(self, name: str) -> Tensor:
        """The adapter's update of the weight, scale · B A: [O, I] in float32."""
        scale = self.scales[name]
        return scale * (self.lora_B[name] @ self.lora_A[name])

    @torch.no_grad()
    def fused(self, name: str | None) -> nn.Module:
        """The plain layer with one adapter's update added to its weight (None: as it was).

        The sum is formed in float32 and rounded once to the base's format. A quantised layer
        becomes a dense one: quantised again, the sum would lose much of the update (trap 30).
        """
        if name is None or name not in self.specs:
            return self.base
        base = dense_copy(self.base)
        weight: Tensor = base.weight  # type: ignore[assignment]
        delta = self.delta(name)
        delta = delta.T if isinstance(base, Conv1D) else delta
        weight.copy_((weight.float() + delta).to(weight.dtype))
        return base


def joint_outputs(layers: Sequence[CohortLinear], x: Tensor) -> tuple[Tensor, ...]:
    """The outputs of layers that read the same x."""
    if torch.compiler.is_dynamo_compiling():
        return _lone_outputs(layers, x)
    if isinstance(layers[0].base, FakeQuantLinear):
        return tuple(_fake_quantised(layer, x) for layer in layers)
    parts, factors = [], []
    for place, layer in enumerate(layers):
        for adapter, part in layer.parts(x, place):
            parts.append(part)
            factors += [layer.lora_A[adapter], layer.lora_B[adapter]]
    merge = layers[0].route.merges
    return low_rank_linears(x, [layer.base for layer in layers], parts, factors, merge=merge)


def _fake_quantised(layer: CohortLinear, x: Tensor) -> Tensor:
    """The output of a layer in quantisation-aware training."""
    assert isinstance(layer.base, FakeQuantLinear)
    updates = [
        (part.start, part.stop, layer.lora_A[name], layer.lora_B[name], part.scale)
        for name, part in layer.parts(x, 0)
    ]
    return layer.base.with_updates(x, updates)


def _lone_outputs(layers: Sequence[CohortLinear], x: Tensor) -> tuple[Tensor, ...]:
    """`joint_outputs` for one adapter on every row, in what a compiler can follow."""
    # Not asked of the routing, which is each thread's own: all threads run the same code.
    (name,) = layers[0].specs
    return lone_linears(
        x,
        [layer.base for layer in layers],
        [layer.scales[name] for layer in layers],
        [layer.lora_A[name] for layer in layers],
        [layer.lora_B[name] for layer in layers],
    )


class Siblings:
    """Layers of one module that read the same tensor, computed together when the first is called.

    The others' outputs wait for their calls. That they really are called with the same tensor is
    seen each time by identity; where once they were not, they go apart for good.

    Args:
        layers: Such as q_proj, k_proj and v_proj of one attention.
    """

    def __init__(self, layers: Sequence[CohortLinear]) -> None:
        self.layers = tuple(layers)
        for place, layer in enumerate(layers):
            layer.siblings, layer.place = self, place
        self._together = True
        self._passes = _Passes()
        self._traced = _Pass()  # the compiler's own: in compiled code nothing is left waiting

    def output(self, layer: CohortLinear, x: Tensor) -> Tensor:
        """The output of the layer on x."""
        pass_state = self._traced if torch.compiler.is_dynamo_compiling() else self._passes.current
        if pass_state.waiting:
            if (
                x is pass_state.input
                and layer.place in pass_state.waiting
                and pass_state.holds_for(layer)
            ):
                return pass_state.take(layer.place)
            self._together = self._together and x is pass_state.input
            pass_state.waiting = {}
        if not self._together:
            return joint_outputs([layer], x)[0]
        outputs = joint_outputs(self.layers, x)
        pass_state.waiting = dict(enumerate(outputs))
        pass_state.input = x
        if not torch.compiler.is_dynamo_compiling():
            pass_state.route = layer.route
        return pass_state.take(layer.place)


class _Pass:
    """Where a thread stands among siblings: outputs not yet called for, and what was read."""

    def __init__(self) -> None:
        self.waiting: dict[int, Tensor] = {}
        self.input: Tensor | None = None
        self.route: Route | None = None

    def holds_for(self, layer: CohortLinear) -> bool:
        """Whether the rows still are whose they were; a compiled layer runs within one route."""
        return torch.compiler.is_dynamo_compiling() or self.route is layer.route

    def take(self, place: int) -> Tensor:
        """The output that waits at this place, for good."""
        output = self.waiting.pop(place)
        if not self.waiting:
            self.input = None  # or x would live until the next pass
        return output


class _Passes(threading.local):
    """A `_Pass` per thread."""

    def __init__(self) -> None:
        self.current = _Pass()


class CohortCopies(nn.Module):
    """A module of the base with one whole trained copy per adapter (`modules_to_save`).

    Copies are float32; they compute in the base's format. Rows without a copy take the base's.
    """

    def __init__(self, base: nn.Module, path: str, routing: Routing) -> None:
        super().__init__()
        self.base = base
        self.path = path
        self.copies: dict[str, nn.Module] = {}
        self.routing = routing

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that looks at a layer's format or device."""
        return self.base.weight  # type: ignore[return-value]

    def add(self, name: str) -> None:
        """Add a trainable copy, equal to the base's module at the start, dense if that is not."""
        weights = dense_copy(self.base).float()
        weights.requires_grad_(True)
        self.copies[name] = weights

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's module, or each adapter's copy on its own rows."""
        route = self.routing.now
        if not route.shares:
            return self._apply_copy(route.everyone, x, args, kwargs)
        # Token ids come as [B, T]; hidden vectors as [B, T, ·] or [B·T, ·].
        leading = x.shape if not x.is_floating_point() else x.shape[:-1]
        starts = (0, *accumulate(route.widths(leading, self.path)))
        spans = [(s.adapter, starts[s.start], starts[s.stop]) for s in route.shares]
        if len(spans) == 1:
            return self._apply_copy(spans[0][0], x, args, kwargs)
        flat = x.flatten(0, len(leading) - 1)
        parts = [
            self._apply_copy(name, flat[start:stop], args, kwargs) for name, start, stop in spans
        ]
        return torch.cat(parts).unflatten(0, leading)

    def _apply_copy(self, name: str | None, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        if name is None or name not in self.copies:
            return self.base(x, *args, **kwargs)
        weights = self.copies[name]
        dtypes = formats(self.base)
        cast = {key: value.to(dtypes[key]) for key, value in weights.named_parameters()}
        return torch.func.functional_call(weights, cast, (x, *args), kwargs)

    @torch.no_grad()
    def fused(self, name: str | None) -> nn.Module:
        """The plain module with one adapter's copy in its place (None: as it was)."""
        if name is None or name not in self.copies:
            return self.base
        dtypes = formats(self.base)
        weights = copy.deepcopy(self.copies[name])
        for key, value in weights.named_parameters():
            value.data = value.data.to(dtypes[key])
            value.requires_grad_(False)
        return weights


def _orthogonal(
    rank: int, features: int, out: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random A and B on orthogonal halves of the rank's space, so that B A is zero, as PEFT does.

    Raises:
        UserError: The rank is odd.
    """
    if rank % 2:
        raise UserError(f"init_lora_weights: orthogonal halves the rank, but {rank} is odd")
    basis = torch.linalg.qr(torch.randn(rank, rank, generator=generator))[0]
    A = torch.randn(features, rank // 2, generator=generator) @ basis[0::2] / 10.0
    B = torch.randn(out, rank // 2, generator=generator) @ basis[1::2] / 10.0
    return A.T.contiguous(), B
