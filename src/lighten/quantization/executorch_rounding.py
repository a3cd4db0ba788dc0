"""How a program for a phone is rounded.

Linear layers but the head have 4-bit weights, symmetric, a scale per group along a
row, and 8-bit activations, rounded anew for each token (8da4w): what `qat` trains for. The head has
8-bit weights, and words are looked up in 8 bits.

Dimensions: O outputs, I inputs, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lighten.quantization import gptq
from lighten.quantization.calibrated import rounded_layers
from lighten.quantization.targets import GROUP_SIZE

# XNNPACK computes with scales in bfloat16: weights are rounded for those.
SCALES = gptq.Scales(torch.bfloat16, signed=False)
ROUNDED = "rounded.safetensors"  # the weights, for as long as an export and its receipt take


@dataclass(frozen=True)
class ProgramRounding:
    """How a model's weights are rounded.

    Attributes:
        group_size: Numbers of a row that share a scale.
        calibration: Token ids of rows that the rounding is chosen on; None: each number goes to
            its nearest, as after a training that rounded so.
        learnt_in: Format in which that training rounded weights. In 16 bits others of them are
            ties, so that from float32 some would go to the other side. None: there was none.
    """

    group_size: int = GROUP_SIZE
    calibration: Sequence[Sequence[int]] | None = None
    learnt_in: str | None = None

    def apply(self, model: Any, written: Path | None = None) -> list[str]:
        """Round a model's weights, in place; activations from then on, too.

        Args:
            model: A transformers model in float32.
            written: What `write_rounded` kept of this model when it was rounded before: nothing is
                chosen again, and the weights are those of then.

        Returns:
            What is not in 4 bits, or not calibrated, a sentence each.
        """
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if head is not None and head.weight is embedding.weight:
            # Words are looked up in another granularity than they are scored: two tensors from now.
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        _with_linear_layers(model)
        calibrated = self.calibration is not None and written is None
        rounded = rounded_layers(
            model, self.calibration or (), self._groups_of, SCALES
        ) if calibrated else {}  # fmt: skip
        layers = {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear)}
        odd = 0
        for path, layer in layers.items():
            groups = None if layer is head else self._groups_of(layer)
            odd += layer is not head and groups is None
            _round_layer(layer, groups, self.learnt_in)
            if path in rounded:
                _replace(layer, *rounded[path])
        _round_words(model, embedding)
        if written is not None:
            _read_rounded(model, written)
        notes = []
        if odd:
            notes.append(
                f"{odd} of {len(layers)} linear layers have 8-bit weights: their rows are no "
                f"multiple of {GROUP_SIZE}"
            )
        if calibrated and not rounded and odd < len(layers):
            notes.append("weights are rounded to their nearest: its decoder layers are not known")
        return notes

    def _groups_of(self, layer: nn.Linear) -> int | None:
        """The size of a layer's groups; None: its rows are no multiple of one that is known."""
        sizes = dict.fromkeys((self.group_size, GROUP_SIZE))
        return next((size for size in sizes if layer.in_features % size == 0), None)


def _round_layer(layer: nn.Linear, group_size: int | None, learnt_in: str | None = None) -> None:
    """To 4 bits in groups, or to 8 bits with a scale a row; each number to its nearest.

    Args:
        layer: In float32, rounded in place.
        group_size: None: 8 bits.
        learnt_in: As of `ProgramRounding`.
    """
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=getattr(torch, "int4" if group_size else "int8"),
        weight_granularity=PerGroup(group_size) if group_size else PerAxis(0),
    )
    rounded = layer
    if group_size and learnt_in not in (None, "float32"):
        with torch.device("meta"):
            rounded = nn.Linear(layer.in_features, layer.out_features, bias=False)
        weight: Any = layer.weight.detach().to(getattr(torch, str(learnt_in)))
        rounded.weight = nn.Parameter(weight, requires_grad=False)
        quantize_(rounded, config)
    quantize_(layer, config)
    if group_size:
        # Scales as XNNPACK will have them. Integers stay: a run with `qat` learnt those.
        weight = rounded.weight
        _replace(layer, weight.qdata, SCALES.stored(weight.scale))


def _replace(layer: nn.Linear, integers: Tensor, scales: Tensor) -> None:
    """Give a rounded layer other integers [O, I] and scales [O, G]."""
    weight: Any = layer.weight
    weight.qdata.copy_(integers)
    weight.scale.copy_(scales)


def _rounded_weights(model: nn.Module) -> dict[str, Any]:
    """The weights that are integers and scales, by path."""
    weights = {path: getattr(module, "weight", None) for path, module in model.named_modules()}
    return {path: weight for path, weight in weights.items() if hasattr(weight, "qdata")}


def write_rounded(model: nn.Module, file: Path) -> None:
    """Keep a rounded model's integers and scales, for the same model to be given them.

    Args:
        model: That `ProgramRounding.apply` rounded.
        file: In safetensors.
    """
    from safetensors.torch import save_file

    parts = {}
    for path, weight in _rounded_weights(model).items():
        parts[f"{path}.integers"], parts[f"{path}.scales"] = weight.qdata, weight.scale
    save_file(parts, file)


def _read_rounded(model: nn.Module, file: Path) -> None:
    from safetensors import safe_open

    with safe_open(file, "pt") as parts:
        for path, weight in _rounded_weights(model).items():
            weight.qdata.copy_(parts.get_tensor(f"{path}.integers"))
            weight.scale.copy_(parts.get_tensor(f"{path}.scales"))


def _round_words(model: nn.Module, embedding: Any) -> None:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis

    embedding.padding_idx = None  # of training alone, and a lookup with it stays in float32
    quantize_(
        model,
        IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0)),
        lambda module, _: module is embedding,
    )


def _with_linear_layers(model: nn.Module) -> None:
    """GPT-2's layers, which hold their weights the other way round, as linear ones."""
    from transformers.pytorch_utils import Conv1D

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Conv1D):
                inputs, outputs = layer.weight.shape
                linear = nn.Linear(inputs, outputs)
                linear.weight = nn.Parameter(layer.weight.detach().T.contiguous(), False)
                linear.bias = nn.Parameter(layer.bias.detach(), False)
                setattr(parent, name, linear)
