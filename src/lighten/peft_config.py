"""What `adapter_config.json` of PEFT says, read without torch."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lighten import hub_errors
from lighten.errors import UserError
from lighten.paths import exists
from lighten.safetensors_header import INDEX, WHOLE, read_header

# Settings of a LoRA adapter whose update is more than scale·B·A on a linear layer.
NOT_PLAIN = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias",
    "monteclora_config", "target_parameters", "use_bdlora", "use_dora", "use_qalora",
)  # fmt: skip
# Settings that PEFT's own modules carry out: those, and tensors trained beside the low-rank layers.
PEFT_ONLY = (*NOT_PLAIN, "trainable_token_indices")
# Settings that narrow `target_modules` down; the file's own keys say what is left.
NARROWED = ("exclude_modules", "layers_pattern", "layers_to_transform")
# Initial weights that PEFT takes out of the base's own.
CHANGED_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Files of a whole model beside them.
MODEL_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
# Files of a tokenizer beside an adapter.
TOKENIZER = ["tokenizer*", "*tokens*.json", "vocab.*", "merges.txt", "chat_template.jinja"]
# What `peft.LoraConfig` takes for what a file leaves out.
DEFAULTS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0}
FACTOR = re.compile(
    r"^base_model\.model\.(?P<path>.+)\.lora_(?:embedding_)?(?P<factor>[AB])(?:\.weight)?$"
)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The adapter's configuration.

    Raises:
        UserError: No such file, or an adapter of a changed base.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} is not an adapter: it has no {CONFIG}")
    try:
        # Editors on Windows put a byte order mark in front.
        config: Any = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}; fetch or save it again") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise UserError(f"{path} names no peft_type; it is not a PEFT adapter")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(CHANGED_BASE):
        raise UserError(
            f"{path}: init_lora_weights is {start!r}, so it belongs to a base that it changed; "
            "save it again with save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    return config


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model.

    Some trainers (Axolotl) save the base's configuration beside an adapter, without its weights.
    """
    if not exists(folder / CONFIG):
        return False
    weights = (file for pattern in MODEL_WEIGHTS for file in folder.glob(pattern))
    return not (exists(folder / "config.json") and any(weights))


def may_be_on_hub(name: str) -> bool:
    """Whether a name is written as the hub's ids are, and not as a path.

    `runs` has nothing on the hub: it is where runs lie.
    """
    return name.count("/") == 1 and not name.startswith((".", "~", "/", "runs/"))


def on_hub(name: str) -> Path | None:
    """The folder of an adapter that the hub has under an id; None of a model, or of nothing.

    What has a model's weights too is a model, as a folder is.

    Raises:
        UserError: The adapter cannot be fetched.
    """
    if not may_be_on_hub(name) or not _hub_has(name, CONFIG):
        return None
    if _hub_has(name, "config.json") and any(_hub_has(name, file) for file in (WHOLE, INDEX)):
        return None
    return from_hub(name)


def _hub_has(name: str, file: str) -> bool:
    """Whether a repository of the hub has a file, which is not fetched."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        hf_hub_download(name, file, dry_run=True)
    except (OSError, HFValidationError):  # there is none, it cannot be reached, or is no id
        return False
    return True


def from_hub(name: str) -> Path:
    """The folder of an adapter that the hub has under an id: of the cache, or fetched now.

    Raises:
        UserError: It is no hub id, has no adapter in safetensors, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    missing = f"the adapter {name} does not exist: no folder is there"
    with hub_errors.explained(missing, "nothing of that name"):
        folder = Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, *TOKENIZER]))
    if absent := [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]:
        raise UserError(f"the hub's {name} is not an adapter in safetensors: it has no {absent[0]}")
    return folder


def _is_set(config: Mapping[str, Any], key: str) -> bool:
    """Whether a setting is in use; a layer's number may be 0."""
    return type(config.get(key)) is int or bool(config.get(key))


def needs_peft(config: Mapping[str, Any]) -> bool:
    """Whether a saved adapter does what only PEFT's own modules can."""
    if config.get("peft_type") != "LORA" or config.get("bias") not in (None, "none"):
        return True
    return any(_is_set(config, key) for key in PEFT_ONLY)


def more_than_low_rank(config: Mapping[str, Any]) -> str | None:
    """What makes a saved adapter's update more than scale·B·A, in words; None of plain LoRA."""
    if config.get("peft_type") != "LORA":
        return f"{config.get('peft_type')} adapter"
    settings = [key for key in NOT_PLAIN if _is_set(config, key)]
    return f"LoRA adapter with {' and '.join(settings)}" if settings else None


def settings(
    config: Mapping[str, Any], where: str | os.PathLike[str], weights: Iterable[str] = ()
) -> dict[str, Any]:
    """The fields of `AdapterSpec` that a PEFT configuration says.

    Args:
        config: Of `read_config`.
        where: What an error calls it.
        weights: Keys of its tensors: where layers were left out, or no target is named, they are
            what tells the layers that learnt.

    Raises:
        UserError: A setting has a value that PEFT would not take.
    """
    targets = config.get("target_modules")
    paths = {match["path"] for key in weights if (match := FACTOR.match(key))}
    if paths and (not targets or any(_is_set(config, key) for key in NARROWED)):
        targets = "|".join(re.escape(path) for path in sorted(paths))
    if not targets:
        raise UserError(f"{where}: {CONFIG} names no target_modules")
    if not isinstance(targets, str) and not _texts(targets):
        raise UserError(f"{where}: target_modules in {CONFIG} is neither a text nor a list of them")
    saved_modules = config.get("modules_to_save") or ()
    if not _texts(saved_modules):
        raise UserError(f"{where}: modules_to_save in {CONFIG} is not a list of names")
    ranks, alphas = (_pattern(config, f"{what}_pattern", where) for what in ("rank", "alpha"))
    return {
        "r": _rank(config, "r", where),
        "alpha": _number(config, "lora_alpha", where),
        "dropout": _number(config, "lora_dropout", where),
        "target_modules": targets if isinstance(targets, str) else tuple(targets),
        "use_rslora": bool(config.get("use_rslora")),
        "modules_to_save": tuple(saved_modules),
        "rank_pattern": {key: _rank(ranks, key, where) for key in ranks},
        "alpha_pattern": {key: _number(alphas, key, where) for key in alphas},
    }


def _texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(part, str) for part in value)


def _number(values: Mapping[str, Any], key: str, where: str | os.PathLike[str]) -> float:
    value = values.get(key)
    if value is None:
        return DEFAULTS[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise UserError(f"{where}: {key} in {CONFIG} is {value!r}, which is not a number")
    return value


def _rank(values: Mapping[str, Any], key: str, where: str | os.PathLike[str]) -> int:
    value = _number(values, key, where)
    if value < 1 or value != int(value):
        raise UserError(f"{where}: {key} in {CONFIG} is {value!r}, which is no rank")
    return int(value)


def _pattern(
    config: Mapping[str, Any], key: str, where: str | os.PathLike[str]
) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict) or None in value.values():
        raise UserError(f"{where}: {key} in {CONFIG} does not give a number for each name")
    for pattern in value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"{where}: {key} in {CONFIG} has {pattern!r}, which is no regular expression"
            ) from error
    return value


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape by key of the tensors in a safetensors file, from its header alone.

    Raises:
        UserError: No such file, or it is cut off.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; an adapter's weights are read from safetensors")
    return {name: tensor.shape for name, tensor in read_header(path).items()}
