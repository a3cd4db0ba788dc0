"""GGUF files read into plain transformers models."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lighten.errors import UserError, missing_extra


def read(path: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """A GGUF file's model with its weights dequantised, and its tokenizer.

    transformers marks what it read as quantised by GGUF, which then cannot be saved; here the
    weights are copied into a plain model of the same configuration.

    Raises:
        UserError: `gguf` is missing, or the file cannot be read.
    """
    if importlib.util.find_spec("gguf") is None:
        raise missing_extra("gguf", "gguf")
    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
        marked = AutoModelForCausalLM.from_pretrained(path.parent, dtype=dtype, **where)
    except (ValueError, OSError, KeyError, NotImplementedError) as error:
        raise UserError(f"{path} cannot be read as a GGUF model: {error}") from error
    config = marked.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain.load_state_dict(marked.state_dict())
    plain.tie_weights()
    plain.generation_config = marked.generation_config
    return plain, tokenizer


def convert(path: Path, folder: Path) -> None:
    """Write a GGUF file's model as a safetensors folder in float32."""
    model, tokenizer = read(path)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
