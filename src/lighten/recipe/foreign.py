"""Settings of DeepSpeed and FSDP as people have them, read as a strategy and settings of ours.

Only what means the same here is taken; anything else is told. How an engine moves its bytes
(buckets, overlap, prefetching) changes no result and is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lighten.recipe.places import json_in, within

_TRUE, _FALSE = ("true", "yes", "on", "1", "y", "t"), ("false", "no", "off", "0", "n", "f")
STAGES = {0: "ddp", 1: "zero1", 2: "zero2", 3: "zero3"}
# Words of transformers' `fsdp` and of accelerate's sharding strategies.
SHARDING = {
    "full_shard": "fsdp", "shard_grad_op": "zero2", "no_shard": "ddp",
    "1": "fsdp", "2": "zero2", "3": "ddp",
}  # fmt: skip
# What a DeepSpeed configuration says of logging, checks and how disks are read alone.
_QUIET = {
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "zero_allow_untested_optimizer",
    "dump_state", "zero_force_ds_cpu_optimizer", "communication_data_type", "prescale_gradients",
    "train_batch_size", "aio", "checkpoint", "flops_profiler", "comms_logger",
}  # fmt: skip
# ZeRO++ sends weights and gradients in fewer bits; ZenFlow moves some weights steps later.
_OTHER_RESULTS = ("zero_quantized_weights", "zero_quantized_nontrainable_weights",
                  "zero_quantized_gradients", "zeropp_loco_param", "zenflow")  # fmt: skip
# What `zero_optimization` says of buffers, order and files, most of stage 3 with its number before.
_MOVING = {
    "allgather_bucket_size", "allgather_partitions", "allgather_sequential", "contiguous_gradients",
    "cpu_offload_use_pin_memory", "elastic_checkpoint", "enable_sanity_checks",
    "gather_16bit_weights_on_model_save", "gather_fp16_weights_on_model_save",
    "ignore_unused_parameters", "leaf_module", "legacy_stage1", "load_from_fp32_weights",
    "log_trace_cache_warnings", "max_live_parameters", "max_reuse_distance",
    "memory_efficient_linear", "mics_hierarchical_params_gather", "mics_shard_size",
    "model_persistence_threshold", "module_granularity_threshold", "overlap_comm",
    "override_module_apply", "param_persistence_threshold", "partition_stream_chunk_size",
    "pipeline_loading_checkpoint", "prefetch_bucket_size", "reduce_bucket_size", "reduce_scatter",
    "round_robin_gradients", "save_muon_momentum_buffer_in_memory", "sub_group_size",
    "use_all_reduce_for_fetch_params", "use_multi_rank_bucket_allreduce", "zero_hpz_partition_size",
}  # fmt: skip
_EQUIVALENT = {
    "gradient_clipping": "max_grad_norm",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
}
_STEP = {"gradient_accumulation_steps", "per_device_train_batch_size"}
_OFFLOAD = {"offload_optimizer": "offload_optimizer", "offload_param": "offload_params"}
# DeepSpeed's older names: true means `cpu`.
_OLD_OFFLOAD = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_params"}
# ms-swift's names for a stage with its states in main memory.
_SHORT_OFFLOAD = {
    "zero2_offload": {"strategy": "zero2", "offload_optimizer": "cpu"},
    "zero3_offload": {"strategy": "zero3", "offload_optimizer": "cpu", "offload_params": "cpu"},
}
_OPTIMIZER = {"lr": "learning_rate", "eps": "adam_epsilon", "weight_decay": "weight_decay"}
# What is AdamW here as there only if it says so; which of DeepSpeed's kernels moves is passed over.
_ADAMW = {"adam_w_mode": True, "bias_correction": True, "amsgrad": False}
_KERNELS = {"torch_adam", "fused", "foreach", "set_grad_none", "fp32_optimizer_states"}
# DeepSpeed's schedulers (runtime/lr_schedules.py of 0.19.8), with a warm-up that is linear.
_SCHEDULERS = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear",
               "WarmupCosineLR": "cosine"}  # fmt: skip
# Where they begin, which is 0 here.
_FROM_ZERO = {"warmup_min_lr": 0, "warmup_min_ratio": 0}
_COSINE_LOWEST = 0.0001  # of the peak, where nobody says it
_WARMUP_STEPS, _DECAYS_FROM = 1000, 0.001  # where nobody says how long, and from which rate
# What `fsdp_config` of transformers, accelerate and Axolotl says of order and loading alone.
_FSDP_MOVING = {"cpu_ram_efficient_loading", "sync_module_states", "backward_prefetch",
                "backward_prefetch_policy", "forward_prefetch", "use_orig_params",
                "limit_all_gathers", "cpu_offload_pin_memory"}  # fmt: skip
# What means nothing here unless it is off.
_FSDP_OFF = {
    "xla": "there is no training on TPUs", "xla_fsdp_v2": "there is no training on TPUs",
    "xla_fsdp_grad_ckpt": "there is no training on TPUs",
    "xla_fsdp_settings": "there is no training on TPUs",
    "min_num_params": "ranks gather decoder layers, whatever their size",
    "mixed_precision_policy": "dtype says what is computed in",
}  # fmt: skip
# What means the same as here with these words alone.
_FSDP_SAME = {
    "version": ("1", "2"), "state_dict_type": ("FULL_STATE_DICT",),
    "final_state_dict_type": ("FULL_STATE_DICT",),
    "auto_wrap_policy": ("TRANSFORMER_BASED_WRAP",),
}  # fmt: skip
# That a rank's part of weights, gradients and state waits in main memory, by either's name.
_FSDP_OFFLOAD = ("cpu_offload", "offload_params")
_LAYER_CLASSES = ("DecoderLayer", "Block", "Layer")  # how models' decoder layers are called


def deepspeed(
    source: Any, folder: Path | None = None, max_steps: Any = None
) -> dict[str, Any]:  # fmt: skip
    """Our settings for a DeepSpeed configuration.

    Args:
        source: Its values, the path of its file, or a short name (`zero2`).
        folder: That holds the recipe's file.
        max_steps: Of the recipe, if it says how many.

    Raises:
        ValueError: It cannot be read, or asks for what is not the same here; says what to change.
    """
    if source in ("", False):  # of a shell's variable that is not set
        return {}
    if isinstance(source, str) and source in STAGES.values():
        return {"strategy": source}
    if isinstance(source, str) and source in _SHORT_OFFLOAD:
        return dict(_SHORT_OFFLOAD[source])
    config = source if isinstance(source, Mapping) else _read("deepspeed", str(source), folder)
    zero = _section(config, "zero_optimization")
    if (stage := zero.get("stage", 0)) not in [*STAGES]:
        raise ValueError(f"stage {stage!r} is none of 0, 1, 2, 3")
    if other := [key for key in _OTHER_RESULTS if zero.get(key)]:
        raise ValueError(f"{other[0]} has no equal here, and changes the result; remove it")
    known = {"stage", *_OFFLOAD, *_OLD_OFFLOAD, *_OTHER_RESULTS, *_MOVING}
    if unknown := sorted(key for key in zero if key.removeprefix("stage3_") not in known):
        raise ValueError(f"zero_optimization has no {unknown[0]}; correct it, or remove it")
    settings: dict[str, Any] = {"strategy": STAGES[stage], **_offload(zero)}
    for deepspeed_key, name in _EQUIVALENT.items():
        if config.get(deepspeed_key, "auto") != "auto":
            settings[name] = config[deepspeed_key]
    if settings.get("max_grad_norm") == 0:  # how DeepSpeed says that nothing is clipped
        settings["max_grad_norm"] = None
    if isinstance(config.get("train_batch_size"), int) and not settings.keys() >= _STEP:
        raise ValueError(
            "train_batch_size depends on the number of ranks; set train_micro_batch_size_per_gpu "
            "and gradient_accumulation_steps beside it, or set it to auto"
        )
    for section, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if _section(config, section).get("enabled") is True:
            if "dtype" in settings:
                raise ValueError("bf16 and fp16 are both enabled; keep one")
            settings["dtype"] = dtype
    settings |= _optimizer(_section(config, "optimizer"))
    settings |= _scheduler(_section(config, "scheduler"), max_steps)
    supported = {*_EQUIVALENT, *_QUIET, "zero_optimization", "bf16", "fp16", "optimizer",
                 "scheduler"}  # fmt: skip
    if unknown := sorted(
        key for key, value in config.items() if key not in supported and not _is_off(value)
    ):
        raise ValueError(f"{unknown[0]} has no equal here; set it in the recipe, or remove it")
    return settings


def fsdp(value: Any, config: Any = None, folder: Path | None = None) -> dict[str, Any]:
    """Our settings for transformers' `fsdp`, such as `full_shard auto_wrap`, and `fsdp_config`.

    Args:
        value: Of `fsdp`.
        config: Of `fsdp_config`: its values, or the path of its file.
        folder: That holds the recipe's file.

    Raises:
        ValueError: A word asks for what is not the same here, or two contradict each other.
    """
    words = value if isinstance(value, list) else [] if value is True else str(value or "").split()
    named: dict[str, str] = {}  # the word by strategy
    offload = {"offload_params": "cpu"} if "offload" in words else {}
    for word in words:
        if str(word) in SHARDING:
            named.setdefault(SHARDING[str(word)], str(word))
        elif word not in ("auto_wrap", "offload"):  # decoder layers, as here
            raise ValueError(
                f"{word!r} is not built; use full_shard, shard_grad_op or no_shard, with auto_wrap "
                "and offload"
            )
    of_config, settings = _fsdp_config(config, folder)
    for strategy, key in of_config.items():
        named.setdefault(strategy, f"fsdp_config: {key}")
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named.values())} contradict each other; keep one")
    if value and not named:  # as transformers has it since its version 5
        named["fsdp"] = str(value)
    return ({"strategy": next(iter(named))} if named else {}) | offload | settings


def _fsdp_config(source: Any, folder: Path | None) -> tuple[dict[str, str], dict[str, Any]]:
    """The strategies that are asked for, each with the key that does, and other settings."""
    if source is None:
        return {}, {}
    config = source if isinstance(source, Mapping) else _read("fsdp_config", str(source), folder)
    values = {
        str(key).removeprefix("fsdp_"): value for key, value in config.items() if value is not None
    }
    for key, value in values.items():
        word = str(value)
        if key in _FSDP_OFF and value and word.lower() not in _FALSE:
            raise ValueError(f"fsdp_config: {key}: {value!r} has no equal here "
                             f"({_FSDP_OFF[key]}); remove it")  # fmt: skip
        if key in _FSDP_SAME and word not in _FSDP_SAME[key]:
            raise ValueError(f"fsdp_config: {key}: {value!r} has no equal here; use "
                             f"{_FSDP_SAME[key][-1]}, or remove it")  # fmt: skip
    names = values.get("transformer_layer_cls_to_wrap") or []
    for name in names if isinstance(names, list) else [names]:
        if not str(name).endswith(_LAYER_CLASSES):
            raise ValueError(f"fsdp_config: transformer_layer_cls_to_wrap: {name} is no class of "
                             "decoder layers, which are what ranks gather; remove it")  # fmt: skip
    read = {"transformer_layer_cls_to_wrap", "activation_checkpointing", "reshard_after_forward",
            "sharding_strategy", *_FSDP_OFFLOAD}  # fmt: skip
    if unknown := sorted(
        values.keys() - read - _FSDP_MOVING - _FSDP_OFF.keys() - _FSDP_SAME.keys()
    ):
        raise ValueError(f"fsdp_config has no {unknown[0]}; correct it, or remove it")
    recomputes = _switch(values, "activation_checkpointing", default=False)
    settings: dict[str, Any] = {"gradient_checkpointing": True} if recomputes else {}
    if any(values[key] and _switch(values, key, default=False)
           for key in _FSDP_OFFLOAD if key in values):  # fmt: skip
        settings["offload_params"] = "cpu"
    return _fsdp_strategies(values), settings


def _fsdp_strategies(values: Mapping[str, Any]) -> dict[str, str]:
    """The strategies that `fsdp_config` asks for, each with the key that does."""
    named: dict[str, str] = {}
    by_word = ["sharding_strategy"]
    if str(values.get("version", "2")) == "1":
        by_word.append("reshard_after_forward")
    elif "reshard_after_forward" in values:
        reshards = _switch(values, "reshard_after_forward", default=True)
        named["fsdp" if reshards else "zero2"] = "reshard_after_forward"
    for key in by_word:
        if key in values:
            strategy = SHARDING.get(str(values[key]).lower())
            if strategy is None:
                raise ValueError(f"fsdp_config: {key}: {values[key]!r} of FSDP 1 is not built; use "
                                 "full_shard, shard_grad_op or no_shard")  # fmt: skip
            named.setdefault(strategy, key)
    return named


def _switch(values: Mapping[str, Any], key: str, *, default: bool) -> bool:
    """A switch of `fsdp_config`, which may be a word."""
    word = str(values.get(key, default)).lower()
    if word not in (*_TRUE, *_FALSE):
        raise ValueError(f"fsdp_config: {key}: {values[key]!r} does not do; use true or false")
    return word in _TRUE


def _is_off(value: Any) -> bool:
    """Whether part of a configuration asks for nothing."""
    if isinstance(value, Mapping):
        return value.get("enabled") is False
    return value is None or value is False or value == "auto"


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Part of a configuration; empty where it is missing.

    Raises:
        ValueError: It has no parts.
    """
    section = config.get(name)
    if section in (None, "auto"):
        return {}
    if not isinstance(section, Mapping):
        raise ValueError(f"{name} is {section!r}, where DeepSpeed has settings in braces")
    return section


def _offload(zero: Mapping[str, Any]) -> dict[str, Any]:
    """Where states wait. How many buffers they pass through changes no result.

    Raises:
        ValueError: A device is not known, or two folders are named.
    """
    settings: dict[str, Any] = {
        setting: "cpu" for key, setting in _OLD_OFFLOAD.items() if zero.get(key) is True
    }
    for key, setting in _OFFLOAD.items():
        section = _section(zero, key)
        device = section.get("device") or "none"
        if device not in ("none", "cpu", "nvme"):
            raise ValueError(f"{key}: device {device!r} is none of none, cpu, nvme")
        if device != "none":
            settings[setting] = device
        if device == "nvme" and section.get("nvme_path") is not None:
            folder = section["nvme_path"]
            if settings.setdefault("nvme_path", folder) != folder:
                raise ValueError(
                    f"{key}: nvme_path {folder} is another folder than the optimiser's, and there "
                    "is one here; name the same in both"
                )
    return settings


def _optimizer(section: Mapping[str, Any]) -> dict[str, Any]:
    if not section:
        return {}
    if str(section.get("type", "AdamW")).lower() not in ("adam", "adamw"):
        raise ValueError(f"optimizer {section['type']} has no equal here; set optim in the recipe")
    values = {key: value for key, value in _section(section, "params").items() if value != "auto"}
    for key, value in values.items():
        if key not in (*_OPTIMIZER, "betas", *_KERNELS) and _ADAMW.get(key) is not value:
            raise ValueError(
                f"optimizer: {key}: {value!r} has no equal here: what moves is AdamW; remove it"
            )
    settings: dict[str, Any] = {_OPTIMIZER[key]: values[key] for key in _OPTIMIZER if key in values}
    if "betas" in values:
        match values["betas"]:
            case [first, second]:
                settings["adam_beta1"], settings["adam_beta2"] = first, second
            case other:
                raise ValueError(f"optimizer: betas is {other!r}; give two numbers")
    return settings


def _scheduler(section: Mapping[str, Any], max_steps: Any) -> dict[str, Any]:
    """The schedule of the learning rate, where its course is that of one of ours.

    DeepSpeed makes its first two steps at the rate that the warm-up begins with, 0, and here it
    begins at once: a step of the warm-up has the rate of two steps later there.
    """
    if not section:
        return {}
    name = str(section.get("type"))
    if name not in _SCHEDULERS:
        raise ValueError(f"scheduler {name} has no equal here; set lr_scheduler_type in the recipe")
    ours = _SCHEDULERS[name]
    values = {key: value for key, value in _section(section, "params").items() if value != "auto"}
    if values.get("last_batch_iteration") == -1:  # as transformers' own example has it
        del values["last_batch_iteration"]
    own = f"lr_scheduler_type: {ours} and warmup_steps in the recipe"
    if (kind := values.pop("warmup_type", "log")) != "linear":
        raise ValueError(
            f"scheduler: {name} warms up by the step's logarithm where its warmup_type is {kind}, "
            f"and lr_scheduler_type: {ours} linearly; add warmup_type: linear to it, or set {own}"
        )
    decays = name != "WarmupLR"
    known = {"warmup_num_steps", *({"total_num_steps"} if decays else ()),
             *(("warmup_min_ratio", "cos_min_ratio") if name == "WarmupCosineLR"
               else ("warmup_min_lr", "warmup_max_lr"))}  # fmt: skip
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"scheduler: {name} has no {unknown[0]}; correct it, or remove it")
    for key in sorted(known & _FROM_ZERO.keys()):
        if (value := values.get(key, _FROM_ZERO[key])) != 0:
            raise ValueError(f"scheduler: {key} is {value}, and lr_scheduler_type: {ours} begins "
                             f"at 0; set it to 0, or set {own}")  # fmt: skip
    settings: dict[str, Any] = {"lr_scheduler_type": ours}
    if name == "WarmupCosineLR" and (lowest := values.get("cos_min_ratio", _COSINE_LOWEST)):
        settings = {"lr_scheduler_type": "cosine_with_min_lr",
                    "lr_scheduler_kwargs": {"min_lr_rate": lowest}}  # fmt: skip
    if str(values.get("total_num_steps", max_steps)) != str(max_steps):
        raise ValueError(
            f"scheduler: total_num_steps is {values['total_num_steps']}, and the learning rate "
            "ends with the run here; set it to auto, or max_steps in the recipe to the same"
        )
    params = _section(section, "params")
    if "warmup_num_steps" not in params or "warmup_num_steps" in values:
        count = values.get("warmup_num_steps", _WARMUP_STEPS)
        settings["warmup_steps"] = max(2, count) if isinstance(count, int) else count
    if name == "WarmupDecayLR" and "warmup_max_lr" not in params:
        values["warmup_max_lr"] = _DECAYS_FROM
    if values.get("warmup_max_lr") is not None:
        settings["learning_rate"] = values["warmup_max_lr"]
    return settings


def _read(setting: str, path: str, folder: Path | None) -> Mapping[str, Any]:
    if folder is not None:
        path = within(setting, path, folder)
    config = json_in(Path(path).expanduser())
    if not isinstance(config, Mapping):
        raise ValueError(f"{path} holds no settings by name")
    return config
