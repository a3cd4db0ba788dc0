"""A folder of INT4 weights in the layout that auto-round, transformers and vLLM load.

Integers with a scale per group, symmetric: `qweight`, `scales` and `qzeros` of AutoGPTQ's layout,
under `quant_method: auto-round`. Embedding, norms and head stay in bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lighten.adapters.decoder import decoder_layers, stacked_experts
from lighten.errors import UserError
from lighten.quantization import gptq
from lighten.quantization.calibrated import Rounded, quantised_layers, rounded_layers
from lighten.quantization.shapes import about_dense

# Sizes of a group, the largest that divides every row first: a group across the edge of a row
# is written and cannot be read back (auto-round 0.16.1).
GROUPS = (128, 64, 32)
MULTIPLE = GROUPS[-1]  # what its products on processors ask of rows and outputs
PACKED = 8  # numbers of 4 bits in an int32
ZERO = 0x77777777  # the layout stores a zero point of 8 as 7, eight of them in an int32


def write(model: Path, folder: Path, calibration: Sequence[Sequence[int]] | None) -> None:
    """Write a model in 4 bits.

    Args:
        model: Folder of the model in 16 bits.
        folder: Is filled.
        calibration: Token ids of rows; None: each number goes to its nearest.

    Raises:
        UserError: The model's shapes do not suit the format, or there are no rows.
    """
    if calibration is not None and not calibration:
        raise UserError("int4 looks at calibration rows and there are none; use int4:rounded")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, local_files_only=True
    ).eval()
    layers = decoder_layers(loaded)
    size, suited = suited_layers(loaded)
    rounded: Rounded = {}
    if calibration is None:
        for path, layer in suited.items():
            rounded[path] = gptq.rounded_plainly(layer.weight.detach(), size)
    else:
        suit = {id(layer) for layer in suited.values()}
        rounded = rounded_layers(
            loaded, calibration, lambda layer: size if id(layer) in suit else None
        )
    paths = {id(module): path for path, module in loaded.named_modules()}
    blocks = paths[id(layers[0])].rpartition(".")[0]
    _save(loaded, folder, rounded, size, blocks)


def suited_layers(model: PreTrainedModel) -> tuple[int, dict[str, nn.Linear]]:
    """The largest group that divides the rows of every layer that is quantised, and these by path.

    The others inside the decoder layers stay in 16 bits.

    Raises:
        UserError: They all would, or experts are stacked: auto-round (0.16.1) takes each for
            linear layers in 4 bits, and computes with zeros where the folder has none.
    """
    if any(stacked_experts(layer) for layer in decoder_layers(model)):
        raise UserError(
            "int4 is of linear layers, and the model's experts are stacked in one tensor each "
            "layer; use nf4 or int8, which leave them in 16 bits"
        )
    layers = quantised_layers(model)
    suited = {
        path: layer for path, layer in layers.items()
        if layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0
    }  # fmt: skip
    if not suited:
        which = f"has {min(layers)} ({len(layers)} such layers)" if layers else "has no such layer"
        raise UserError(
            f"int4 needs linear layers with rows and outputs that {MULTIPLE} divides, and the "
            f"model {which}; use nf4 or int8"
        )
    rows = {layer.in_features for layer in suited.values()}
    return next(size for size in GROUPS if all(row % size == 0 for row in rows)), suited


def about(model: PreTrainedModel) -> str:
    """What has to be said of layers that stay in 16 bits; nothing where none does.

    Raises:
        UserError: As `suited_layers`.
    """
    layers, suited = quantised_layers(model), suited_layers(model)[1]
    shapes = {path: (layer.out_features, layer.in_features) for path, layer in layers.items()}
    reason = f"{MULTIPLE} does not divide their rows or their outputs"
    return about_dense([path for path in layers if path not in suited], shapes, reason)


def packed(integers: Tensor) -> Tensor:
    """Integers [O, I] as the layout has them: [I / 8, O] in int32, the lowest bits first."""
    nibbles = (integers.T.to(torch.int32) - gptq.LOWEST).unflatten(0, (-1, PACKED))
    words = torch.zeros_like(nibbles[:, 0])
    for place in range(PACKED):
        words |= nibbles[:, place] << (4 * place)
    return words


def _save(model: PreTrainedModel, folder: Path, rounded: Rounded, size: int, blocks: str) -> None:
    tensors: dict[str, Tensor] = {}
    dense: dict[int, Tensor] = {}  # what is tied stays so, or it would be written twice
    for name, value in model.state_dict().items():
        path, _, kind = name.rpartition(".")
        if path not in rounded or kind != "weight":
            cast = value.to(torch.bfloat16) if value.is_floating_point() else value
            tensors[name] = dense.setdefault(value.data_ptr(), cast)
            continue
        integers, scales = rounded[path]
        outputs, groups = scales.shape
        tensors[f"{path}.qweight"] = packed(integers)
        tensors[f"{path}.scales"] = scales.T.contiguous().half()
        tensors[f"{path}.qzeros"] = torch.full((groups, outputs // PACKED), ZERO, dtype=torch.int32)
    kept = quantised_layers(model).keys() - rounded.keys()
    model.config.quantization_config = {
        "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4,
        "group_size": size, "sym": True, "data_type": "int", "block_name_to_quantize": blocks,
        **({"extra_config": {path: {"bits": 16} for path in sorted(kept)}} if kept else {}),
    }  # fmt: skip
    model.config.dtype = "bfloat16"
    model.save_pretrained(folder, state_dict=tensors)
