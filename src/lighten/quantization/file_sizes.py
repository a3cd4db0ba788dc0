"""How large the files of quantised weights will be, from a model's shapes alone.

Every tensor that a library's file will hold is listed, with the header that names it, so that the
sizes hold for small models too. Left out: what tokenizer and configuration take beside the weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lighten.quantization.int4 import suited_layers
from lighten.quantization.shapes import (
    dense_in_nf4,
    linear_layers,
    require_groups,
    words_in_int8,
)
from lighten.quantization.targets import DYNAMIC, GROUP_SIZE

_WIDTH = {"F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1}
# Of bitsandbytes: weights per scale, scales per scale of those, and its description in JSON.
_BLOCK, _NESTED, _QUANT_STATE = 64, 256, 168
# What torchao writes of a tensor into the header: how it was quantised, or that it was not.
_TORCHAO_FACTS, _PLAIN_FACTS = 219, 19


@dataclass
class _File:
    """A safetensors file's tensors: format and shape by name."""

    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=lambda: {"format": "pt"})

    def add(self, name: str, kind: str, *shape: int) -> None:
        self.tensors[name] = (kind, shape)

    @property
    def nbytes(self) -> int:
        header: dict[str, object] = {"__metadata__": self.facts}
        place = 0
        for name, (kind, shape) in self.tensors.items():
            end = place + _WIDTH[kind] * math.prod(shape)
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [place, end]}
            place = end
        text = len(json.dumps(header, separators=(",", ":")).encode())
        return 8 + text + (-text % 8) + place


def folder_bytes(kind: str, model: PreTrainedModel, *, group: int = GROUP_SIZE) -> int:
    """Bytes of the weight files of a format.

    Args:
        kind: One of `targets.KINDS`.
        model: Its shapes.
        group: Weights of a scale of 8da4w.

    Raises:
        UserError: The model's shapes do not suit the format.
    """
    file = _File()
    if kind == "int8":
        _torchao(file, model)
    elif kind == DYNAMIC:
        _dynamic(file, model, group)
    elif kind.startswith("int4"):
        _auto_round(file, model)
    else:
        _bitsandbytes(file, model, four=kind == "nf4")
    return file.nbytes


def _parameters(
    model: PreTrainedModel, *, head: bool, conv: bool
) -> Iterator[tuple[str, tuple[int, int] | None, tuple[int, ...]]]:
    """Parameters by name, each once: outputs and inputs of those that are rounded, else None."""
    output = model.get_output_embeddings()
    seen_ids: set[int] = set()
    for path, module in model.named_modules():
        kinds = (nn.Linear, Conv1D) if conv else (nn.Linear,)
        rounded = isinstance(module, kinds) and (head or module is not output)
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen_ids:
                continue
            seen_ids.add(id(parameter))
            shape = tuple(int(size) for size in parameter.shape)
            matrix_shape = None
            if rounded and name == "weight":
                matrix_shape = (
                    (shape[1], shape[0]) if isinstance(module, Conv1D) else (shape[0], shape[1])
                )
            yield f"{path}.{name}", matrix_shape, shape


def _torchao(file: _File, model: PreTrainedModel) -> None:
    embedding, tied = model.get_input_embeddings(), words_in_int8(model)
    paths = {id(module): path for path, module in model.named_modules()}
    names = []
    for name, rounded, shape in _parameters(model, head=True, conv=False):
        names.append(name)
        if tied and name == f"{paths[id(embedding)]}.weight":
            rounded = (shape[0], shape[1])
        if rounded is None:
            file.add(name, "BF16", *shape)
            file.facts[name] = "x" * _PLAIN_FACTS
            continue
        stem = name.removesuffix("weight")
        file.add(f"{stem}_weight_qdata", "I8", *rounded)
        file.add(f"{stem}_weight_scale", "F32", rounded[0], 1)
        file.add(f"{stem}_weight_zero_point", "I8", rounded[0], 1)
        # Its quotation marks are escaped in the header's JSON.
        file.facts[name] = "x" * (_TORCHAO_FACTS + _TORCHAO_FACTS // 6)
    file.facts["tensor_names"] = json.dumps(names)


def _bitsandbytes(file: _File, model: PreTrainedModel, *, four: bool) -> None:
    dense = {f"{path}.weight" for path in dense_in_nf4(linear_layers(model))} if four else set()
    for name, rounded, shape in _parameters(model, head=False, conv=True):
        if rounded is None or name in dense:
            file.add(name, "BF16", *shape)
            continue
        numbers = math.prod(rounded)
        if not four:
            file.add(name, "I8", *rounded)
            file.add(f"{name.removesuffix('weight')}SCB", "F32", rounded[0])
            file.add(f"{name}_format", "U8")
            continue
        blocks = -(-numbers // _BLOCK)
        file.add(name, "U8", -(-numbers // 2), 1)
        file.add(f"{name}.absmax", "U8", blocks)
        file.add(f"{name}.nested_absmax", "F32", -(-blocks // _NESTED))
        file.add(f"{name}.nested_quant_map", "F32", 256)
        file.add(f"{name}.quant_map", "F32", 16)
        file.add(f"{name}.quant_state.bitsandbytes__nf4", "U8", _QUANT_STATE)


def _auto_round(file: _File, model: PreTrainedModel) -> None:
    group, layers = suited_layers(model)
    for name, rounded, shape in _parameters(model, head=False, conv=False):
        stem = name.rpartition(".")[0]
        if rounded is None or stem not in layers:
            file.add(name, "BF16", *shape)
            continue
        outputs, inputs = rounded
        file.add(f"{stem}.qweight", "I32", inputs // 8, outputs)
        file.add(f"{stem}.qzeros", "I32", inputs // group, outputs // 8)
        file.add(f"{stem}.scales", "F16", inputs // group, outputs)


def _dynamic(file: _File, model: PreTrainedModel, group: int) -> None:
    require_groups(model, group)
    names = []
    for name, rounded, shape in _parameters(model, head=False, conv=False):
        names.append(name)
        if rounded is None:
            file.add(name, "BF16", *shape)
            file.facts[name] = "x" * _PLAIN_FACTS
            continue
        outputs, inputs = rounded
        stem = name.removesuffix("weight")
        file.add(f"{stem}_weight_qdata", "I8", outputs, inputs)
        file.add(f"{stem}_weight_scale", "BF16", outputs, inputs // group)
        file.add(f"{stem}_weight_zero_point", "I8", outputs, inputs // group)
        file.facts[name] = "x" * (_TORCHAO_FACTS + _TORCHAO_FACTS // 6)
    file.facts["tensor_names"] = json.dumps(names)
