"""Names that other tools use for our settings, translated with a one-line notice."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from lighten.paths import limited, several, with_config
from lighten.recipe import axolotl_datasets, dataset_info, foreign, other_tools
from lighten.recipe.axolotl_datasets import SUBSETS

RENAMED = {
    "base_model": "model_name_or_path",
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "base": "model_name_or_path",
    "train_file": "dataset",
    "dataset_name": "dataset",
    "local_dataset": "dataset",
    "data": "dataset",
    "validation_file": "eval_dataset",
    "max_seq_length": "max_length",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "micro_batch_size": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "lorap_lr_ratio": "loraplus_lr_ratio",
    "fine_tune_type": "method",
    "lora_rank": "lora_r",
    "r": "lora_r",
    "lanes": "workers",
    "lora_target": "lora_target_modules",
    "target_modules": "lora_target_modules",
    "torch_dtype": "dtype",
    "sample_packing": "packing",
    "neat_packing": "packing",
    "padding_free": "packing",
    "use_bnb_nested_quant": "bnb_4bit_use_double_quant",
    "double_quantization": "bnb_4bit_use_double_quant",
    "quantization_type": "bnb_4bit_quant_type",
    "val_set_size": "val_size",
    "val_split": "val_size",
    "model_revision": "revision",
    "lora_modules_to_save": "modules_to_save",
    "additional_target": "modules_to_save",
    "lora_model_dir": "adapter_name_or_path",
    "activation_offloading": "activation_offload",
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
    "use_gradient_checkpointing": "gradient_checkpointing",
    "random_state": "seed",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "peft_init_lora_weights": "init_lora_weights",
    "chat_template_path": "chat_template",
}
# LLaMA-Factory's, for `finetuning_type: freeze`.
FROZEN_BELOW = 2
_BITS = ("quantization_bit", "quant_bits", "quantization")
# Whether the scales of 4 bits are quantised too: so by default with LLaMA-Factory's, ms-swift's and
# Soup's settings above, and with Axolotl's `adapter: qlora`.
_DOUBLE = ("bnb_4bit_use_double_quant",
           *(a for a, name in RENAMED.items() if name == "bnb_4bit_use_double_quant"))  # fmt: skip
_BACKENDS = ("quant_method", "quantization_method")
_PACKING = ("packing", *(a for a, name in RENAMED.items() if name == "packing"))
# What says which method it is, beside Axolotl's `adapter`.
_METHODS = ("method", "trainable_layers", *(a for a, name in RENAMED.items() if name == "method"),
            "finetuning_type", "peft")  # fmt: skip
# Axolotl's switches.
_ATTENTIONS = {"flash_attention": "flash_attention_2", "sdp_attention": "sdpa",
               "eager_attention": "eager"}  # fmt: skip
_PROMPTS_TOO, _SPREAD = ("assistant_only_loss", "completion_only_loss"), ("strategy",)
_IN_BITS = ("load_in_4bit", "load_in_8bit")
# By name, which of our settings each says; `translate` has what they say.
SPECIAL: Mapping[str, tuple[str, ...]] = {
    "datasets": ("dataset",), "train_on_inputs": _PROMPTS_TOO, "train_on_prompt": _PROMPTS_TOO,
    "lora_target_linear": ("lora_target_modules",), "bf16": ("dtype",), "fp16": ("dtype",),
    "flash_attn": ("attn_implementation",), "deepspeed": (*_SPREAD, "offload_optimizer",
    "offload_params"), "fsdp": _SPREAD, "fsdp_config": (*_SPREAD, "offload_params"),
    "adapter": (), "finetuning_type": ("method", "trainable_layers"),
    "freeze_trainable_layers": ("trainable_layers",), "additional_target": ("modules_to_save",),
    "max_samples": ("dataset",), "dataset_dir": ("dataset",),
    **dict.fromkeys(SUBSETS, ("dataset",)), "packing_strategy": ("packing",),
    **dict.fromkeys(_ATTENTIONS, ("attn_implementation",)), **dict.fromkeys(_BITS, _IN_BITS),
    **dict.fromkeys(_BACKENDS, _IN_BITS),
}  # fmt: skip
# Of these, what are switches, and how people write one.
_SWITCHES = ("train_on_inputs", "train_on_prompt", "lora_target_linear", "bf16", "fp16",
             *_ATTENTIONS)  # fmt: skip
_SWITCHED = {"true": True, "yes": True, "on": True, "1": True,
             "false": False, "no": False, "off": False, "0": False}  # fmt: skip
_FLASH = {
    "fa2": "flash_attention_2", "fa3": "flash_attention_3", "sdpa": "sdpa", "disabled": "eager",
    "true": "flash_attention_2", "auto": "sdpa",
}  # fmt: skip


def translate(
    values: Mapping[str, Any], folder: Path | None = None, beside: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Canonical names for aliased ones.

    Args:
        values: Settings by name.
        folder: That holds the recipe's file, where a file that they name may lie.
        beside: What else is said: of a file's settings those of the command line, and the reverse.

    Returns:
        The settings, a notice per alias used, and a sentence per problem.
    """
    out: dict[str, Any] = {}
    notices: list[str] = []
    problems: list[str] = []
    came_from: dict[str, str] = {}
    passed_over: list[str] = []
    everything = {**(beside or {}), **values}

    def put(alias: str, name: str, value: Any) -> None:
        said = values.get(name, out.get(name))
        if name != alias and said is not None:
            if said == value:
                return  # many recipes say it a second time
            problems.append(f"{alias} and {came_from.get(name, name)} both set the same thing; "
                            f"keep one, {name} by its own name")  # fmt: skip
        came_from[name] = alias
        out[name] = value
        if alias != name:
            notices.append(f"{alias} is called {name} here; read as {name}: {value}")

    def quantise_scales(alias: str, value: Any) -> None:
        """Quantise the scales too, as the tools do that have such a setting, unless it is said."""
        said = any(everything.get(name) is not None for name in _DOUBLE)
        if not said and everything.get("load_in_4bit") is not False:
            out[_DOUBLE[0]] = True
            notices.append(f"{alias}: {value} quantises the scales too there, and so it does here: "
                           f"{_DOUBLE[0]}: true (load_in_4bit alone does not)")  # fmt: skip

    for key, given in values.items():
        raw = plain(given)
        if key == "adapter" and raw is None and all(everything.get(n) is None for n in _METHODS):
            problems.append("adapter is empty, which trains the whole base in Axolotl; set method: "
                            "full, or adapter: lora")  # fmt: skip
        if raw is None and (key in SPECIAL or key in RENAMED):
            continue  # left empty, it asks for nothing
        # Switches of other tools are often quoted.
        quoted = isinstance(raw, str) and key in SPECIAL
        value = {"true": True, "false": False}.get(raw.lower(), raw) if quoted else raw
        if key in _SWITCHES:
            value = _SWITCHED.get(str(raw).strip().lower(), raw)
        half = key in ("bf16", "fp16") and value == "auto"
        if key in _SWITCHES and not (isinstance(value, bool) or half):
            problems.append(f"{key}: {raw!r} does not do; use true or false")
        elif key == "use_gradient_checkpointing" and value == "unsloth":
            put(key, "gradient_checkpointing", True)  # which moves them to main memory there
        elif key in RENAMED and not (key == "data" and isinstance(value, Mapping)):
            put(key, RENAMED[key], value)
        elif key == "data":
            unknown = sorted(set(value) - {"train", "valid", "validation", "eval"}, key=str)
            if unknown:
                problems.append(f"data.{unknown[0]} is not a setting; use dataset, eval_dataset")
            for part in set(value) - set(unknown):
                name = "dataset" if part == "train" else "eval_dataset"
                put(f"data.{part}", name, value[part])
        elif key == "datasets":
            entries = value if isinstance(value, list) else [value]
            paths = [v.get("path") if isinstance(v, Mapping) else v for v in entries]
            if paths and all(isinstance(path, str) for path in paths):
                named = [axolotl_datasets.named(entry) for entry in entries]
                put("datasets", "dataset", named if len(named) > 1 else named[0])
                for read, unread in map(axolotl_datasets.answers, entries):
                    notices += [notice for notice in read if notice not in notices]
                    problems += unread
            else:
                problems.append("each entry of datasets must have a path; use dataset: FILE")
        elif key == "max_steps" and str(value).strip() == "-1":
            notices.append("max_steps: -1 sets nothing: num_train_epochs says how many")
        elif key in ("train_on_inputs", "train_on_prompt"):
            put(key, "assistant_only_loss", not value)
            put(key, "completion_only_loss", not value)
        elif key == "packing_strategy":
            if value != "bfd":
                problems.append(f"packing_strategy: {value!r} does not do; remove it: rows are "
                                "packed so that none is cut")  # fmt: skip
            elif any(str(everything.get(name)).lower() == "true" for name in _PACKING):
                notices.append("packing_strategy: bfd is so here too in that no row is cut; a step "
                               "is of rows, not of filled blocks")  # fmt: skip
            else:
                passed_over.append(key)
        elif key == "max_samples":
            if not str(value).isdecimal() or int(value) < 1:
                problems.append(f"max_samples: {value!r} does not do; use a number from 1")
            else:
                notices.append(f"max_samples is read as the first {value} rows of each data set")
        elif key in (*SUBSETS, "dataset_dir"):
            pass  # what is of the data set; where `dataset_info.json` is
        elif key == "lora_target_linear":
            if value:
                put(key, "lora_target_modules", "all-linear")
        elif key == "finetuning_type":
            if value != "freeze":
                put(key, "method", value)
            elif "freeze_trainable_layers" not in values:
                put(key, "trainable_layers", f"last_{FROZEN_BELOW}")
        elif key == "freeze_trainable_layers":
            if isinstance(value, int) and value > 0:
                put(key, "trainable_layers", f"last_{value}")
            else:
                problems.append(f"freeze_trainable_layers: {value!r} does not do; only the last "
                                "layers can be trained, use trainable_layers: last_N")  # fmt: skip
        elif key in ("bf16", "fp16"):
            dtype = {"bf16": "bfloat16", "fp16": "float16"}[key]
            if value == "auto":
                put(key, "dtype", "auto")
            elif value:
                put(key, "dtype", dtype)
        elif key in ("deepspeed", "fsdp") or (key == "fsdp_config" and _alone(everything)):
            try:
                converted = (
                    foreign.deepspeed(value, folder, everything.get("max_steps"))
                    if key == "deepspeed"
                    else foreign.fsdp(
                        value if key == "fsdp" else True, everything.get("fsdp_config"), folder
                    )
                )
            except ValueError as error:
                problems.append(f"{key}: {error}")
            else:
                for name, setting in converted.items():
                    put(key, name, setting)
                if "lr_scheduler_type" in converted:
                    notices.append("DeepSpeed's first two steps have no rate: its warm-up begins "
                                   "two steps earlier here")  # fmt: skip
        elif key == "fsdp_config":
            if value and not everything.get("fsdp"):
                problems.append("fsdp_config has no effect without fsdp; add fsdp: true, or remove "
                                "it")  # fmt: skip
        elif key in _ATTENTIONS:
            if value:
                put(key, "attn_implementation", _ATTENTIONS[key])
        elif key == "flash_attn":
            flash = _FLASH.get(str(value).lower())
            if flash is None:
                problems.append(f"flash_attn: {value!r} is not one of {', '.join(_FLASH)}")
            else:
                put(key, "attn_implementation", flash)
        elif key in _BITS:
            count = str(value).lower().removesuffix("bit").rstrip("-")
            bits = {"4": "load_in_4bit", "8": "load_in_8bit"}.get(count)
            if bits is not None:
                put(key, bits, True)
                if bits == "load_in_4bit":
                    quantise_scales(key, value)
            elif value not in ("none", False):
                problems.append(f"{key}: {value!r} does not do; use 4 or 8")
        elif key == "adapter":
            if value == "qlora":
                put(key, "load_in_4bit", True)
                quantise_scales(key, value)
            elif value != "lora":
                problems.append(
                    f"adapter: {value!r} does not do; use lora or qlora, use_dora: true, or "
                    "another method of PEFT's as peft: {peft_type: IA3}"
                )
        elif key in _BACKENDS:
            if value not in ("bnb", "bitsandbytes"):
                problems.append(f"{key}: {value!r} does not do; only bitsandbytes is there")
            elif not {"load_in_4bit", "load_in_8bit", "adapter", *_BITS} & set(values):
                problems.append(f"{key} says not how many bits; set load_in_4bit or load_in_8bit")
        elif other_tools.is_rhythm(key):
            try:
                for name, setting in other_tools.rhythm(key, value, values, everything).items():
                    put(key, name, setting)
            except ValueError as error:
                problems.append(str(error))
        elif other_tools.changes_nothing(key, value):
            passed_over.append(key)
        elif value is not None or key not in came_from:
            out[key] = value
    for key in SUBSETS:
        if values.get(key) is not None:
            names = ("dataset", *(alias for alias, name in RENAMED.items() if name == "dataset"))
            said = (everything[name] for name in names if everything.get(name) is not None)
            data_set = out.get("dataset") or next(said, None)
            if isinstance(data_set, str) and several(data_set, folder) == data_set:
                out["dataset"] = with_config(data_set, str(values[key]))
                notices.append(f"{key} is read as dataset: {out['dataset']}")
            else:
                problems.append(
                    f"{key} is of one data set; write dataset: NAME/{values[key]}, each with its "
                    "own"
                )
    for name in ("dataset", "eval_dataset"):
        if name in out:
            try:
                out[name], columns, read = _data_sets(out[name], folder, everything)
            except ValueError as error:
                problems.append(str(error))
                continue
            notices += read
            if columns and everything.get("dataset_columns") is None:
                put(dataset_info.FILE, "dataset_columns", columns)
    if passed_over:
        notices.append(f"passed over, as they change nothing here: {', '.join(passed_over)}")
    return out, notices, problems


def _alone(everything: Mapping[str, Any]) -> bool:
    """Whether `fsdp_config` asks for FSDP by itself, as it does in Axolotl beside a version."""
    return not everything.get("fsdp") and bool(everything.get("fsdp_version"))


def _data_sets(
    value: Any, folder: Path | None, everything: Mapping[str, Any]
) -> tuple[Any, dict[str, str], list[str]]:
    """One data set or a list of several, with so many rows of each at most, if that is said.

    Returns:
        They, names of columns if `dataset_info.json` has others, and notices.

    Raises:
        ValueError: An entry there asks for what is not read.
    """
    value = several(value, folder) if isinstance(value, str) else value
    names, most = value if isinstance(value, list) else [value], everything.get("max_samples")
    if not all(isinstance(name, str) for name in names):
        return value, {}, []
    directory = everything.get("dataset_dir")
    names, columns, read = dataset_info.resolved(names, directory, folder)
    if str(most).isdecimal() and int(str(most)):
        names = [limited(name, int(str(most))) for name in names]
    return names[0] if len(names) == 1 else names, columns, read


def plain(value: Any) -> Any:
    """A value from Python: paths are text, NumPy's numbers and arrays are numbers and lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list | tuple | range):
        return [plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def keep_one_end(settings: MutableMapping[str, Any], overrides: Mapping[str, Any]) -> list[str]:
    """Let `max_steps` of the command line take the place of a file's `max_time`, or the reverse.

    Args:
        settings: The file's with the overrides in them; changed in place.
        overrides: By canonical name.

    Returns:
        A notice where one was replaced.
    """
    for name, replaced in (("max_steps", "max_time"), ("max_time", "max_steps")):
        if overrides.get(name) is not None and replaced not in overrides and settings.get(replaced):
            settings[replaced] = None
            return [f"{name} takes the place of the recipe's {replaced}"]
    return []
