"""Everything a run needs before its first step: base, rows, what learns, members, loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lighten import models
from lighten.adapters import AdapterSpec, Trained, WholeBase, attach
from lighten.adapters.files import check_fit, read_weights
from lighten.cpu import gates, norms
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
from lighten.machine.hardware import Choice, choose_dtype
from lighten.models.trainable import require_gradients
from lighten.parallel.choose import choose
from lighten.parallel.strategies import Strategy
from lighten.peft_config import WEIGHTS, tensor_shapes
from lighten.recipe import AdapterOptions, Recipe
from lighten.recipe.section import seconds
from lighten.training import streaming
from lighten.training.rows import Rows
from lighten.training.suitable import require_trainable


@dataclass
class Setup:
    """A run ready for its first step.

    Attributes:
        recipe: What is wanted.
        base: The loaded base.
        rows: The encoded data.
        trained: What learns: the adapters on the base, or the base itself.
        members: Its names with their optimisers.
        objective: The loss.
        accelerator: Device and ranks.
        strategy: How weights, gradients and optimiser state lie on the ranks.
        scaler: Factors of float16 losses; does nothing otherwise.
        examples_per_step: Rows of one optimiser step, over all ranks.
        steps_per_epoch: Optimiser steps of one pass over the data.
        total_steps: Of the whole run.
        tokens_per_microbatch: Tokens of one micro-batch at most, padding included.
        rows_per_microbatch: Rows of one micro-batch at most, over all adapters.
        workers: Micro-batches that train side by side.
        apart: Each adapter has micro-batches of its own and its optimiser moves right after them.
        choices: What was chosen for this machine, with reasons.
    """

    recipe: Recipe
    base: models.Base
    rows: Rows
    trained: Trained
    members: list[AdapterOptimizer]
    objective: Objective
    accelerator: Accelerator
    strategy: Strategy
    scaler: LossScaler
    examples_per_step: int
    steps_per_epoch: int
    total_steps: int
    rows_per_microbatch: int
    tokens_per_microbatch: int | None = None
    workers: int = 1
    apart: bool = False
    choices: dict[str, Choice] = field(default_factory=dict)

    def set_total_steps(self, total: int) -> None:
        """Let the run and the course of its learning rates end after so many steps."""
        recipe, self.total_steps = self.recipe, total
        warmup = warmup_length(total, recipe.warmup_ratio, recipe.warmup_steps)
        for member in self.members:
            member.settings = replace(member.settings, total_steps=total, warmup=warmup)

    def groups(self, members: Sequence[AdapterOptimizer]) -> list[list[AdapterOptimizer]]:
        """The adapters that share micro-batches and are trained before the next ones."""
        return [[member] for member in members] if self.apart else [list(members)]


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
    options = recipe.cohort()
    trained = what_learns(recipe, base)
    if recipe.gradient_checkpointing and trained.no_checkpointing is not None:
        raise UserError(f"gradient_checkpointing: {trained.no_checkpointing}; set it to false")
    choices = {
        "method": Choice(recipe.method, "; ".join(map(trained.describe, trained.names))),
        "dtype": base.dtype,
        "attention": base.attention,
        "template": Choice(rows.template.name, rows.template.reason),
    }
    if recipe.adapter_name_or_path is not None:
        choices["start"] = Choice(recipe.adapter_name_or_path, "adapter_name_or_path")
    if isinstance(trained, WholeBase):
        choices["precision"] = _precision(trained)
    if untrained := _untrained_tokens(recipe, options):
        choices["added_tokens"] = Choice("untrained", untrained)
    if base.quantization is not None:
        choices["quantization"] = base.quantization
    if recipe.qat is not None:
        choices["qat"] = Choice(
            f"{recipe.qat}, groups of {recipe.qat_group_size}",
            "qat of the recipe; every linear layer but the head, held-out losses too",
        )
    per_step = examples_per_step or (
        recipe.per_device_train_batch_size
        * recipe.gradient_accumulation_steps
        * accelerator.num_processes
    )
    steps_per_epoch = math.ceil(len(rows.train.rows) / per_step)
    total = total_steps or recipe.max_steps or math.ceil(recipe.num_train_epochs * steps_per_epoch)
    device = accelerator.device.type
    strategy = choose(recipe.strategy, accelerator, trained)
    choices["compilation"] = Choice("off", "layers are gathered as they are needed")
    if not strategy.in_step:
        choices["compilation"] = compiled.choose(
            recipe.torch_compile,
            trained,
            tokens=total * per_step * rows.train.counts.tokens // max(1, len(rows.train.rows)),
            device=device,
            cores=hardware.machine().cores,
            most_s=None if recipe.max_time is None else seconds(recipe.max_time),
        )
    if choices["compilation"].value == "on":
        compiled.compile_layers(base.model)  # before layers are recomputed: what is, is compiled
    norms.quicken(base.model)
    gates.quicken(base.model)
    choices |= _save_memory(recipe, base.model, accelerator.device)
    choices["optimizer"] = optimizer = optimizers.choose(recipe.optim, device)
    strategy.spread(trained)
    choices["strategy"] = Choice(strategy.name, strategy.describe())
    members = [_member(own, recipe, trained, strategy, total, optimizer.value) for own in options]
    scaler = LossScaler(enabled=trained.dtype == torch.float16)
    choices["packing"] = packing = choose_packing(recipe.packing, base.model, trained.no_packing)
    tokens, why = choose_tokens(recipe.tokens_per_microbatch, device, base.dtype.value)
    most_rows = recipe.per_device_train_batch_size
    if base.feed is not None:
        choices["offload_base"] = streaming.describe(recipe.offload_base, base.feed)
        tokens, most_rows, why = streaming.micro_batch(recipe, len(trained.names))
    choices["micro-batch"] = Choice(f"{tokens} tokens" if tokens else "rows", why)
    choices["workers"] = side_by_side = (
        Choice("1", "ranks wait for each other in every layer")
        if strategy.in_step
        else _choose_lanes(recipe, trained, rows, per_step, accelerator)
    )
    own = per_step // accelerator.num_processes * rows.train.counts.tokens
    passes = choose_passes(
        base, own // max(1, len(rows.train.rows)), tokens, int(side_by_side.value)
    )
    if strategy.in_step:
        passes = Choice("together", "a layer is gathered once for all adapters")
    if len(trained.names) > 1:
        choices["passes"] = passes
    objective = Objective(
        base.model, trained,
        fast=trained.supports_fast_loss, packs=packing.value == "on", device=device,
        within=strategy.within,
    )  # fmt: skip
    if not trained.supports_fast_loss:
        objective.reason = "the head learns inside PEFT's own module"
    objective.packing_reason = trained.no_packing or objective.packing_reason
    return Setup(
        recipe, base, rows, trained, members, objective, accelerator, strategy, scaler,
        per_step, steps_per_epoch, total, most_rows, tokens, int(side_by_side.value),
        passes.value == "apart", choices,
    )  # fmt: skip


def _save_memory(recipe: Recipe, model: PreTrainedModel, device: torch.device) -> dict[str, Choice]:
    """Wrap what shall be recomputed or wait elsewhere, and say what was wrapped."""
    choices = {}
    if recipe.gradient_checkpointing:
        part = recipe.gradient_checkpointing_part
        count = checkpoint_layers(
            model,
            every=recipe.gradient_checkpointing_layers,
            part=part,
            options=recipe.gradient_checkpointing_kwargs,
        )
        what = "layers" if part == "layer" else f"layers' {part}"
        choices["checkpointing"] = Choice(f"{count} {what}", "gradient_checkpointing")
    if recipe.activation_offload:
        _, choices["activations"] = offload_activations(model, device, recipe.run_folder)
    return choices


def what_learns(recipe: Recipe, base: models.Base) -> Trained:
    """What the recipe's method trains on this base.

    Raises:
        UserError: The recipe does not fit the model.
    """
    if recipe.method == "full":
        return WholeBase(
            base.model, dtype=getattr(torch, base.dtype.value), last=recipe.last_layers,
            qat_group_size=recipe.qat_groups,
        )  # fmt: skip
    start = recipe.adapter_name_or_path
    try:
        trained = attach(
            base.model, [_spec(own) for own in recipe.cohort()], qat_group_size=recipe.qat_groups
        )
    except UserError as error:
        if start is None:
            raise
        raise UserError(
            f"adapter_name_or_path: {start} does not fit {base.name}: {error}"
        ) from error
    # A run that is resumed needs it no more.
    if start is not None and (weights := Path(start) / WEIGHTS).is_file():
        shapes = tensor_shapes(weights)
        for name in trained.names:
            check_fit(shapes, trained.shapes(name), f"adapter_name_or_path: {start}")
    return trained


def go_on_from_adapter(recipe: Recipe, trained: Trained) -> None:
    """Put the weights of `adapter_name_or_path` into every adapter, if it names some.

    Raises:
        UserError: They are not whole, or belong to another base.
    """
    if recipe.adapter_name_or_path is None:
        return
    weights = read_weights(Path(recipe.adapter_name_or_path))
    for name in trained.names:
        trained.restore(name, weights)


def _precision(trained: WholeBase) -> Choice:
    if trained.dtype == torch.float32:
        return Choice("float32", "weights, optimiser and products alike")
    products = str(trained.dtype).removeprefix("torch.")
    scaled = ", its gradients scaled" if trained.dtype == torch.float16 else ""
    return Choice(
        f"mixed: float32 and {products}",
        f"weights that learn and AdamW's state in float32, products in {products} "
        f"(autocast{scaled})",
    )


def _untrained_tokens(recipe: Recipe, options: Sequence[AdapterOptions]) -> str | None:
    """Why new tokens stay as they began, if they do."""
    if not recipe.added_tokens:
        return None
    if recipe.method == "full":
        frozen = recipe.last_layers is not None
        return "the embedding is below the layers that learn" if frozen else None
    if all(_whole(own) for own in options):
        return None
    return "modules_to_save does not name the embedding, so they stay as they began"


def _choose_lanes(
    recipe: Recipe, trained: Trained, rows: Rows, per_step: int, accelerator: Accelerator
) -> Choice:
    if recipe.offload_base != "none":
        return Choice("1", "offload_base brings one layer at a time, for one micro-batch")
    if recipe.activation_offload:
        return Choice("1", "activation_offload follows one micro-batch at a time")
    own = len(trained.names) * per_step // accelerator.num_processes
    return workers.choose(
        recipe.workers,
        trained,
        rows=own,
        tokens=own * rows.train.counts.tokens // max(1, len(rows.train.rows)),
        device=accelerator.device.type,
        threads=torch.get_num_threads(),
    )


def load_base(recipe: Recipe, device: str, *, learns: bool = False) -> models.Base:
    """The recipe's base with its new tokens, as training, evaluation and chat all see it.

    Args:
        recipe: Which.
        device: Where it goes.
        learns: It is about to be trained: a base that learns whole comes in float32 from its
            files, and `dtype` of the result is still the format of the products.

    Raises:
        UserError: The base cannot be had.
    """
    whole = learns and recipe.method == "full" and recipe.last_layers is None
    if learns:
        require_trainable(recipe)
    base = models.load(
        recipe.model_name_or_path,
        revision=recipe.revision,
        dtype="float32" if whole else recipe.compute_dtype,
        attn_implementation=recipe.attn_implementation,
        trust_remote_code=recipe.trust_remote_code,
        device=device,
        load_in_4bit=recipe.load_in_4bit,
        load_in_8bit=recipe.load_in_8bit,
        bnb_4bit_quant_type=recipe.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=recipe.bnb_4bit_use_double_quant,
        build=streaming.builder(recipe, device, [_spec(own) for own in recipe.cohort()], learns),
    )
    if learns:
        require_gradients(base.name, base.model)
    if whole:
        base = replace(base, dtype=choose_dtype(recipe.dtype, device))
    add_tokens(base.model, base.tokenizer, recipe.added_tokens)
    return base


def tokenizer_of(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer that `load_base` would give, without the base.

    Raises:
        UserError: It cannot be had.
    """
    tokenizer: PreTrainedTokenizerBase = models.load_tokenizer(
        recipe.model_name_or_path,
        revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
    )
    new_tokens(tokenizer, recipe.added_tokens)
    return tokenizer


def add_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]
) -> None:
    """Give the base new special tokens; they start as the mean of the embeddings.

    Without any it stays as it is: a tokenizer that knows more tokens than its model is not asked
    for them (`Limits.check_ids`).
    """
    if not tokens:
        return
    new_tokens(tokenizer, tokens)
    size = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    if len(tokenizer) > size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for layer in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
                weight: torch.Tensor = layer.weight
                weight[size:] = weight[:size].float().mean(0).to(weight.dtype)
        model.requires_grad_(False)


def new_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Give the tokenizer alone new special tokens."""
    if tokens:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": list(tokens)}, replace_extra_special_tokens=False
        )


def _spec(own: AdapterOptions) -> AdapterSpec:
    targets = own.lora_target_modules
    return AdapterSpec(
        name=own.name,
        r=own.lora_r,
        alpha=own.lora_alpha,
        dropout=own.lora_dropout,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        use_rslora=own.use_rslora,
        init_lora_weights=own.init_lora_weights,
        modules_to_save=tuple(own.modules_to_save or ()),
        rank_pattern=dict(own.rank_pattern),
        alpha_pattern=dict(own.alpha_pattern),
        seed=own.seed,
        use_dora=own.use_dora,
        peft=own.peft,
    )


def _whole(own: AdapterOptions) -> bool:
    """Whether the adapter trains anything that might be the embedding."""
    inside = own.peft or {}
    return bool(
        own.modules_to_save
        or inside.get("modules_to_save")
        or inside.get("peft_type") == "TRAINABLE_TOKENS"
        or inside.get("trainable_token_indices")
    )


def _member(
    own: AdapterOptions, recipe: Recipe, trained: Trained, strategy: Strategy, total_steps: int,
    optim: str,
) -> AdapterOptimizer:  # fmt: skip
    settings = AdapterOptimizerSettings(
        learning_rate=own.learning_rate,
        lr_scheduler_type=recipe.lr_scheduler_type,
        warmup=warmup_length(total_steps, recipe.warmup_ratio, recipe.warmup_steps),
        total_steps=total_steps,
        weight_decay=recipe.weight_decay,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        epsilon=recipe.adam_epsilon,
        max_grad_norm=recipe.max_grad_norm,
        seed=own.seed,
        early_stopping_patience=recipe.early_stopping_patience,
        early_stopping_threshold=recipe.early_stopping_threshold,
        optim=optim,
        loraplus_lr_ratio=own.loraplus_lr_ratio,
    )
    undecayed = trained.undecayed(own.name)
    parameters = trained.parameters(own.name)
    return AdapterOptimizer(
        own.name, parameters, settings, undecayed=undecayed, learning=strategy.learning(parameters)
    )
