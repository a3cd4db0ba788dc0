"""The settings of a recipe, each declared once: name, type, default, bounds and help.

Names and meanings are those of transformers, TRL and PEFT. Flags, `--help`, the JSON schema and
the saved `recipe.yaml` all come from here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from lighten.recipe.evaluating import EvaluateOptions
from lighten.recipe.schedules import Parameters, Schedule
from lighten.recipe.section import (
    LORA_LEARNING_RATE,
    DataSets,
    Duration,
    Every,
    ModulePattern,
    Names,
    Positive,
    Rate,
    Section,
    Seed,
    Share,
    ShareOrCount,
    StepsOrShare,
    Targets,
    listed,
    listed_names,
    told_by_pattern,
)
from lighten.recipe.sweeping import SweepOptions

AdapterName = Annotated[
    str,
    Field(max_length=80),
    *told_by_pattern(
        r"\w[\w.=-]*", "letters, digits, _, ., = and -, beginning with a letter, digit or _"
    ),
]
# `lighten.quantization.targets` knows which of llama.cpp's types there are.
QuantizedFormat = Annotated[
    str,
    *told_by_pattern(
        r"int8|int8:torchao|int8:bitsandbytes|nf4|int4|int4:rounded|int8-dynamic-act-int4-weight|"
        r"gguf(:\w+)?",
        "int8, int8:bitsandbytes, nf4, int4, int4:rounded, int8-dynamic-act-int4-weight or "
        "gguf:TYPE (gguf:q4_k_m)",
    ),
]
# Initial weights that need no steps over the data; names of PEFT.
Init = (
    Annotated[
        str,
        *told_by_pattern(
            r"gaussian|orthogonal|olora|pissa(_niter_[1-9][0-9]*)?",
            "true, false, gaussian, orthogonal, olora, pissa or pissa_niter_N",
        ),
    ]
    | bool
)
LastLayers = Annotated[str, *told_by_pattern(r"last_[1-9][0-9]*", "last_N, such as last_2")]
# Columns that rows are recognised by; `lighten.data.shapes` reads them.
COLUMNS = (
    "instruction", "input", "output", "history", "prompt", "completion", "input_ids", "labels",
    "attention_mask", "messages", "conversations", "text", "system", "tools",
)  # fmt: skip
Tracker = Literal["wandb", "tensorboard", "trackio"]
Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit",
    "paged_adamw_32bit", "lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit", "sgd",
    "adafactor",
]  # fmt: skip


class QuantizeOptions(Section):
    """Which smaller copies `lighten run` writes after training; `lighten quantize` has its own."""

    to: list[QuantizedFormat] = Field(
        [],
        description="formats: int8, nf4, int4, int4:rounded, int8-dynamic-act-int4-weight, "
        "gguf:q8_0, gguf:q4_k_m, ...",
    )
    tokens: Annotated[int, Field(ge=16)] = Field(
        2048, description="held-out tokens that each is measured on at most"
    )
    questions: Annotated[int, Field(ge=0)] = Field(
        16, description="held-out questions that each answers at most"
    )

    @field_validator("to", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return listed(value)


class AdapterFields(Section):
    """The settings that may differ between the adapters of one cohort, all optional."""

    lora_r: Positive | None = Field(None, description="rank")
    lora_alpha: Rate | None = Field(None, description="scale numerator; default 2 x rank")
    lora_dropout: Share | None = Field(None, description="dropout before A")
    lora_target_modules: Targets | None = Field(None, description="modules to adapt")
    use_rslora: bool | None = Field(None, description="scale by alpha / sqrt(r)")
    use_dora: bool | None = Field(None, description="learn magnitudes too")
    init_lora_weights: Init | None = Field(None, description="start")
    modules_to_save: Names | None = Field(None, description="modules trained whole")
    rank_pattern: dict[ModulePattern, Positive] | None = Field(
        None, description="rank by module pattern"
    )
    alpha_pattern: dict[ModulePattern, Rate] | None = Field(
        None, description="alpha by module pattern"
    )
    learning_rate: Rate | None = Field(None, description="peak learning rate")
    loraplus_lr_ratio: Rate | None = Field(None, description="LoRA+: rate of B over rate of A")
    seed: Seed | None = Field(None, description="seed of order, weights and dropout")


class AdapterEntry(AdapterFields):
    """One entry of `adapters:`; what it leaves out comes from the recipe's own fields."""

    name: AdapterName = Field(description="folder name of the adapter")


class AdapterOptions(Section):
    """One adapter of the cohort with every setting filled in."""

    name: str
    lora_r: int
    lora_alpha: float
    lora_dropout: float
    lora_target_modules: str | list[str]
    use_rslora: bool
    use_dora: bool
    init_lora_weights: bool | str
    modules_to_save: list[str] | None
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    learning_rate: float
    loraplus_lr_ratio: float | None
    seed: int
    peft: dict[str, Any] | None = None


def _field(default: Any, section: str, text: str, **bounds: Any) -> Any:
    return Field(default, description=text, json_schema_extra={"section": section}, **bounds)


class RecipeFields(Section):
    """Every setting of a recipe with its default."""

    model_name_or_path: str = _field(
        ..., "model", "hub id, local folder, GGUF file or packaged model (see: lighten models)"
    )
    revision: str | None = _field(None, "model", "branch, tag or commit of a hub model")
    trust_remote_code: bool = _field(False, "model", "run Python code that comes with the model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _field(
        "auto", "model", "format of the frozen base; auto asks the machine"
    )
    load_in_4bit: bool = _field(False, "model", "store the base's linear layers in 4 bits (QLoRA)")
    load_in_8bit: bool = _field(False, "model", "store the base's linear layers in 8 bits")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = _field("nf4", "model", "which 4 bits")
    bnb_4bit_use_double_quant: bool = _field(
        False, "model", "quantise the scales of the 4 bits too"
    )
    bnb_4bit_compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _field(
        "auto", "model", "dtype by the name that QLoRA recipes use"
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = (
        _field("sdpa", "model", "attention kernel")
    )
    chat_template: str | None = _field(
        None, "model", "chatml, alpaca, plain, a .jinja file or its text; default: the model's own"
    )
    added_tokens: list[str] = _field(
        [], "model", "new special tokens (name the embedding in modules_to_save to train them)"
    )

    dataset: DataSets = _field(
        ...,
        "data",
        "file, folder or hub id of training examples, or a list of these; name#500 takes 500",
    )
    eval_dataset: DataSets | None = _field(None, "data", "held-out examples")
    dataset_columns: dict[str, str] = _field(
        {},
        "data",
        "our name to the data's name for columns called otherwise: "
        "{instruction: question, output: response}",
    )
    val_size: ShareOrCount = _field(
        0.05,
        "data",
        "share (below 1; at least 20 examples, or a fifth of the data) or number of examples held "
        "out where none are given; 0 for none",
    )
    max_length: Annotated[int, Field(ge=2)] = _field(1024, "data", "longest example, in tokens")
    truncation_strategy: Literal["truncate", "drop", "raise"] = _field(
        "truncate", "data", "what happens to a longer one"
    )
    assistant_only_loss: bool = _field(
        True, "data", "in conversations, learn the assistant's turns only"
    )
    completion_only_loss: bool = _field(
        True, "data", "in prompt-completion pairs, learn the completion only"
    )
    system_role: Literal["keep", "fold", "drop"] | None = _field(
        None,
        "data",
        "system messages: keep leaves them to the chat template, fold puts them at the beginning "
        "of the next user turn, drop leaves them out; default: fold where the template takes none",
    )
    thinking: Literal["keep", "drop"] | None = _field(
        None,
        "data",
        "thoughts in answers (<think>): keep writes those that the chat template cuts out back, "
        "drop removes all; default: as the template has it",
    )
    skip_bad_rows: bool = _field(False, "data", "go on without broken rows, and count them")
    max_train_samples: Positive | None = _field(None, "data", "training examples at most")
    max_eval_samples: Positive | None = _field(
        None, "data", "held-out examples at most, evenly spread"
    )

    method: Literal["lora", "full"] = _field(
        "lora", "training", "lora: adapters on a frozen base; full: the base's own weights"
    )
    trainable_layers: LastLayers | None = _field(
        None,
        "training",
        "last_N: train the last N decoder layers whole and nothing else (method: full)",
    )
    num_train_epochs: Rate = _field(1.0, "training", "passes over the data")
    max_steps: Positive | None = _field(None, "training", "optimiser steps, instead of epochs")
    max_time: Duration | None = _field(
        None,
        "training",
        "time for training, with its evaluations and checkpoints: 90s, 5m, 2h; the steps and the "
        "course of the learning rate are set from the measured speed of the first ones, up to "
        "num_train_epochs",
    )
    per_device_train_batch_size: Positive = _field(8, "training", "examples per micro-batch")
    gradient_accumulation_steps: Positive = _field(1, "training", "micro-batches per step")
    per_device_eval_batch_size: Positive = _field(8, "training", "held-out examples together")
    tokens_per_microbatch: Positive | Literal["auto"] | None = _field(
        "auto",
        "training",
        "cut micro-batches so that their tokens stay within this; auto: 1024 on a "
        "processor, 1536 in bfloat16 where it has AMX tiles",
    )
    workers: Positive | Literal["auto"] = _field(
        "auto",
        "training",
        "micro-batches that a processor trains side by side, each on its own cores; auto: as many "
        "as a step's tokens fill",
    )
    packing: bool | Literal["auto"] = _field(
        "auto",
        "training",
        "rows behind each other without padding, each attending to itself alone; auto: where the "
        "attention can; a batch counts rows either way, not filled blocks",
    )
    group_by_length: bool = _field(True, "training", "bring examples of like length together")
    learning_rate: Rate | list[Rate] = _field(
        LORA_LEARNING_RATE, "training", "peak learning rate; with method: full 2e-5 unless given"
    )
    lr_scheduler_type: Schedule = _field("linear", "training", "course of the learning rate")
    lr_scheduler_kwargs: Parameters = _field(
        {},
        "training",
        "parameters of the course, by transformers' names: {min_lr_rate: 0.1} of "
        "cosine_with_min_lr, {num_decay_steps: 0.2} of warmup_stable_decay",
    )
    warmup_ratio: Share = _field(0.03, "training", "share of the steps that warm up")
    warmup_steps: StepsOrShare | None = _field(
        None, "training", "steps that warm up, or below 1 their share; instead of warmup_ratio"
    )
    weight_decay: Annotated[float, Field(ge=0.0)] = _field(
        0.0, "training", "weight decay; biases and norms have none"
    )
    optim: Optimizer = _field("adamw_torch", "training", "optimiser, by transformers' name")
    adam_beta1: Share = _field(0.9, "training", "first decay of AdamW and Lion")
    adam_beta2: Share = _field(0.999, "training", "second decay of AdamW and Lion")
    adam_epsilon: Rate = _field(1e-8, "training", "AdamW's epsilon")
    max_grad_norm: Rate | None = _field(
        1.0, "training", "clip each adapter's gradient; null or 0: off"
    )
    gradient_checkpointing: bool = _field(
        False, "training", "recompute layers in the backward pass: less memory, more time"
    )
    gradient_checkpointing_layers: Positive = _field(
        1, "training", "recompute every so many-th layer only; 1: each"
    )
    gradient_checkpointing_part: Literal["layer", "attention", "mlp"] = _field(
        "layer", "training", "what of a layer is recomputed"
    )
    gradient_checkpointing_kwargs: dict[str, Any] = _field(
        {}, "training", "use_reentrant (false only), preserve_rng_state, determinism_check"
    )
    activation_offload: bool = _field(
        False,
        "training",
        "activations wait in pinned main memory (GPU) or in a scratch file (processor)",
    )
    offload_base: Literal["none", "cpu", "disk"] = _field(
        "none",
        "training",
        "where the frozen layers wait: disk streams them from the model's files, cpu from main "
        "memory to a GPU, each while the one before computes; a few are in memory at a time",
    )
    offload_optimizer: Literal["none", "cpu", "nvme"] = _field(
        "none",
        "training",
        "where AdamW's state waits: cpu in main memory beside a GPU, nvme in a file on a disk; it "
        "is brought and moved piece by piece",
    )
    offload_params: Literal["none", "cpu", "nvme"] = _field(
        "none",
        "training",
        "where a rank's part of weights that learn with zero3 or fsdp waits, or one process's all: "
        "cpu in main memory beside a GPU, with gradients and AdamW's state; nvme in a file",
    )
    nvme_path: str | None = _field(
        None, "training", "folder on the disk for what is offloaded; null: the run's own folder"
    )
    strategy: Literal["auto", "single", "ddp", "fsdp", "zero1", "zero2", "zero3"] = _field(
        "auto",
        "training",
        "what each of several ranks holds: ddp everything; zero1 its part of the optimiser's "
        "state, zero2 of gradients too, zero3 and fsdp of weights too; auto: single or ddp",
    )
    torch_compile: bool | Literal["auto"] = _field(
        "auto",
        "training",
        "compile one decoder layer for all of them; auto: where the run is long enough to gain",
    )
    qat: Literal["int8-dynamic-act-int4-weight"] | None = _field(
        None,
        "training",
        "quantisation-aware: layers learn as they will compute with 8-bit activations and 4-bit "
        "weights (torchao's and ExecuTorch's 8da4w)",
    )
    qat_group_size: Annotated[int, Field(ge=32, multiple_of=32)] = _field(
        32, "training", "weights of a row that share a scale, a multiple of 32"
    )
    seed: Seed | list[Seed] = _field(42, "training", "seed of order, weights and dropout")

    logging_steps: Every = _field(
        1, "run", "steps between lines to the trackers, or below 1 their share of all steps"
    )
    eval_steps: Every | None = _field(
        None, "run", "steps between evaluations, or below 1 their share of all; null: an epoch"
    )
    save_steps: Every | None = _field(
        None, "run", "steps between checkpoints, or below 1 their share of all; null: an epoch"
    )
    save_every: Duration | None = _field(
        "10m", "run", "time between checkpoints beside those of save_steps: 90s, 10m; null: off"
    )
    save_total_limit: Positive | None = _field(2, "run", "checkpoints kept; null: all")
    early_stopping_patience: Positive | None = _field(
        None, "run", "evaluations in a row without gain that stop an adapter"
    )
    early_stopping_threshold: Annotated[float, Field(ge=0.0)] = _field(
        0.0, "run", "held-out loss that counts as gain"
    )
    load_best_model_at_end: bool = _field(
        False, "run", "end with the adapter of the lowest held-out loss"
    )
    report_to: list[Tracker] = _field([], "run", "none, wandb, tensorboard, trackio")
    output_dir: str | None = _field(None, "run", "the run's folder; default runs/<name>")

    adapter_name_or_path: str | None = _field(
        None,
        "lora",
        "train on from this adapter (folder, run, checkpoint or hub id); it says rank and targets",
    )
    lora_r: Positive | list[Positive] = _field(8, "lora", "rank; a list trains a cohort")
    lora_alpha: Rate | list[Rate] | None = _field(None, "lora", "scale numerator; default 2 x rank")
    lora_dropout: Share | list[Share] = _field(0.0, "lora", "dropout before A")
    lora_target_modules: Targets = _field(
        "all-linear", "lora", "all-linear, attention, mlp, module names or a regular expression"
    )
    loraplus_lr_ratio: Rate | None = _field(
        None, "lora", "LoRA+: B learns at this many times the learning rate (the paper: 16)"
    )
    use_rslora: bool = _field(False, "lora", "scale by alpha / sqrt(r)")
    use_dora: bool = _field(False, "lora", "DoRA: learn magnitudes too, with PEFT's own modules")
    init_lora_weights: Init = _field(
        True,
        "lora",
        "true: PEFT's default; gaussian, orthogonal, pissa, pissa_niter_N, olora; false: random, "
        "for tests",
    )
    modules_to_save: Names | None = _field(None, "lora", "modules trained as whole copies")
    rank_pattern: dict[ModulePattern, Positive] = _field({}, "lora", "rank by module-name pattern")
    alpha_pattern: dict[ModulePattern, Rate] = _field({}, "lora", "alpha by module-name pattern")
    adapters: list[AdapterEntry] | None = _field(
        None, "lora", "a cohort spelled out: a name and what differs, per adapter"
    )

    peft: dict[str, Any] | None = _field(
        None,
        "lora",
        "another PEFT method in place of LoRA: its peft_type (IA3, PREFIX_TUNING, VERA, ...) and "
        "settings, by PEFT's names",
    )

    evaluate: EvaluateOptions = _field(
        EvaluateOptions(), "evaluate", "what lighten evaluate measures"
    )
    quantize: QuantizeOptions = _field(
        QuantizeOptions(), "quantize", "which smaller copies lighten run writes after training"
    )
    sweep: SweepOptions = _field(
        SweepOptions(), "sweep", "what lighten sweep tries: a list or a range per swept setting"
    )

    @field_validator("max_grad_norm", mode="before")
    @classmethod
    def _unclipped(cls, value: Any) -> Any:
        """As in transformers, TRL and DeepSpeed."""
        return None if str(value).strip() in ("0", "0.0") else value

    @field_validator("report_to", mode="before")
    @classmethod
    def _trackers(cls, value: Any) -> Any:
        return listed_names(value)

    @field_validator("dataset_columns")
    @classmethod
    def _columns(cls, value: dict[str, str]) -> dict[str, str]:
        for name, column in value.items():
            if name not in COLUMNS:
                hint = f"; write {column}: {name}" if column in COLUMNS else ""
                raise ValueError(f"{name} is not one of {', '.join(COLUMNS)}{hint}")
        if len(set(value.values())) < len(value):
            raise ValueError("two of them name the same column; each needs its own")
        return value

    @field_validator("gradient_checkpointing_kwargs")
    @classmethod
    def _never_reentrant(cls, value: dict[str, Any]) -> dict[str, Any]:
        if value.get("use_reentrant"):
            raise ValueError(
                "use use_reentrant: false; the reentrant form gives adapters on a frozen base no "
                "gradient, and fails under DDP"
            )
        allowed = {
            "use_reentrant": (False,), "preserve_rng_state": (True, False),
            "determinism_check": ("default", "none"),
        }  # fmt: skip
        for name, choice in value.items():
            if name not in allowed:
                raise ValueError(f"{name} is not one of {', '.join(allowed)}")
            if choice not in allowed[name]:
                raise ValueError(f"{name} must be {' or '.join(map(str, allowed[name]))}")
        return value


def lora_settings() -> tuple[str, ...]:
    """The settings of adapters alone, which the base's own weights have no use for."""
    return tuple(
        name
        for name, field in RecipeFields.model_fields.items()
        if isinstance(field.json_schema_extra, dict)
        and field.json_schema_extra["section"] == "lora"
    )
