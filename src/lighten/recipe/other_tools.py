"""Settings of transformers, TRL, LLaMA-Factory and Axolotl that are none here.

A recipe that comes from there runs if all it says is so here too; what is not so is told, with what
to write in its place. None is dropped silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# How the work is done, shown or logged: no result depends on them.
PASSED_OVER = frozenset((
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order",
    "preprocessing_num_workers", "preprocessing_batch_size", "dataset_num_proc",
    "dataset_processes", "dataset_prepared_path", "overwrite_cache", "remove_unused_columns",
    "ddp_timeout", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
    "ddp_static_graph", "ddp_backend", "local_rank", "disable_tqdm", "log_level",
    "log_level_replica", "log_on_each_node", "logging_nan_inf_filter", "logging_first_step",
    "skip_memory_metrics", "include_tokens_per_second", "include_num_input_tokens_seen",
    "include_effective_tokens_per_second", "torch_empty_cache_steps", "prediction_loss_only",
    "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object",
    "batch_eval_metrics", "label_names", "length_column_name", "plot_loss",
    "use_cache", "pad_to_multiple_of", "pad_to_sequence_len", "lora_mlp_kernel", "lora_qkv_kernel",
    "lora_o_kernel", "pad_token",
))  # fmt: skip
# What is so here anyway if they have one of these values: where memory runs out, micro-batches are
# halved; each epoch has an order of its own.
_ALREADY = {
    "do_train": ("true",), "do_eval": ("true",), "stage": ("sft",), "use_peft": ("true",),
    "metric_for_best_model": ("loss", "eval_loss"), "greater_is_better": ("false",),
    "dataset_text_field": ("text",), "dataset_train_split": ("train",),
    "lora_task_type": ("causal_lm",), "task_type": ("causal_lm",), "bias": ("none",),
    "lora_bias": ("none", "false"), "bnb_4bit_quant_storage": ("uint8",),
    "save_safetensors": ("true",), "auto_find_batch_size": ("true", "false"), "data_seed": (),
    "average_tokens_across_devices": ("true",), "loss_type": ("nll", "chunked_nll"),
    "evals_per_epoch": ("1",), "saves_per_epoch": ("1",), "roles_to_train": ("['assistant']",),
    "train_on_eos": ("turn",), "shuffle_dataset": ("true", "false"),
    "truncation_mode": ("keep_start",), "hub_strategy": ("every_save",),
    "fsdp_version": ("1", "2"), "fsdp_final_state_dict_type": ("full_state_dict",),
}  # fmt: skip
_OFF = ("none", "false", "no", "off", "0", "0.0", "", "[]", "{}")
_UPLOAD = "remove it; lighten push uploads what lighten export writes"
_TRACKER = "remove it; trackers read their environment variables, such as WANDB_PROJECT"
_MODEL_SAYS = "remove it; the model's own files say it"
_TEXT_ONLY = "remove it; models of text are what is trained here"
_NOT_BUILT = "it is not built, remove it"
_ROW_BY_ROW = "remove it; files are read row by row"
_BOTH_PACKED = "remove it; packing is for training and evaluation"
_SMALL_LOGITS = "remove it; the loss holds a part of the logits at a time here anyway"
_BY_RESUME = "remove it; --resume goes on from the newest checkpoint"
_LOWEST_LOSS = "remove it; the best has the lowest validation loss"
_CHECKPOINT_WHOLE = "remove it; a checkpoint has what resuming needs"
_IN_DTYPE = "remove it; evaluation computes in dtype"
_COMPILED_LAYER = "remove it; torch_compile: true compiles a decoder layer"
_BY_STRATEGY = "remove it; strategy says what ranks hold"
_NEXT_TOKEN = "remove it; what is trained predicts the next token"
_NO_BIAS = "remove it; biases are not trained beside LoRA"
_BY_PATTERN = "set lora_target_modules to a regular expression over the modules' paths"
_SPLITS = (
    "set dataset to the file itself, or to owner/name/FOLDER of the hub; name#500 takes the first "
    "500 rows"
)
_MIXED = "set dataset to a list: [owner/name, other.jsonl#5000], with as many rows as # says"
_SYSTEM_ROWS = "remove it, and give rows a system message, or a column system"
_BY_TEMPLATE = "remove it; the chat template says where answers are"
_BY_RAY = "remove it; sweep.executor: ray spreads a sweep"
_OTHER_METHODS = (
    "remove it; examples are what is learnt from, by their columns (messages, prompt and "
    "completion, text): preferences and rewards are not built"
)
# What to write in their place; switched off, they ask for nothing.
_INSTEAD = {
    "do_train": "remove it; lighten train trains",
    "do_eval": "remove it, or set val_size: 0 where nothing is to be held out",
    "do_predict": "remove it; lighten evaluate answers what training never saw",
    "predict_with_generate": "remove it; lighten evaluate generates answers",
    "stage": _OTHER_METHODS, "rl": _OTHER_METHODS, "pref_loss": _OTHER_METHODS,
    "pref_beta": _OTHER_METHODS, "reward_model": _OTHER_METHODS,
    "overwrite_output_dir": "remove it; no run is written over: name another output_dir",
    "resume_from_checkpoint": _BY_RESUME,
    "auto_resume_from_checkpoints": _BY_RESUME,
    "ignore_data_skip": "remove it; a resumed run goes on with the rows that it has not seen",
    "metric_for_best_model": _LOWEST_LOSS,
    "greater_is_better": _LOWEST_LOSS,
    "compute_accuracy": "remove it; lighten evaluate has exact_match and evaluate.extra_metrics",
    "include_for_metrics": "remove it; evaluate.extra_metrics takes metrics of yours",
    "eval_delay": "remove it; eval_steps says how often",
    "eval_on_start": "remove it; lighten evaluate compares with the base as it was",
    "evals_per_epoch": "set eval_steps, or remove it for one an epoch",
    "saves_per_epoch": "set save_steps, or remove it for one an epoch",
    "save_on_each_node": "remove it; the first rank writes",
    "save_only_model": _CHECKPOINT_WHOLE,
    "save_safetensors": "remove it; tensors are written as safetensors alone",
    "enable_jit_checkpoint": "remove it; save_every writes checkpoints by time",
    "restore_callback_states_from_checkpoint": _CHECKPOINT_WHOLE,
    "push_to_hub": _UPLOAD, "hub_model_id": _UPLOAD, "hub_token": _UPLOAD,
    "hub_private_repo": _UPLOAD, "hub_strategy": _UPLOAD, "hub_always_push": _UPLOAD,
    "hub_revision": _UPLOAD, "export_hub_model_id": _UPLOAD,
    "run_name": "remove it; a run is called as the folder that output_dir names",
    "logging_dir": "remove it; what is logged goes into output_dir",
    "project": _TRACKER, "trackio_space_id": _TRACKER, "trackio_bucket_id": _TRACKER,
    "trackio_static_space_id": _TRACKER, "wandb_project": _TRACKER, "wandb_entity": _TRACKER,
    "wandb_name": _TRACKER, "wandb_run_id": _TRACKER, "wandb_watch": _TRACKER,
    "wandb_log_model": _TRACKER, "use_wandb": "set report_to: wandb",
    "data_seed": "set seed, which orders the rows too",
    "full_determinism": "remove it; seed fixes order, weights and dropout",
    "use_cpu": "remove it, and set LIGHTEN_DEVICE=cpu in the environment",
    "no_cuda": "remove it, and set LIGHTEN_DEVICE=cpu in the environment",
    "device": "by default a GPU is used where there is one; another choice is LIGHTEN_DEVICE=cpu "
              "or cuda:1 in the environment",
    "use_mps_device": "remove it, and set LIGHTEN_DEVICE=mps in the environment",
    "tf32": "remove it; dtype: bfloat16 is the fast format",
    "bf16_full_eval": _IN_DTYPE,
    "fp16_full_eval": _IN_DTYPE,
    "pure_bf16": "set dtype: bfloat16; weights that learn stay float32 here all the same",
    "upcast_layernorm": _NOT_BUILT, "upcast_lmhead_output": _NOT_BUILT,
    "cosine_min_lr_ratio": "set lr_scheduler_type: cosine_with_min_lr and, with its number, "
    "lr_scheduler_kwargs: {min_lr_rate: 0.1}",
    "optim_args": "set adam_beta1, adam_beta2 and adam_epsilon",
    "optim_target_modules": _NOT_BUILT, "use_galore": _NOT_BUILT, "use_badam": _NOT_BUILT,
    "use_apollo": _NOT_BUILT, "use_llama_pro": _NOT_BUILT, "mixture_of_depths": _NOT_BUILT,
    "label_smoothing_factor": _NOT_BUILT, "neftune_noise_alpha": _NOT_BUILT,
    "noisy_embedding_alpha": _NOT_BUILT, "rope_scaling": _NOT_BUILT, "shift_attn": _NOT_BUILT,
    "s2_attention": _NOT_BUILT, "xformers_attention": "set attn_implementation: sdpa",
    "flex_attention": "set attn_implementation: sdpa", "plugins": _NOT_BUILT,
    "router_aux_loss_coef": _NOT_BUILT, "lora_target_parameters": _NOT_BUILT,
    "rope_theta": _MODEL_SAYS, "use_dft_loss": _NOT_BUILT,
    "layers_to_transform": _BY_PATTERN, "peft_layers_to_transform": _BY_PATTERN,
    "layers_pattern": _BY_PATTERN, "peft_layers_pattern": _BY_PATTERN,
    "test_datasets": "set eval_dataset",
    "unfrozen_parameters": "set method: full with trainable_layers: last_N",
    "use_liger_kernel": _SMALL_LOGITS, "liger_kernel_config": _SMALL_LOGITS,
    "use_unsloth": "remove it; what makes training light is built in",
    "torch_compile_backend": _COMPILED_LAYER,
    "torch_compile_mode": _COMPILED_LAYER,
    "accelerator_config": _BY_STRATEGY,
    "parallelism_config": _BY_STRATEGY,
    "fsdp_version": "set it to 1 or 2, or remove it",
    "fsdp_final_state_dict_type": "remove it; a finished model is written whole",
    "train_sampling_strategy": "set group_by_length: true or false",
    "dataloader_drop_last": "remove it; no row is left out",
    "average_tokens_across_devices": "remove it; every token of a step counts the same",
    "debug": "remove it", "dataset_kwargs": "remove it; dataset_columns names columns",
    "dataset_text_field": "set dataset_columns: {text: NAME}",
    "dataset_train_split": "set dataset to the file itself",
    "dataset_test_split": "set eval_dataset to the file itself",
    "dataset_streaming": _ROW_BY_ROW, "streaming": _ROW_BY_ROW,
    "buffer_size": "remove it; all rows are put in order by seed",
    "chat_template_jinja": "set chat_template to it",
    "template": "remove it, for the model's own template is used; or set chat_template",
    "mask_history": "remove it; every turn of the assistant is learnt",
    "roles_to_train": "remove it; the assistant's turns are learnt, but for those with train: "
                      "false in the row",
    "train_on_eos": "remove it; an assistant's turn is learnt with its end",
    "truncation_mode": "set truncation_strategy: truncate, drop or raise",
    "eval_packing": _BOTH_PACKED, "eval_sample_packing": _BOTH_PACKED,
    "loss_type": "remove it; the loss is that of the next token",
    "eos_token": _MODEL_SAYS, "model_type": _MODEL_SAYS,
    "tokenizer_type": _MODEL_SAYS, "special_tokens": "of them pad_token may stay; set "
    "added_tokens to what is new, and leave out what the tokenizer says",
    "tokens": "set added_tokens", "new_special_tokens": "set added_tokens",
    "resize_vocab": "remove it; added_tokens makes room for what is new",
    "model_init_kwargs": "set dtype, attn_implementation or revision by their own names",
    "bnb_4bit_quant_storage": _NOT_BUILT,
    "bnb_config_kwargs": "set bnb_4bit_use_double_quant, bnb_4bit_quant_type by their own names",
    "use_peft": "set method: full",
    "lora_task_type": _NEXT_TOKEN,
    "task_type": _NEXT_TOKEN,
    "bias": _NO_BIAS,
    "lora_bias": _NO_BIAS,
    "fan_in_fan_out": _MODEL_SAYS, "lora_fan_in_fan_out": _MODEL_SAYS,
    "pissa_init": "set init_lora_weights: pissa",
    "pissa_iter": "set init_lora_weights: pissa_niter_N",
    "create_new_adapter": "remove it; lighten export merges the first one",
    "export_dir": "remove it; lighten export writes artefacts",
    "export_quantization_bit": "remove it; lighten quantize RUN --to int4 is the command",
    "split": _SPLITS, "train_split": _SPLITS, "eval_split": _SPLITS, "dataset_split": _SPLITS,
    "dataset_splits": _SPLITS, "dataset_mixer": _MIXED, "dataset_mixture": _MIXED,
    "system": _SYSTEM_ROWS, "system_prompt": _SYSTEM_ROWS, "default_system": _SYSTEM_ROWS,
    "instruction_template": _BY_TEMPLATE, "response_template": _BY_TEMPLATE,
    "eval_table_size": "remove it; lighten report shows answers",
    "eval_max_new_tokens": "set evaluate: {max_new_tokens: N}",
    "full_finetuning": "set method: full", "loftq_config": _NOT_BUILT,
    "block_size": "set max_length", "mixed_precision": "set dtype",
    "validation_split_percentage": "set val_size to a share below 1",
    "media_dir": _TEXT_ONLY, "image_max_pixels": _TEXT_ONLY, "video_max_pixels": _TEXT_ONLY,
    "freeze_vision_tower": _TEXT_ONLY, "freeze_multi_modal_projector": _TEXT_ONLY,
    "ray_run_name": _BY_RAY,
    "ray_num_workers": _BY_RAY,
    "gpu_memory_limit": "remove it; lighten plan says what fits",
    "strict": "remove it; every setting is checked",
}  # fmt: skip
# Which of our settings each says the rhythm of.
RHYTHMS = {
    "eval_strategy": "eval_steps", "evaluation_strategy": "eval_steps",
    "save_strategy": "save_steps", "logging_strategy": "logging_steps",
}  # fmt: skip
NAMES = tuple(dict.fromkeys((*RHYTHMS, *sorted(PASSED_OVER), *_ALREADY, *_INSTEAD)))


def instead(name: str) -> str | None:
    """What to do in place of a setting of another tool's, if it is a known one."""
    return _INSTEAD.get(name)


def meaning(name: str) -> str | None:
    """What becomes of another tool's setting, if it is a known one that is none here."""
    if name in PASSED_OVER:
        return "a recipe may say it, and it changes nothing"
    return _INSTEAD.get(name)


def changes_nothing(name: str, value: Any) -> bool:
    """Whether it may be passed over: it moves no result, or says what is so here anyway."""
    word = str(value).strip().lower()
    if name == "special_tokens" and isinstance(value, Mapping):
        return all(changes_nothing(token, text) for token, text in value.items())
    if name in PASSED_OVER or word in _ALREADY.get(name, ()):
        return True
    if name in _ALREADY:
        return value is None
    return name in _INSTEAD and word in _OFF


def is_rhythm(name: str) -> bool:
    """Whether it says how often something is done: `eval_strategy: epoch`."""
    return name in RHYTHMS


def rhythm(
    name: str, value: Any, values: Mapping[str, Any], everything: Mapping[str, Any]
) -> dict[str, Any]:
    """Our settings for how often something is done.

    Args:
        name: Such as `eval_strategy`.
        value: `steps`, `epoch`, `no`, which YAML may have read as false, or `best`.
        values: The settings that it stands among.
        everything: Those that are said elsewhere too.

    Raises:
        ValueError: It asks for what is not the same here; says what to change.
    """
    steps, word = RHYTHMS[name], str(value).strip().lower()
    if value is None:
        return {}
    if word == "steps":
        if steps != "logging_steps" and everything.get(steps) is None:
            raise ValueError(f"{name}: steps needs {steps} beside it; add it")
        return {}
    if word == "epoch" and steps != "logging_steps":
        if values.get(steps) is not None:
            raise ValueError(f"{name}: epoch and {steps} contradict each other; keep one")
        return {steps: None}
    if word in ("no", "false") and steps == "eval_steps":
        for other in ("eval_dataset", "validation_file", "eval_steps"):
            if everything.get(other) is not None:
                raise ValueError(f"{name}: {value!r} and {other} contradict each other; keep one")
        return {"val_size": 0}
    raise ValueError(f"{name}: {value!r} has no equal here; " + {
        "eval_steps": "use steps, epoch or no",
        "save_steps": "use steps or epoch: a run resumes from its checkpoints, and "
                      "save_total_limit: 1 keeps the last alone (load_best_model_at_end: the best)",
        "logging_steps": "remove it: logging_steps says how often, and report_to where",
    }[steps])  # fmt: skip
