"""GGUF files read into plain transformers models."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lighten.errors import UserError, missing_extra


def read(path: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """A GGUF file's model with its weights dequantised, and its tokenizer.

    transformers marks what it read as quantised by GGUF, which then cannot be saved; here the
    weights are copied into a plain model of the same configuration.

    Raises:
        UserError: `gguf` is missing, or the file cannot be read.
    """
    tokenizer = read_tokenizer(path)
    marked = _from_gguf(AutoModelForCausalLM, path, dtype=dtype)
    config = marked.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain.load_state_dict(marked.state_dict())
    plain.tie_weights()
    plain.generation_config = marked.generation_config
    return plain, tokenizer


def read_tokenizer(path: Path) -> Any:
    """A GGUF file's tokenizer with its chat template.

    Raises:
        UserError: `gguf` is missing, or the file cannot be read.
    """
    tokenizer = _from_gguf(AutoTokenizer, path)
    _restore_digits(path, tokenizer)
    return tokenizer


def read_config(path: Path) -> Any:
    """A GGUF file's configuration.

    Raises:
        UserError: `gguf` is missing, or the file cannot be read.
    """
    return _from_gguf(AutoConfig, path)


def _from_gguf(kind: Any, path: Path, **options: Any) -> Any:
    if importlib.util.find_spec("gguf") is None:
        raise missing_extra("gguf", "gguf")
    # Alone in a folder: transformers prefers tokenizer files that lie beside it to its own.
    with TemporaryDirectory() as scratch:
        (Path(scratch) / path.name).symlink_to(path.resolve())
        try:
            return kind.from_pretrained(
                scratch, gguf_file=path.name, local_files_only=True, **options
            )
        except (ValueError, OSError, KeyError, NotImplementedError) as error:
            raise UserError(f"{path} cannot be read as a GGUF model: {error}") from error


def _restore_digits(path: Path, tokenizer: Any) -> None:
    """Split numbers into digits where the file says so; transformers reads only the byte level.

    `smollm` is the pre-tokeniser of SmolLM and SmolLM2 in llama.cpp: every digit by itself, then
    GPT-2's pattern.
    """
    from gguf import GGUFReader

    field = GGUFReader(path).fields.get("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )


def convert(path: Path, folder: Path) -> None:
    """Write a GGUF file's model as a safetensors folder in float32."""
    model, tokenizer = read(path)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
