"""The engine's own steps on fake tensors.

What runs here is what trains: `prepare` attaches what learns and makes the optimisers, the loss is
first compared with the model's own, `train_step` makes two steps of up to two micro-batches (the
second step has gradients, optimiser state and activations together). Only the weights are fake and
the decoder layers that repeat are traced once (`repeat`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lighten import models
from lighten.adapters.decoder import decoder_layers
from lighten.data import Encoded, TemplateChoice
from lighten.data.batches import Item, MicroBatch, collate, even_shares, layout, steps_of_epoch
from lighten.data.tokenise import EncodingCounts
from lighten.engine.adapter_optimizer import AdapterOptimizer
from lighten.engine.forward_backward import undropped
from lighten.engine.step import train_step
from lighten.errors import UserError
from lighten.machine.hardware import Choice
from lighten.models import quantized
from lighten.models.packed_rows import groups_of
from lighten.planning import offloaded, repeat
from lighten.planning.build import converted_in_place, fake_base
from lighten.planning.few_chunks import FewChunks, with_new_adapters
from lighten.planning.on_cuda import as_on_cuda, as_unpacked
from lighten.planning.result import MOST_TOKENS, Shape
from lighten.planning.storage_tracker import StepMarker, StorageTracker, Timeline
from lighten.recipe import Recipe
from lighten.recipe.spread import gathers_layers
from lighten.training.prepare import prepare, together
from lighten.training.rows import Rows
from lighten.training.setup import Setup

STEPS = 2
ATTENTION_IS_HALF = 2048  # tokens of a row whose attention takes as much as the rest of a layer
MICRO_BATCHES = 2  # of each step; further ones of the same adapters find what the second found


@dataclass(frozen=True)
class _Row:
    """An example that is all answer but its first token and the prompt."""

    input_ids: list[int]
    supervised: list[bool]


class OneRank:
    """What `prepare` and `train_step` ask of an accelerator, for one rank."""

    num_processes, process_index = 1, 0
    is_main_process = True

    def __init__(self, kind: str = "cpu") -> None:
        self.device = torch.device(kind)


@dataclass
class Traced:
    """Steps that were followed.

    Attributes:
        timeline: Of the whole model.
        setup: What was prepared.
        batches: All micro-batches of the step.
        places: Which of them were traced.
        lengths: Tokens of the rows that they count in.
        first_run: The first pass of the timeline after loading.
        weights: Bytes of the base's weights and constants.
        largest: Bytes of its largest weight.
        frozen: Bytes of its weights and constants that do not learn.
        packed: Of these what ranks can share of its decoder layers in few bits.
        in_layers: Bytes of the weights of its decoder layers, learning or not; None: it has none.
    """

    timeline: Timeline
    setup: Setup
    batches: list[list[Item]]
    places: list[int]
    lengths: list[int]
    first_run: int
    weights: int
    largest: int
    frozen: int
    packed: int
    in_layers: int | None

    def tokens(self, place: int) -> int:
        """Tokens of a micro-batch, padding included."""
        lengths = [self.lengths[item.row] for item in self.batches[place]]
        return sum(lengths) if self.setup.objective.packs else len(lengths) * max(lengths)

    def share_of(self, index: int) -> float:
        """How many times its own tokens a traced micro-batch stands for, with those after it."""
        ends = [*self.places[1:], len(self.batches)]
        tokens = [self.tokens(place) for place in range(self.places[index], ends[index])]
        return sum(tokens) / tokens[0]

    def further_sums(self, workers: int) -> int:
        """Bytes of gradients' sums that workers have beyond one of each adapter's.

        Each worker sums those of the adapters in its own micro-batches.
        """
        most = 0
        for group in self.setup.groups(self.setup.adapters):
            size: dict[str | None, int] = {
                adapter.name: sum(4 * p.numel() for p in adapter.parameters.values())
                for adapter in group
            }
            places = [place for place, part in enumerate(self.batches) if part[0].adapter in size]
            shares = even_shares([self.tokens(place) for place in places], workers)
            summed = [
                {item.adapter for i in share for item in self.batches[places[i]]}
                for share in shares
            ]
            every = sum(size[name] for names in summed for name in names)
            most = max(most, every - sum(size.values()))
        return most

    @property
    def step_tokens(self) -> int:
        """Real tokens of the whole step."""
        return sum(self.lengths[item.row] for part in self.batches for item in part)

    def shape(self, workers: int = 1) -> Shape:
        """Of the largest micro-batch."""
        longest = max(self.lengths[item.row] for item in self.batches[0])
        return Shape(len(self.batches[0]), longest, len(self.batches), workers)


def largest_step(
    setup: Setup, rows_tokens: tuple[int, int] | Sequence[int] | None
) -> tuple[list[list[Item]], list[int]]:
    """The micro-batches of the step that decides the peak, and the lengths their items count in.

    Args:
        setup: Batch, accumulation, length, seeds, packing.
        rows_tokens: (examples of each adapter in a step, tokens of each), or the lengths of the
            data's rows in a list, or None: every example is `max_length` long.
    """
    recipe, packed = setup.recipe, setup.objective.packs
    names = [adapter.name for adapter in setup.adapters]

    def cut(items: list[Item], lengths: Sequence[int]) -> list[list[Item]]:
        parts: list[list[Item]] = []
        for group in setup.groups(setup.adapters):
            names_of_group = {adapter.name for adapter in group}
            parts += layout(
                [item for item in items if item.adapter in names_of_group], lengths,
                max_rows=setup.rows_per_microbatch,
                max_tokens=setup.tokens_per_microbatch, packed=packed, workers=setup.workers,
            )  # fmt: skip
        return parts

    if rows_tokens is None or isinstance(rows_tokens, tuple):
        rows, tokens = rows_tokens or (setup.examples_per_step, recipe.max_length)
        return cut([Item(name, 0, row) for name in names for row in range(rows)], [tokens]), [
            tokens
        ]
    lengths = [min(length, recipe.max_length) for length in rows_tokens]
    orders = [
        steps_of_epoch(
            lengths, setup.examples_per_step, seed=options.seed, epoch=0,
            group_by_length=recipe.group_by_length,
        )
        for options in recipe.cohort()
    ]  # fmt: skip
    steps = [
        cut(
            [Item(name, row, row) for name, batch in zip(names, rows, strict=True)
             for row in batch], lengths,
        )
        for rows in zip(*orders, strict=True)
    ]  # fmt: skip

    def weight(step: list[list[Item]]) -> float:
        return max(_weight([lengths[item.row] for item in part], packed) for part in step)

    return max(steps, key=weight), lengths


def _weight(lengths: Sequence[int], packed: bool) -> float:
    """What a micro-batch needs, in arbitrary units: to tell which of many is the largest."""
    if not packed:
        lengths = [max(lengths)] * len(lengths)
    return sum(length * (1 + length / ATTENTION_IS_HALF) for length in lengths)


def follow_recipe(
    recipe: Recipe,
    config: Any,
    dtype: Choice,
    kind: str,
    *,
    rows_tokens: tuple[int, int] | Sequence[int] | None = None,
    supervised: float = 1.0,
    all_layers: bool = False,
    capability: tuple[int, int] | None = None,
    ranks: int = 1,
) -> Traced:
    """Trace a recipe's steps on fake tensors.

    Args:
        recipe: What would be trained.
        config: The base's configuration.
        dtype: The format of the products.
        kind: `cpu` or `cuda`.
        rows_tokens: As `largest_step` takes it.
        supervised: Share of each row's tokens that are supervised, at its end.
        all_layers: Trace every layer, alike or not.
        capability: Compute capability of a CUDA device, if known.
        ranks: Of the run; where they gather layers, micro-batches are filled for that.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    tracker = StorageTracker(kernels=kind == "cpu")
    quiet = recipe.model_copy(update=offloaded.UNTRACED)
    with ExitStack() as stack:
        stack.enter_context(fake)
        stack.enter_context(tracker)
        with converted_in_place():  # some models convert layers as they are made
            base = fake_base(recipe, config, dtype, kind, tracker, capability)
        sizes = _sizes(base)
        # No rows, but as many tokens as one of them has: how many workers pay is a matter of that.
        counts = EncodingCounts(tokens=_mean_tokens(recipe, rows_tokens))
        rows = Rows(Encoded([], counts), None, TemplateChoice("", "", ""), {})
        rank = OneRank(kind)
        with converted_in_place():
            setup = prepare(quiet, rank, base, rows)
        if gathers_layers(recipe, ranks):
            together(setup)
        rank.device = torch.device("cpu")  # where fake tensors are, whatever is planned
        layers, repetition = _layers(base.model, all_layers)
        _mark_learning(setup, layers, repetition, tracker)
        frozen, packed, in_layers = _frozen(setup), _packed(layers), _in_layers(setup, layers)
        units = _shrink(base.model, layers, repetition)
    setup.objective.workspace = lambda: FewChunks(tracker.timeline)
    cut, lengths = largest_step(setup, rows_tokens)
    _require_traceable(cut, lengths)
    places = traced_places(setup, cut)
    batches = collated(setup, [cut[place] for place in places], lengths, supervised)
    attending = as_on_cuda(capability) if kind == "cuda" else as_unpacked(batches)
    with fake, tracker, attending:
        first_run = len(tracker.timeline.runs)
        run_steps(setup, [_fake(batch, fake) for batch in batches], tracker, units)
    timeline = tracker.timeline
    tracker.settle(first_run)
    timeline.forget_what_went_before(first_run)
    if repetition.units > repeat.TRACED:
        try:
            timeline = repeat.unrolled(timeline, repetition.units, first_run)
        except repeat.NotAlike:
            return follow_recipe(
                recipe, config, dtype, kind,
                rows_tokens=rows_tokens, supervised=supervised, all_layers=True,
                capability=capability, ranks=ranks,
            )  # fmt: skip
    return Traced(timeline, setup, cut, places, lengths, first_run, sum(sizes), max(sizes), frozen,
                  packed, in_layers)  # fmt: skip


def _require_traceable(cut: list[list[Item]], lengths: Sequence[int]) -> None:
    """Raise where tracing would take minutes, for a micro-batch that no device holds.

    Raises:
        UserError: A micro-batch has too many tokens.
    """
    part = max(cut, key=len)
    tokens = len(part) * max(lengths[item.row] for item in part)
    if tokens > MOST_TOKENS:
        raise UserError(
            f"a micro-batch of {len(part):,} rows and {tokens:,} tokens is more than is planned "
            f"({MOST_TOKENS:,}), and than any device holds; lower per_device_train_batch_size or "
            "max_length, or set tokens_per_microbatch"
        )


def _mean_tokens(recipe: Recipe, rows_tokens: tuple[int, int] | Sequence[int] | None) -> int:
    if rows_tokens is None or isinstance(rows_tokens, tuple):
        return rows_tokens[1] if rows_tokens else recipe.max_length
    return sum(min(length, recipe.max_length) for length in rows_tokens) // max(1, len(rows_tokens))


def traced_places(setup: Setup, cut: list[list[Item]]) -> list[int]:
    """The first micro-batches of each group of adapters, and of each adapter the first."""
    places = []
    for group in setup.groups(setup.adapters):
        names = {adapter.name for adapter in group}
        places_of_group = [place for place, part in enumerate(cut) if part[0].adapter in names]
        seen_adapters: set[str | None] = set()
        for count, place in enumerate(places_of_group):
            adapters = {item.adapter for item in cut[place]}
            # Whoever has not learnt yet has neither gradients nor optimiser state.
            if count < MICRO_BATCHES or not adapters <= seen_adapters:
                places.append(place)
            seen_adapters |= adapters
    return places


def collated(
    setup: Setup, cut: list[list[Item]], lengths: Sequence[int], supervised: float
) -> list[MicroBatch]:
    """Micro-batches of rows without meaning.

    Args:
        setup: Names and packing.
        cut: The rows of each.
        lengths: Tokens of the rows that they count in.
        supervised: Share of each row's tokens that are supervised, at its end.
    """
    used_rows = {item.row for part in cut for item in part}
    data = [
        row_of(length if row in used_rows else 1, supervised) for row, length in enumerate(lengths)
    ]
    names = [adapter.name for adapter in setup.adapters]
    packed = setup.objective.packs
    return [collate(part, data, names, packed=packed) for part in cut]


def run_steps(
    setup: Setup, batches: list[MicroBatch], tracker: StorageTracker, units: Mapping[int, int]
) -> None:
    """The check of the loss and the steps, as the training loop makes them.

    Args:
        setup: What was prepared; its scaler is not used.
        batches: Micro-batches of each step.
        tracker: Already entered.
        units: Unit of each decoder layer by its id.
    """
    model = setup.base.model
    scaler = StepMarker(tracker)
    hooks = [
        model.base_model.register_forward_pre_hook(scaler.next_batch),
        model.base_model.register_forward_hook(scaler.backbone_done),
    ]
    for batch in batches:
        if batch.starts is not None:  # where rows begin decides shapes: real indices
            with torch._C._DisableTorchDispatch():
                groups_of(batch.starts, batch.labels.device)
    try:
        with tracker.modules(model, units):
            tracker.begin("check")
            # Of few positions and without gradient it never is the peak: one row is enough to
            # know which path is taken.
            first = batches[0].alone(0)
            setup.objective.verify(first, undropped(first))
            for step in range(STEPS):
                scaler.step_number, scaler.micro_batch = step, -1
                for group in setup.groups(setup.adapters):
                    names = {adapter.name for adapter in group}
                    group_batches = [batch for batch in batches if batch.items[0].adapter in names]
                    if step < STEPS - 1:  # only that all adapters have learnt once
                        group_batches = with_new_adapters(group_batches)
                    train_step(group_batches, group, setup.objective, setup.accelerator, scaler)
                    _mark_state(group, tracker)
    finally:
        for hook in hooks:
            hook.remove()
        tracker.close()


def _layers(model: nn.Module, all_layers: bool) -> tuple[list[nn.Module], repeat.Repetition]:
    layers = decoder_layers(model)  # type: ignore[arg-type]
    if not layers:
        return [], repeat.Repetition(1, 1)
    if all_layers:
        return layers, repeat.Repetition(len(layers), 1)
    return layers, repeat.repetition([repeat.kind_of(layer) for layer in layers])


def _shrink(
    model: nn.Module, layers: list[nn.Module], repetition: repeat.Repetition
) -> dict[int, int]:
    """Leave the layers that are traced in the model; unit by the id of each."""
    traced = [layers[i] for i in repetition.traced] if layers else []
    if len(traced) < len(layers):
        for module in model.modules():
            for name, child in module.named_children():
                if isinstance(child, nn.ModuleList) and list(child) == layers:
                    setattr(module, name, nn.ModuleList(traced))
    return {id(layer): repetition.unit(place) for place, layer in enumerate(traced)}


def _mark_learning(
    setup: Setup, layers: list[nn.Module], repetition: repeat.Repetition, tracker: StorageTracker
) -> None:
    """Adapters are adapters, and each of a traced layer belongs to its unit."""
    places = {layer: place for place, layer in enumerate(repetition.traced)}
    full = setup.recipe.method == "full"
    listed = next(
        (name for name, child in setup.base.model.named_modules()
         if isinstance(child, nn.ModuleList) and list(child) == layers), "",
    )  # fmt: skip
    pattern = re.compile(rf"{re.escape(listed)}\.(\d+)\.") if listed else None
    for adapter in setup.adapters:
        for key, parameter in adapter.parameters.items():
            match = pattern.search(key) if pattern else None
            place = places.get(int(match[1])) if match else None
            unit = None if place is None else repetition.unit(place)
            tracker.mark(parameter, "base weights" if full else "adapters", unit)


def _sizes(base: models.Base) -> list[int]:
    """Bytes of each storage of the base's weights, buffers and constants."""
    return [*_storages([*_weights(base.model), *base.model.buffers()]).values()]


def _packed(layers: Sequence[nn.Module]) -> int:
    """Bytes of layers in few bits that ranks can share: the numbers and their scales."""
    total = 0
    for module in (module for layer in layers for module in layer.modules()):
        if hasattr(module, "dense_weight") and not hasattr(module, "streamed_bytes"):
            weight: Any = module.weight
            eight = weight.dtype == torch.int8
            total += weight.nbytes + (weight.SCB if eight else weight.quant_state.absmax).nbytes
    return total


def _in_layers(setup: Setup, layers: Sequence[nn.Module]) -> int | None:
    """Bytes of the base's own weights in decoder layers."""
    adapters = [] if setup.recipe.method == "full" else setup.adapters
    beside = {id(p) for adapter in adapters for p in adapter.parameters.values()}
    weights = [p for layer in layers for p in layer.parameters() if id(p) not in beside]
    return sum(_storages(weights).values()) if layers else None


def _frozen(setup: Setup) -> int:
    """Bytes of the weights and constants that do not learn, tied ones once."""
    learning = _storages([p for adapter in setup.adapters for p in adapter.parameters.values()])
    every = _storages(_weights(setup.base.model))
    return sum(size for key, size in every.items() if key not in learning)


def _weights(model: nn.Module) -> list[Tensor]:
    """Parameters, and the scales of those that are quantised."""
    weights: list[Tensor] = [*model.parameters()]
    for layer in model.modules():
        if hasattr(layer, "dense_weight") and not hasattr(layer, "streamed_bytes"):
            weights += quantized.scales_of(layer.weight)
    return weights


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of each storage by its id."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {id(storage): storage.nbytes() for storage in storages}


def _mark_state(adapters: Sequence[AdapterOptimizer], tracker: StorageTracker) -> None:
    for adapter in adapters:
        for parameter, state in adapter.optimizer.state.items():
            for value in state.values():
                if isinstance(value, Tensor):
                    tracker.mark(value, "optimiser", tracker.layer_of(parameter))


def row_of(length: int, supervised: float) -> _Row:
    """A row of so many tokens of which the last share is supervised."""
    supervised_tokens = max(1, min(length - 1, round(length * supervised)))
    return _Row([0] * length, [False] * (length - supervised_tokens) + [True] * supervised_tokens)


def _fake(batch: MicroBatch, mode: FakeTensorMode) -> MicroBatch:
    return replace(
        batch,
        input_ids=mode.from_tensor(batch.input_ids),
        positions=mode.from_tensor(batch.positions),
        labels=mode.from_tensor(batch.labels),
        position_ids=None if batch.position_ids is None else mode.from_tensor(batch.position_ids),
    )
