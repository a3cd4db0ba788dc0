"""A loaded base, its rows and a recipe become a `Setup`: optimisers, loss, and how a step is cut.

Whatever depends on machine or model is chosen here, once, with its reason.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from lighten import cpu, models
from lighten.adapters import Trained
from lighten.cpu import gates, norms, products
from lighten.engine import compiled, optimizers, workers
from lighten.engine.adapter_optimizer import AdapterOptimizer, AdapterOptimizerSettings
from lighten.engine.batching import choose_packing, choose_passes, choose_tokens
from lighten.engine.checkpointing import checkpoint_layers
from lighten.engine.loss import Objective
from lighten.engine.offload import offload_activations
from lighten.engine.scaling import LossScaler
from lighten.engine.schedule import warmup_length
from lighten.errors import UserError
from lighten.machine import hardware
from lighten.machine.hardware import Choice
from lighten.parallel import ranks
from lighten.parallel.choose import choose
from lighten.parallel.offloaded.stores import Store
from lighten.parallel.strategies import Strategy
from lighten.recipe import AdapterOptions, Recipe, steps
from lighten.recipe.section import seconds
from lighten.recipe.spread import gathers, gathers_layers
from lighten.training import streaming
from lighten.training.method import choices_of, what_learns
from lighten.training.offloaded import Stores
from lighten.training.rows import Rows
from lighten.training.setup import Setup


class _Lengths(NamedTuple):
    """How long a run is, and its rows.

    Attributes:
        examples_per_step: Rows of one optimiser step, over all ranks.
        steps_per_epoch: Optimiser steps of one pass over the data.
        total_steps: Of the whole run.
        rows: In the data.
        tokens: In all of its rows.
    """

    examples_per_step: int
    steps_per_epoch: int
    total_steps: int
    rows: int
    tokens: int

    def tokens_of(self, rows: int) -> int:
        """Tokens that so many rows have on average."""
        return rows * self.tokens // max(1, self.rows)


def layers_later(recipe: Recipe, accelerator: Accelerator) -> bool:
    """Whether a dense base is read, made float32 and moved a layer at a time, as it is spread."""
    whole = recipe.method == "full" and recipe.last_layers is None
    by_layer = gathers_layers(recipe, accelerator.num_processes)
    by_layer = by_layer and gathers(recipe.strategy, full=whole)
    return by_layer and not streaming.spreads_packed(recipe)


def together(setup: Setup) -> None:
    """Cut steps as a rank that gathers layers does: each micro-batch gathers all of them again.

    Args:
        setup: Of one process; a plan makes it a rank's.
    """
    setup.rows_per_microbatch = setup.recipe.per_device_train_batch_size * len(setup.adapters)
    setup.one_adapter_at_a_time, setup.workers = False, 1


class _MicroBatches(NamedTuple):
    """How a step is cut on each rank.

    Attributes:
        tokens: Of one at most, padding included; None: rows decide.
        rows: Of one at most, over all adapters.
        workers: How many are trained side by side.
        one_adapter_at_a_time: Adapters do not share them.
    """

    tokens: int | None
    rows: int
    workers: int
    one_adapter_at_a_time: bool


def prepare(
    recipe: Recipe,
    accelerator: Accelerator,
    base: models.Base,
    rows: Rows,
    examples_per_step: int | None = None,
    total_steps: int | None = None,
) -> Setup:
    """Make what learns, its optimisers and the loss.

    Args:
        recipe: What is wanted.
        accelerator: Device and ranks.
        base: The loaded base.
        rows: The encoded data.
        examples_per_step: Of a run that goes on; None: what the recipe and the ranks make.
        total_steps: Of a run that goes on and has a `max_time`; None: what the recipe says.

    Raises:
        UserError: The recipe does not fit the model.
    """
    trained = what_learns(recipe, base, layers_later=layers_later(recipe, accelerator))
    if recipe.gradient_checkpointing and trained.no_checkpointing is not None:
        raise UserError(f"gradient_checkpointing: {trained.no_checkpointing}; set it to false")
    lengths = _lengths(recipe, rows, accelerator.num_processes, examples_per_step, total_steps)
    device = accelerator.device.type
    stores = Stores(recipe, device)
    strategy = choose(recipe.strategy, accelerator, trained, stores.weights(), base.feed)
    template = Choice(rows.template.name, rows.template.reason)
    choices = choices_of(recipe, base, template, trained)
    choices |= _change_layers(recipe, base.model, trained, strategy, accelerator, lengths)
    choices["optimizer"] = optimizer = optimizers.choose(recipe.optim, device)
    strategy.spread(trained)
    choices["strategy"] = Choice(strategy.name, strategy.describe())
    state_store = stores.optimizer()
    choices |= stores.choices
    adapters = [
        _adapter_optimizer(
            options, recipe, trained, strategy, lengths.total_steps, optimizer.value,
            None if state_store is None else state_store(),
        )
        for options in recipe.cohort()
    ]  # fmt: skip
    choices["packing"] = packing = choose_packing(recipe.packing, base.model, trained.no_packing)
    micro_batches, reasons = _micro_batches(recipe, base, trained, strategy, accelerator, lengths)
    objective = Objective(
        base.model, trained,
        fast=trained.supports_fast_loss, packs=packing.value == "on", device=device,
        within=strategy.within, end_pass=strategy.end_pass,
    )  # fmt: skip
    if not trained.supports_fast_loss:
        objective.reason = "the head learns inside PEFT's own module"
    if packing.value == "off":
        objective.packing_reason = packing.reason
    return Setup(
        recipe=recipe,
        base=base,
        rows=rows,
        trained=trained,
        adapters=adapters,
        objective=objective,
        accelerator=accelerator,
        strategy=strategy,
        scaler=LossScaler(enabled=trained.dtype == torch.float16),
        examples_per_step=lengths.examples_per_step,
        steps_per_epoch=lengths.steps_per_epoch,
        total_steps=lengths.total_steps,
        rows_per_microbatch=micro_batches.rows,
        tokens_per_microbatch=micro_batches.tokens,
        workers=micro_batches.workers,
        one_adapter_at_a_time=micro_batches.one_adapter_at_a_time,
        choices=choices | reasons,
    )


def _lengths(
    recipe: Recipe, rows: Rows, ranks: int, examples_per_step: int | None, total_steps: int | None
) -> _Lengths:
    count = len(rows.train.rows)
    per_step = examples_per_step or steps.rows_per_step(recipe, ranks)
    return _Lengths(
        per_step, steps.steps_per_epoch(count, per_step),
        total_steps or steps.total_steps(recipe, count, per_step), count, rows.train.counts.tokens,
    )  # fmt: skip


def _change_layers(
    recipe: Recipe, model: PreTrainedModel, trained: Trained, strategy: Strategy,
    accelerator: Accelerator, lengths: _Lengths,
) -> dict[str, Choice]:  # fmt: skip
    """Compile layers, put quicker code in, wrap what is recomputed or waits elsewhere.

    What is recomputed is what was compiled, so the order counts.
    """
    compilation = Choice("off", "layers are gathered as they are needed")
    if not strategy.in_step:
        compilation = compiled.choose(
            recipe.torch_compile,
            trained,
            tokens=lengths.tokens_of(lengths.total_steps * lengths.examples_per_step),
            device=accelerator.device.type,
            cores=hardware.machine().cores,
            most_s=None if recipe.max_time is None else seconds(recipe.max_time),
        )
    choices = {"compilation": compilation}
    if compilation.value == "on":
        compiled.compile_layers(model)
    norms.quicken(model)
    gates.quicken(model)
    products.quicken(model)
    if not cpu.enabled():
        choices["cpu"] = Choice(cpu.PLAIN, f"{cpu.OFF}: PyTorch's own operations alone")
    if recipe.gradient_checkpointing:
        part = recipe.gradient_checkpointing_part
        count = checkpoint_layers(
            model,
            every=recipe.gradient_checkpointing_layers,
            part=part,
            options=recipe.gradient_checkpointing_kwargs,
        )
        unit = "layers" if part == "layer" else f"layers' {part}"
        choices["checkpointing"] = Choice(f"{count} {unit}", "gradient_checkpointing")
    if recipe.activation_offload:
        _, choices["activations"] = offload_activations(
            model, accelerator.device, recipe.run_folder
        )
    return choices


def _micro_batches(
    recipe: Recipe, base: models.Base, trained: Trained, strategy: Strategy,
    accelerator: Accelerator, lengths: _Lengths,
) -> tuple[_MicroBatches, dict[str, Choice]]:  # fmt: skip
    """How a step is cut, and why."""
    reasons = {}
    most_rows = recipe.per_device_train_batch_size
    most_tokens, reason = choose_tokens(
        recipe.tokens_per_microbatch, accelerator.device.type, base.dtype.value
    )
    if recipe.offload_base != "none" and base.feed is not None:
        reasons["offload_base"] = streaming.describe(recipe.offload_base, base.feed)
        most_tokens, most_rows, reason = streaming.micro_batch(recipe, len(trained.names))
    elif strategy.in_step:
        most_rows *= len(trained.names)  # as `together` has it
    reasons["micro-batch"] = Choice(f"{most_tokens} tokens" if most_tokens else "rows", reason)
    reasons["workers"] = count = _choose_workers(recipe, trained, strategy, accelerator, lengths)
    tokens = lengths.tokens_of(lengths.examples_per_step // accelerator.num_processes)
    # Ranks with other numbers of cores choose otherwise, and each pass's end is a collective.
    passes = ranks.of_main(accelerator, choose_passes(base, tokens, most_tokens, int(count.value)))
    if strategy.in_step:
        passes = Choice("together", "a layer is gathered once for all adapters")
    if len(trained.names) > 1:
        reasons["passes"] = passes
    return (
        _MicroBatches(most_tokens, most_rows, int(count.value), passes.value == "apart"),
        reasons,
    )


def _choose_workers(
    recipe: Recipe, trained: Trained, strategy: Strategy, accelerator: Accelerator,
    lengths: _Lengths,
) -> Choice:  # fmt: skip
    if strategy.in_step:
        return Choice("1", "ranks wait for each other in every layer")
    if recipe.offload_base != "none":
        return Choice("1", "offload_base brings one layer at a time, for one micro-batch")
    if recipe.activation_offload:
        return Choice("1", "activation_offload follows one micro-batch at a time")
    rows = len(trained.names) * lengths.examples_per_step // accelerator.num_processes
    return workers.choose(
        recipe.workers,
        trained,
        rows=rows,
        tokens=lengths.tokens_of(rows),
        device=accelerator.device.type,
        threads=torch.get_num_threads(),
    )


def _adapter_optimizer(
    options: AdapterOptions, recipe: Recipe, trained: Trained, strategy: Strategy, total_steps: int,
    optim: str, store: Store | None,
) -> AdapterOptimizer:  # fmt: skip
    settings = AdapterOptimizerSettings(
        learning_rate=options.learning_rate,
        lr_scheduler_type=recipe.lr_scheduler_type,
        lr_scheduler_kwargs=recipe.lr_scheduler_kwargs,
        warmup=warmup_length(total_steps, recipe.warmup_ratio, recipe.warmup_steps),
        total_steps=total_steps,
        weight_decay=recipe.weight_decay,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        epsilon=recipe.adam_epsilon,
        max_grad_norm=recipe.max_grad_norm,
        seed=options.seed,
        early_stopping_patience=recipe.early_stopping_patience,
        early_stopping_threshold=recipe.early_stopping_threshold,
        optim=optim,
        loraplus_lr_ratio=options.loraplus_lr_ratio,
    )
    undecayed = trained.undecayed(options.name)
    parameters = trained.parameters(options.name)
    return AdapterOptimizer(
        options.name,
        parameters,
        settings,
        undecayed=undecayed,
        learning=strategy.learning(parameters),
        store=store,
    )
