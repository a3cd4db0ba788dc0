"""A model folder whose files hold quantised weights already, as its configuration says."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from lighten.errors import UserError
from lighten.models.quantized import (
    BLOCK_OF_FOUR_BITS,
    BLOCK_OF_SCALES,
    THEIR_LAYERS,
    Storage,
    require_bitsandbytes,
)
from lighten.safetensors_header import index_of, read_header


def stored_as(folder: Path) -> dict[str, Any] | None:
    """What a model folder's configuration says of weights that are quantised already."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    quantization: dict[str, Any] | None = config.get("quantization_config")
    return quantization


def stored_in(config: Any) -> dict[str, Any] | None:
    """What a base's configuration says of weights that are quantised in its files."""
    stored: dict[str, Any] | None = getattr(config, "quantization_config", None)
    return stored


def on_processor(folder: Path) -> dict[str, Any]:
    """What transformers has to be told so that the model of a folder stays on the processor.

    Of bitsandbytes' formats it takes a model to a GPU where there is one and nothing is said.
    """
    by_bitsandbytes = written_by_bitsandbytes(stored_as(folder)) is not None
    return {"device_map": {"": "cpu"}} if by_bitsandbytes else {}


def written_by_bitsandbytes(stored: Mapping[str, Any] | None) -> Storage | None:
    """How a folder's linear layers are stored, by what its configuration says; None: otherwise."""
    if stored is None or stored.get("quant_method") != "bitsandbytes":
        return None
    if stored.get("load_in_8bit"):
        return Storage("int8")
    kind = stored.get("bnb_4bit_quant_type") or "fp4"
    return Storage(kind, bool(stored.get("bnb_4bit_use_double_quant")))


def held_as(name: str, stored: Mapping[str, Any] | None, asked: Storage | None) -> Storage | None:
    """How the linear layers of a folder's model are stored once it is loaded.

    Args:
        name: Of the model, for errors.
        stored: What its configuration says of quantised weights; None: they are dense.
        asked: What the settings ask for; None: the weights as they are.

    Returns:
        None where bitsandbytes has no part in it.

    Raises:
        UserError: The files' weights are quantised in another way than is asked for.
        MissingExtra: bitsandbytes wrote them and is not installed.
    """
    if stored is None:
        return asked
    written = written_by_bitsandbytes(stored)
    if written is not None:
        require_bitsandbytes()
        if asked is None or (written.kind == "int8") == (asked.kind == "int8"):
            return written
    elif asked is None:
        return None
    raise UserError(
        f"{name} is quantised already ({stored.get('quant_method', 'unknown method')}) and cannot "
        f"be stored as {asked.kind}; remove load_in_4bit and load_in_8bit, or take the model it "
        "was made from"
    )


def remaining_storage(name: str, folder: Path, storage: Storage | None) -> Storage | None:
    """What is left to quantise of a folder's model: nothing if its files are so already.

    Raises:
        UserError: They are quantised in another way.
        MissingExtra: bitsandbytes wrote them and is not installed.
    """
    stored = stored_as(folder)
    held = held_as(name, stored, storage)
    return held if stored is None else None


def packed_paths(model: PreTrainedModel, stored: Mapping[str, Any] | None) -> list[str]:
    """Paths of the linear layers that bitsandbytes' formats hold.

    Args:
        model: Its layers are dense; they may be on the meta device.
        stored: What the configuration of its folder says, where its files are quantised already:
            transformers leaves layers dense that are named there, and the head only if it is named
            or none is. None: all but the head are quantised as they are read.
    """
    linear = {p: m for p, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)}
    if stored is None:
        head = model.get_output_embeddings()
        return [path for path, module in linear.items() if module is not head]
    dense = HfQuantizer.get_modules_to_not_convert(
        model, stored.get("llm_int8_skip_modules"), list(model._keep_in_fp32_modules or ())
    )
    return [path for path in linear if should_convert_module(path, dense)]


def loaded_bytes(model: PreTrainedModel, number_bytes: float, files: Sequence[Path] = ()) -> int:
    """Bytes of a model's weights once they are loaded: quantised as its files are, or dense.

    Args:
        model: Its layers are dense; they may be on the meta device.
        number_bytes: Of a number that is dense once it is loaded.
        files: Of its weights, where they are here: of other formats than bitsandbytes' they say
            more than its configuration.
    """
    stored = stored_in(model.config)
    held = written_by_bitsandbytes(stored)
    dense = sum(parameter.numel() for parameter in model.parameters())
    if stored is not None and held is None:
        if _all_here(files):
            return _bytes_in(files, model, number_bytes)
        return round(_bytes_by_settings(stored, model, number_bytes))
    if held is None:
        return round(dense * number_bytes)
    embedding: Any = model.get_input_embeddings()
    packed_bytes = 0
    for path in packed_paths(model, stored):
        module: Any = model.get_submodule(path)
        numbers = module.weight.numel()
        if module.weight is not embedding.weight:  # which stays dense beside a packed head
            dense -= numbers
        if held.kind == "int8":
            rows = module.weight.shape[1 if isinstance(module, Conv1D) else 0]
            packed_bytes += numbers + 4 * rows
            continue
        blocks = -(-numbers // BLOCK_OF_FOUR_BITS)
        packed_bytes += -(-numbers // 2)
        packed_bytes += blocks + 4 * -(-blocks // BLOCK_OF_SCALES) if held.double else 4 * blocks
    return round(dense * number_bytes) + packed_bytes


def _all_here(files: Sequence[Path]) -> bool:
    """Whether these are all files of a model's weights; of a hub model some may not be fetched."""
    index = index_of(files[0].parent) if files else None
    if index is None:
        return bool(files)
    named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return set(named) <= {file.name for file in files}


def _bytes_in(files: Sequence[Path], model: PreTrainedModel, number_bytes: float) -> int:
    """What files of quantised weights hold: integers and float8 as they are, the rest dense."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    tied = [p for p, m in model.named_modules() if m is head and head.weight is embedding.weight]
    total = 0.0
    for file in files:
        for name, tensor in read_header(file).items():
            if any(name.startswith(f"{path}.") for path in tied):
                continue  # it is the embedding
            dense = tensor.kind in ("BF16", "F16", "F32", "F64")
            total += math.prod(tensor.shape) * number_bytes if dense else tensor.bytes
    return round(total)


def _bytes_by_settings(
    stored: Mapping[str, Any], model: PreTrainedModel, number_bytes: float
) -> float:
    """The same by what the configuration says: matrices of the layers in so many bits."""
    bits = _bits_of(stored)
    words = {
        id(module.weight)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if module is not None
    }
    skipped = [
        str(name).removeprefix("re:")
        for key in ("modules_to_not_convert", "ignore", "ignored_layers")
        for name in stored.get(key) or ()
    ]
    total = 0.0
    for name, parameter in model.named_parameters():
        packed = (
            bits is not None
            and parameter.dim() > 1
            and id(parameter) not in words
            and should_convert_module(name.rpartition(".")[0], skipped)
            and not any(f".{part}." in f".{name}" for part in skipped)  # as AutoAWQ has it
        )
        total += parameter.numel() * (bits / 8 if packed and bits else number_bytes)
    return total


def _bits_of(stored: Mapping[str, Any]) -> float | None:
    """Bits of a quantised weight with its part of scale and zero point; None: they are not known.

    AWQ, GPTQ and auto-round name them, compressed-tensors for groups of layers.
    """
    method, settings = stored.get("quant_method"), stored
    if method == "mxfp4":
        return 4 + 8 / 32
    if method == "torchao":
        return 4 + 16 / 128 if "Int4WeightOnly" in json.dumps(stored, default=str) else 8
    for group in (stored.get("config_groups") or {}).values():
        settings = group.get("weights") or stored
    bits = settings.get("bits") or settings.get("w_bit") or settings.get("num_bits")
    if bits is None:
        return 8 if "fp8" in str(method) else None
    size = settings.get("group_size") or settings.get("q_group_size") or -1
    return int(bits) + (0 if int(size) < 1 else (16 + int(bits)) / int(size))


def keep_float32(folder: Path) -> None:
    """Keep auto-round from making float16 of a folder's model that is asked for in float32.

    Its own layers multiply in whatever format their input has, and its table names two of them
    (0.16.1): of others it makes float16, dense weights and the constants of positions too.
    """
    by_auto_round = (stored_as(folder) or {}).get("quant_method") == "auto-round"
    if not by_auto_round or importlib.util.find_spec("auto_round") is None:
        return
    from auto_round.inference.backend import BackendInfos

    for name in ("auto_round:torch", "auto_round:torch_zp"):
        if "float32" not in BackendInfos[name].compute_dtype:
            BackendInfos[name].compute_dtype.append("float32")


def bring_into_format(model: PreTrainedModel, folder: Path, compute: torch.dtype) -> None:
    """Bring what transformers leaves in the format of a quantised folder's files into the wanted.

    Of bitsandbytes' folders that is each dense `weight`, those of norms and embeddings too; of
    torchao's the scales of 4 bits that activations of 8 bits are multiplied with (transformers
    5.24). In two formats they make no product. auto-round's scales round the weights that they
    make to float16.

    Args:
        model: As transformers loaded it.
        folder: From where.
        compute: The format that it was asked for.
    """
    method = (stored_as(folder) or {}).get("quant_method")
    if method == "torchao":
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if hasattr(parameter, "tensor_data_names"):
                    module.compute_dtype = compute  # type: ignore[assignment]
                dynamic = type(parameter.data).__name__ == "IntxUnpackedToInt8Tensor"
                if dynamic and parameter.dtype != compute:
                    setattr(module, name, nn.Parameter(parameter.to(compute), requires_grad=False))
    if method == "auto-round" and compute == torch.float32:
        for module in model.modules():
            if getattr(module, "QUANT_TYPE", None) == "torch":
                module.scales = module.scales.float()
    if method != "bitsandbytes":
        return
    kept = [name.replace("*", ".*") for name in model._get_dtype_plan(compute)]  # in float32
    packed = {
        id(module.weight) for module in model.modules() if type(module).__name__ in THEIR_LAYERS
    }
    for name, parameter in model.named_parameters():
        if id(parameter) not in packed and parameter.is_floating_point():
            in_float32 = any(re.search(pattern, name) for pattern in kept)
            parameter.data = parameter.data.to(torch.float32 if in_float32 else compute)
