"""A model's configuration, read and checked: every fault in it is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lighten.errors import UserError
from lighten.wording import with_article

# What transformers raises for configurations that it cannot use.
FAULTS = (
    ValueError, KeyError, OSError, TypeError, AttributeError, RuntimeError, ImportError,
    AssertionError, ZeroDivisionError, IndexError, StrictDataclassError,
)  # fmt: skip
# Without frequencies of its own in transformers' table.
_PLAIN_ROPE = "default"


def read_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a model folder.

    Args:
        folder: Where its `config.json` is.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        UserError: It is torn, or asks for something that transformers does not know.
    """
    file = folder / "config.json"
    check_json(file)
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except FAULTS as error:
        raise UserError(f"{file} describes no model that can be used: {reason(error)}") from error
    check(config, str(file))
    return config


def check(config: Any, file: str) -> None:
    """Look at what transformers looks up in tables without a word about it.

    Raises:
        UserError: An unknown kind of positions or activation, or no layers.
    """
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    if isinstance(layers, int) and layers < 1:
        raise UserError(f"{file}: num_hidden_layers is {layers}; a model has at least 1")
    for rope_type in rope_types(text):
        if rope_type != _PLAIN_ROPE and rope_type not in ROPE_INIT_FUNCTIONS:
            supported = ", ".join(sorted({_PLAIN_ROPE, *ROPE_INIT_FUNCTIONS}))
            raise UserError(
                f"{file}: the rope type {rope_type!r} is unknown to the installed "
                f"transformers, which has {supported}; correct it, or update transformers"
            )
    for key in ("hidden_act", "hidden_activation", "activation_function"):
        activation = getattr(text, key, None)
        if isinstance(activation, str) and activation not in ACT2FN:
            raise UserError(
                f"{file}: {key} is {activation!r}, an activation that the installed transformers "
                "does not have; correct it, or update transformers"
            )


def rope_types(config: Any) -> set[str]:
    """The kinds of rotary positions that a configuration asks for; a model may have several."""
    types: set[str] = set()
    for key in ("rope_parameters", "rope_scaling"):
        settings = getattr(config, key, None)
        if not isinstance(settings, dict):
            continue
        entries = [settings, *(value for value in settings.values() if isinstance(value, dict))]
        for entry in entries:
            rope_type = entry.get("rope_type", entry.get("type"))
            if rope_type is not None:
                types.add(str(rope_type))
    return types


def build_empty(name: str, config: Any, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A model whose weights are shapes alone (on the meta device).

    Raises:
        UserError: The configuration describes no language model.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code
            )
    except FAULTS as error:
        raise UserError(f"{name} is no model that can be built: {reason(error)}") from error
    return model


def reason(error: BaseException) -> str:
    """What a library said, on one line and without its long lists."""
    if isinstance(error, KeyError) and error.args:
        text = str(error.args[0])
        return text if " " in text else f"it lacks or does not know {text!r}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # Validators announce the fault on their first line and tell it on the second.
    message = lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]
    message = message.removeprefix("ValueError: ").removeprefix("TypeError: ")
    return message.partition(". Errors: ")[0]


def check_json(file: Path) -> None:
    """A file holds a JSON object.

    Raises:
        UserError: It cannot be read, is torn, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {reason(error)}") from error
    except ValueError as error:
        raise UserError(
            f"{file} is not valid JSON ({reason(error)}); fetch or copy the model anew"
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{file} holds {with_article(type(content).__name__)} where settings by name are "
            "expected; fetch or copy the model anew"
        )
