"""A frozen linear layer of the base, whatever its format: its weight and its product.

A layer whose weight is stored in fewer bits (`models/quantized.py` makes them) has a method
`dense_weight` that gives it as [O, I] in the layer's `compute_dtype`; the room of the models is not
imported here. Its product is that of the dense weight, so a cohort's rows, the base's own rows and
the backward pass all see the same numbers.

Dimensions: N rows, I input features, O output features.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lighten.cpu import products


def is_linear(module: nn.Module) -> bool:
    """Whether a low-rank update can be added to the module (`nn.Linear` or GPT-2's `Conv1D`)."""
    return isinstance(module, nn.Linear | Conv1D) and not _is_more(module)


def _is_more(module: nn.Module) -> bool:
    """Whether a model's own kind of `nn.Linear` is no plain product: some routers of experts."""
    if not type(module).__module__.startswith("transformers.models."):
        return False
    weight: Tensor = module.weight  # type: ignore[assignment]
    outputs, inputs = weight.shape
    try:
        with torch.no_grad():
            out = module(weight.new_zeros(1, inputs))
    except RuntimeError:  # it wants its input cut into groups
        return True
    return not isinstance(out, Tensor) or out.shape != (1, outputs)


def is_quantized(module: nn.Module) -> bool:
    """Whether the module is a linear layer whose weight must be dequantised."""
    return hasattr(module, "dense_weight") or (
        is_linear(module) and is_of_torchao(getattr(module, "weight", None))
    )


def is_of_torchao(weight: object) -> bool:
    """Whether a weight is a quantised tensor of torchao's, which knows few operations."""
    return isinstance(weight, Tensor) and hasattr(weight, "tensor_data_names")


def is_conv1d(module: nn.Module) -> bool:
    """Whether the layer is GPT-2's `Conv1D`, or was before it was quantised."""
    return isinstance(module, Conv1D) or getattr(module, "source_cls", None) is Conv1D


def out_in_features(base: nn.Module) -> tuple[int, int]:
    """(O, I), without touching the weight's values."""
    if isinstance(base, Conv1D):
        return base.nf, base.nx
    return int(base.out_features), int(base.in_features)  # type: ignore[arg-type]


def weight_of(base: nn.Module) -> Tensor:
    """The layer's weight as [O, I], fetched anew: a gathered or streamed weight may come late.

    A quantised one is dequantised at each call, into the format of the layer's products.
    """
    dense: Any = getattr(base, "dense_weight", None)
    if dense is not None:
        dense_weight: Tensor = dense()
        return dense_weight
    weight: Tensor = base.weight  # type: ignore[assignment]
    if is_of_torchao(weight):
        return weight.dequantize().to(computes_in(base))
    return weight.T if isinstance(base, Conv1D) else weight


def product(base: nn.Module, x: Tensor) -> Tensor:
    """The layer's own x Wᵀ + b: [N, I] → [N, O]."""
    return products.linear(x, weight_of(base), base.bias)  # type: ignore[arg-type]


def formats(module: nn.Module) -> dict[str, torch.dtype]:
    """The format in which each parameter of the module takes part in products, by its name."""
    dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
    for path, layer in module.named_modules():
        if is_quantized(layer):
            dtypes[f"{path}.weight" if path else "weight"] = computes_in(layer)
    return dtypes


def dense_copy(module: nn.Module) -> nn.Module:
    """A deep copy in which quantised layers are plain ones, in the format of their products."""
    # What stands in deepcopy's memo counts as copied already.
    memo: dict[int, Any] = {
        id(layer): _dense(layer) for layer in module.modules() if is_quantized(layer)
    }
    return copy.deepcopy(module, memo)


def _dense(layer: nn.Module) -> nn.Module:
    outputs, inputs = out_in_features(layer)
    weight, bias = weight_of(layer), layer.bias
    layer_copy: nn.Module
    with torch.device("meta"):
        if is_conv1d(layer):
            layer_copy = Conv1D(outputs, inputs)
        else:
            layer_copy = nn.Linear(inputs, outputs, bias=bias is not None)
    if is_conv1d(layer):
        weight = weight.T.contiguous()
    layer_copy.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer_copy.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)  # type: ignore[operator]
    return layer_copy.eval()


def make_dense(model: PreTrainedModel) -> str | None:
    """Replace every quantised layer of the model by a plain one, layer by layer.

    Returns:
        What was dequantised to what, or None if nothing was quantised.
    """
    quantized = [(path, layer) for path, layer in model.named_modules() if is_quantized(layer)]
    sentence = None
    for path, layer in quantized:
        sentence = dequantised_to(layer)
        model.set_submodule(path, dense_copy(layer))
    if quantized:
        forget_quantization(model)
    return sentence


def dequantised_to(layer: nn.Module) -> str:
    """What becomes of a quantised layer when it is made dense, in words."""
    storage = getattr(layer, "storage", "torchao's")
    return f"{storage} weights dequantised to {str(computes_in(layer))[6:]}"


def computes_in(layer: nn.Module) -> torch.dtype:
    """The format of a quantised layer's products."""
    dtype: torch.dtype = getattr(layer, "compute_dtype", None) or layer.weight.dtype  # type: ignore[assignment]
    return dtype


def forget_quantization(model: PreTrainedModel) -> None:
    """The model is dense: transformers would save its weights as if they were quantised."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for mark, value in (("is_loaded_in_4bit", False), ("is_loaded_in_8bit", False),
                        ("is_quantized", False), ("hf_quantizer", None),
                        ("quantization_method", None)):  # fmt: skip
        if hasattr(model, mark):
            setattr(model, mark, value)
    # What was done to its files' weights would be done the other way round where it is saved.
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        left = [one for one in conversions if not any(map(_of_quantizer, _steps(one)))]
        model._weight_conversions = left  # type: ignore[assignment]


def _steps(conversion: Any) -> Any:
    return getattr(conversion, "operations", ())


def _of_quantizer(step: Any) -> bool:
    return getattr(step, "hf_quantizer", None) is not None
