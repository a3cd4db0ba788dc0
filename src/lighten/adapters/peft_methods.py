"""PEFT's own methods: which of them train here, and their configuration from a recipe's words."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lighten.adapters.frozen import out_in_features
from lighten.adapters.spec import OWN_INITS, AdapterSpec
from lighten.adapters.targets import (
    ALL_LINEAR,
    low_rank_paths,
    saved_paths,
    shortest_names,
    without_groups,
)
from lighten.errors import UserError

if TYPE_CHECKING:
    from peft import PeftConfig

# Methods that PEFT lists and that do not train here, with the reason.
REFUSED = {
    "ADALORA": "it has to be told of every step between backward pass and optimiser",
    "ADAMSS": "it clusters weights with scikit-learn and has to be told of every step",
    "ADAPTION_PROMPT": "it runs an attention of its own, which knows no packed rows and no cache",
    "CPT": "it weighs the loss of its prompt's tokens in a loss of its own",
    "MULTITASK_PROMPT_TUNING": "it wants the number of a task with every example",
    "OSF": "it splits the base's own weights up and has to project every gradient",
    "POLY": "it wants the number of a task with every example",
    "SHADOW": "it trains through a second loss of its own",
    "XLORA": "it mixes adapters that were trained before",
}
# Filled in when the adapter is made or saved.
_OURS = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision")


def method_of(settings: Mapping[str, Any]) -> str:
    """PEFT's name of the method that a recipe's `peft` section asks for, its keys checked.

    Raises:
        UserError: No such method, one that does not train here, or a key that it does not have.
    """
    config_classes = _config_classes()
    method = str(settings.get("peft_type", "")).upper().replace("-", "_")
    offered = [name for name in config_classes if name not in REFUSED]
    if method in REFUSED:
        raise UserError(f"peft: {method} does not train here: {REFUSED[method]}")
    if method not in config_classes:
        mend = _mend(method, offered, "there are")
        raise UserError(f"peft: peft_type {settings.get('peft_type')!r} does not exist; {mend}")
    keys = [setting.name for setting in dataclasses.fields(config_classes[method]) if setting.init]
    for key in settings:
        if key in _OURS:
            raise UserError(f"peft: {key} is set by lighten itself; leave it out")
        if key not in keys:
            raise UserError(f"peft: {method} has no setting {key}; {_mend(key, keys, 'it has')}")
    _check_values(method, settings)
    return method


def _config_classes() -> dict[str, type[PeftConfig]]:
    """PEFT's configuration of each of its methods, by name."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # a second and more, which most do without

    return {
        str(peft_type.value): config for peft_type, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    }


def _mend(wrong: str, names: list[str], otherwise: str) -> str:
    """The name that was meant, or all there are."""
    near = difflib.get_close_matches(wrong, names, n=1)
    return f"did you mean {near[0]}?" if near else f"{otherwise} {', '.join(sorted(names))}"


def _check_values(method: str, settings: Mapping[str, Any]) -> None:
    if settings.get("task_type", "CAUSAL_LM") != "CAUSAL_LM":
        raise UserError("peft: task_type must be CAUSAL_LM, the only task there is here")
    if settings.get("bias", "none") != "none":
        raise UserError("peft: bias trains the base's own weights, which stay frozen; leave it out")
    if method != "LORA":
        return
    if settings.get("init_lora_weights", True) not in OWN_INITS:
        raise UserError(
            "peft: for init_lora_weights pissa, pissa_niter_N or olora leave the peft section out; "
            "other names want steps over the data, or a base changed for good"
        )
    for key in ("alora_invocation_tokens", "arrow_config", "layer_replication", "loftq_config"):
        if settings.get(key):
            raise UserError(f"peft: {key} changes the base or its forward pass; not supported here")


def configured(spec: AdapterSpec, model: PreTrainedModel) -> PeftConfig:
    """PEFT's configuration of an adapter that PEFT trains.

    Raises:
        UserError: A setting is wrong, or targets match nothing.
    """
    if spec.peft is not None:
        return _verbatim(spec.peft, model)
    from peft import LoraConfig

    paths, _ = low_rank_paths(model, spec), saved_paths(model, spec)
    smallest = {path: min(out_in_features(model.get_submodule(path))) for path in paths}
    for path, features in smallest.items():
        if spec.init_lora_weights not in OWN_INITS and spec.rank_at(path) > features:
            raise UserError(
                f"init_lora_weights: {spec.init_lora_weights} takes its rank {spec.rank_at(path)} "
                f"from the base's weight, but {path} has only {features} features; lower lora_r, "
                "or give it a rank of its own in rank_pattern"
            )
    return LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # PEFT computes with floats too
        lora_dropout=spec.dropout,
        target_modules=shortest_names(model, paths),
        use_rslora=spec.use_rslora,
        use_dora=spec.use_dora,
        # What PEFT would take out of the base's weights is taken out layer by layer afterwards.
        init_lora_weights=spec.init_lora_weights if spec.init_lora_weights in OWN_INITS else True,  # type: ignore[arg-type]
        modules_to_save=list(spec.modules_to_save) or None,
        rank_pattern=dict(spec.rank_pattern),
        alpha_pattern=dict(spec.alpha_pattern),
        fan_in_fan_out=any(isinstance(model.get_submodule(path), Conv1D) for path in paths),
        task_type="CAUSAL_LM",
    )


def _verbatim(settings: Mapping[str, Any], model: PreTrainedModel) -> PeftConfig:
    method = method_of(settings)
    verbatim = {key: value for key, value in settings.items() if key != "peft_type"}
    targets = verbatim.get("target_modules")
    if targets and targets != ALL_LINEAR:
        named = without_groups(model, targets)
        verbatim["target_modules"] = named if isinstance(named, str) else list(named)
    verbatim["task_type"] = "CAUSAL_LM"
    if method in ("PROMPT_TUNING", "P_TUNING"):
        # PEFT takes the hidden size, which OPT's small embeddings do not have.
        verbatim.setdefault("token_dim", int(model.get_input_embeddings().weight.shape[1]))  # type: ignore[index]
    try:
        return _config_classes()[method](**verbatim)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"peft: {method}: {error}") from error
