"""Everything a run needs before its first step: base, rows, cohort, members, loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lighten import data, models
from lighten.adapters import AdapterSpec, Cohort, attach
from lighten.data import Encoded, TemplateChoice
from lighten.errors import UserError
from lighten.hardware import Choice
from lighten.models import attention
from lighten.recipe import AdapterOptions, Recipe
from lighten.train.loss import Objective
from lighten.train.member import Member, MemberSettings
from lighten.train.memory import checkpoint_layers
from lighten.train.schedule import warmup_length

# Matrix products of this many rows reach a processor's full rate (benchmarks/limit.py).
CPU_TOKENS = 1024


@dataclass
class Rows:
    """The encoded data of a run.

    Attributes:
        train: What is trained on.
        held_out: What the loss is watched on, or None.
        template: The chat template and why it was taken.
        facts: What `run.json` keeps of the data.
    """

    train: Encoded
    held_out: Encoded | None
    template: TemplateChoice
    facts: dict[str, Any]


@dataclass
class Setup:
    """A run ready for its first step.

    Attributes:
        recipe: What is wanted.
        base: The loaded base.
        rows: The encoded data.
        cohort: The adapters on the base.
        members: The adapters with their optimisers.
        objective: The loss.
        accelerator: Device and ranks.
        scaler: For float16; does nothing otherwise.
        examples_per_step: Rows of one optimiser step, over all ranks.
        steps_per_epoch: Optimiser steps of one pass over the data.
        total_steps: Of the whole run.
        tokens_per_microbatch: Tokens of one micro-batch at most, padding included.
        choices: What was chosen for this machine, with reasons.
    """

    recipe: Recipe
    base: models.Base
    rows: Rows
    cohort: Cohort
    members: list[Member]
    objective: Objective
    accelerator: Accelerator
    scaler: torch.amp.GradScaler
    examples_per_step: int
    steps_per_epoch: int
    total_steps: int
    tokens_per_microbatch: int | None = None
    choices: dict[str, Choice] = field(default_factory=dict)


def prepare(recipe: Recipe, accelerator: Accelerator, base: models.Base, rows: Rows) -> Setup:
    """Attach the cohort and make optimisers and loss.

    Raises:
        UserError: The recipe does not fit the model.
    """
    options = recipe.cohort()
    cohort = attach(base.model, [_spec(own) for own in options])
    if recipe.gradient_checkpointing and cohort.no_checkpointing is not None:
        raise UserError(f"gradient_checkpointing: {cohort.no_checkpointing}; set it to false")
    choices = {
        "dtype": base.dtype,
        "attention": base.attention,
        "template": Choice(rows.template.name, rows.template.reason),
    }
    if recipe.added_tokens and not all(_whole(own) for own in options):
        choices["added_tokens"] = Choice(
            "untrained", "modules_to_save does not name the embedding, so they stay as they began"
        )
    if recipe.gradient_checkpointing:
        layers = checkpoint_layers(base.model)
        choices["checkpointing"] = Choice(f"{layers} layers", "gradient_checkpointing")
    per_step = (
        recipe.per_device_train_batch_size
        * recipe.gradient_accumulation_steps
        * accelerator.num_processes
    )
    steps_per_epoch = math.ceil(len(rows.train.rows) / per_step)
    total = recipe.max_steps or math.ceil(recipe.num_train_epochs * steps_per_epoch)
    members = [_member(own, recipe, cohort, total) for own in options]
    device = accelerator.device.type
    scaler = torch.amp.GradScaler(device, enabled=cohort.dtype == torch.float16)
    choices["packing"] = packing = choose_packing(recipe.packing, base.model, cohort.no_packing)
    tokens, why = choose_tokens(recipe.tokens_per_microbatch, device)
    choices["micro-batch"] = Choice(f"{tokens} tokens" if tokens else "rows", why)
    objective = Objective(
        base.model, cohort, fast=cohort.supports_fast_loss, packs=packing.value == "on"
    )
    if not cohort.supports_fast_loss:
        objective.reason = "the head learns inside PEFT's own module"
    objective.packing_reason = cohort.no_packing or objective.packing_reason
    return Setup(
        recipe, base, rows, cohort, members, objective, accelerator, scaler,
        per_step, steps_per_epoch, total, tokens, choices,
    )  # fmt: skip


def choose_packing(
    wanted: bool | str, model: PreTrainedModel, hindered: str | None = None
) -> Choice:
    """Whether rows stand behind each other in a micro-batch, and why.

    Args:
        wanted: The recipe's `packing`.
        model: The base.
        hindered: Why what learns cannot be packed, or None.

    Raises:
        UserError: It is wanted and the attention would look across rows.
    """
    name = str(model.config._attn_implementation)
    if wanted is False:
        return Choice("off", "packing of the recipe")
    if hindered is not None:
        if wanted is True:
            raise UserError(f"packing: {hindered}; set it to false or auto")
        return Choice("off", hindered)
    if name in attention.PACKS:
        return Choice("on", f"{name} attention keeps packed rows apart")
    if wanted is True:
        raise UserError(
            f"packing: {name} attention would let rows look at each other; set packing to false, "
            f"or attn_implementation to one of {', '.join(sorted(attention.PACKS))}"
        )
    return Choice("off", f"{name} attention does not keep packed rows apart")


def choose_tokens(wanted: int | str | None, device: str) -> tuple[int | None, str]:
    """Tokens of one micro-batch at most (None: as many as its rows have), and why."""
    if isinstance(wanted, int):
        return wanted, "tokens_per_microbatch of the recipe"
    if wanted is None or device != "cpu":
        return None, "per_device_train_batch_size alone decides"
    return CPU_TOKENS, "it fills a processor's matrix products; more would only cost memory"


def load_base(recipe: Recipe, device: str) -> models.Base:
    """The recipe's base with its new tokens, as training, evaluation and chat all see it.

    Raises:
        UserError: The base cannot be had.
    """
    base = models.load(
        recipe.model_name_or_path,
        revision=recipe.revision,
        dtype=recipe.dtype,
        attn_implementation=recipe.attn_implementation,
        trust_remote_code=recipe.trust_remote_code,
        device=device,
    )
    add_tokens(base.model, base.tokenizer, recipe.added_tokens)
    return base


def add_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]
) -> None:
    """Give the base new special tokens; they start as the mean of the embeddings."""
    if tokens:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": list(tokens)}, replace_extra_special_tokens=False
        )
    size = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    if len(tokenizer) > size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for layer in {model.get_input_embeddings(), model.get_output_embeddings()} - {None}:
                weight: torch.Tensor = layer.weight
                weight[size:] = weight[:size].float().mean(0).to(weight.dtype)
        model.requires_grad_(False)


def load_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Read, split and encode the recipe's data.

    Raises:
        UserError: The data is broken, or holds nothing to learn from.
    """
    template = data.choose_template(tokenizer, recipe.chat_template)
    found = data.read(
        recipe.dataset, limit=recipe.max_train_samples, skip_bad_rows=recipe.skip_bad_rows
    )
    train, held_out = found.examples, _held_out(recipe)
    if held_out is None and recipe.val_size and len(train) > 1:
        train, held_out = data.split(train, recipe.val_size)
    if recipe.max_eval_samples is not None and held_out is not None:
        held_out = held_out[: recipe.max_eval_samples]
    how: dict[str, Any] = {
        "max_length": recipe.max_length,
        "truncation_strategy": recipe.truncation_strategy,
        "assistant_only_loss": recipe.assistant_only_loss,
        "completion_only_loss": recipe.completion_only_loss,
    }
    encoded = data.encode(train, tokenizer, **how)
    watched = data.encode(held_out, tokenizer, **how) if held_out else None
    facts = {
        "path": str(found.path),
        "sha256": found.sha256,
        "format": found.format,
        "train_rows": len(encoded.rows),
        "eval_rows": len(watched.rows) if watched else 0,
        "tokens": encoded.counts.tokens,
        "supervised_tokens": encoded.counts.supervised_tokens,
        "eval_supervised_tokens": watched.counts.supervised_tokens if watched else 0,
        "truncated": encoded.counts.truncated,
        "dropped": encoded.counts.dropped,
        "lost_supervised_tokens": encoded.counts.lost_supervised_tokens,
        "bad_rows": len(found.bad_rows),
        "template": {"name": template.name, "reason": template.reason},
    }
    return Rows(encoded, watched, template, facts)


def _held_out(recipe: Recipe) -> list[data.Example] | None:
    if recipe.eval_dataset is not None:
        source = recipe.eval_dataset
    elif data.has_split(recipe.dataset, "valid"):
        source = recipe.dataset
    else:
        return None
    return data.read(source, split="valid", skip_bad_rows=recipe.skip_bad_rows).examples


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


def _member(own: AdapterOptions, recipe: Recipe, cohort: Cohort, total_steps: int) -> Member:
    settings = MemberSettings(
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
    )
    return Member(own.name, cohort.parameters(own.name), settings)
