"""The base's linear layers as they serve: those that read the same input are one product.

Dimensions: N tokens of a step, I input features, O output features of all layers together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lighten.adapters.frozen import formats, is_linear, is_quantized, out_in_features, weight_of
from lighten.adapters.targets import sibling_paths
from lighten.generation.segments import Factors, Segments, Update

# Rows that a packed weight is laid out for: any number is right, few are quickest.
PACKED_FOR = 16


class Weights:
    """The weights of layers that read one input, as one matrix.

    On a processor oneDNN's own layout is made once: with few rows PyTorch's products of plain
    weights take up to twice as long. Quantised layers stay as they are.

    Args:
        layers: Their modules; dense ones give their weights up.

    Attributes:
        dtype: Of what is multiplied with them.
        device: Where they are.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = list(layers)
        self.dtype, self.device = formats(layers[0])["weight"], next(layers[0].parameters()).device
        self._weight: Tensor | None = None
        self._packed: Tensor | None = None
        self._bias: Tensor | None = None
        if any(is_quantized(layer) for layer in layers):
            return
        weights = [weight_of(layer) for layer in layers]
        stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
        biases: list[Any] = [layer.bias for layer in layers]
        if any(bias is not None for bias in biases):
            parts = [
                stacked.new_zeros(len(weight)) if bias is None else bias
                for weight, bias in zip(weights, biases, strict=True)
            ]
            self._bias = torch.cat(parts)
        self._layers = []
        if packs(stacked):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(stacked.contiguous(), PACKED_FOR)
        else:
            self._weight = stacked

    def product(self, x: Tensor) -> Tensor:
        """X Wᵀ + b: [N, I] → [N, O]."""
        if self._packed is not None:
            return _by_onednn(x, self._packed, self._bias)
        if self._weight is not None:
            return F.linear(x, self._weight, self._bias)
        parts = []
        for layer in self._layers:
            weight, bias = weight_of(layer), layer.bias
            # PyTorch's own product of float32 rounds a row as the number of rows says.
            by = _by_onednn if packs(weight) else F.linear
            parts.append(by(x, weight.contiguous(), bias))  # type: ignore[arg-type]
        return torch.cat(parts, -1)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X Wᵀ + b of a weight in its own layout or a plain one: each row is rounded alike."""
    # A lone row is added up in another order than each of many; two rows are not.
    single = len(x) == 1
    output: Tensor = torch.ops.mkldnn._linear_pointwise(
        x.expand(2, -1).contiguous() if single else x, weight, bias, "none", [], ""
    )
    return output[:1] if single else output


def packs(weight: Tensor) -> bool:
    """Whether oneDNN multiplies with a weight of this kind in a layout of its own."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and (weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


class Step:
    """Which segments the layers see now; one object shared by all of a model's layers.

    Attributes:
        segments: Of all tokens of a step.
        last: Of those that a next token follows on: what the head reads, in the same order.
    """

    def __init__(self) -> None:
        self.segments = Segments()
        self.last = Segments()


class Group:
    """Layers that read the same input, computed together when the first is called.

    Args:
        paths: Of the layers in the base.
        layers: Their modules.
        step: Of the model.
        head: Whether they are the model's head.
    """

    def __init__(
        self, paths: Sequence[str], layers: Sequence[nn.Module], step: Step, *, head: bool = False
    ) -> None:
        self.paths = tuple(paths)
        self.updates: dict[Any, Update] = {}
        self._step, self._head = step, head
        shapes = [out_in_features(layer) for layer in layers]
        self.inputs = shapes[0][1]
        ends = [sum(out for out, _ in shapes[: i + 1]) for i in range(len(shapes))]
        starts = [0, *ends[:-1]]
        self.columns = tuple(slice(a, b) for a, b in zip(starts, ends, strict=True))
        self._weights = Weights(layers)
        self.dtype, self.device = self._weights.dtype, self._weights.device
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def output(self, place: int, x: Tensor) -> Tensor:
        """The output of the layer at a place on x: [..., I] → [..., its O]."""
        if self._input is not x or place not in self._outputs:
            flat = x.reshape(-1, x.shape[-1])
            y = self._weights.product(flat)
            segments = self._step.last if self._head else self._step.segments
            segments.add(y, flat, self.updates)
            y = y.view(*x.shape[:-1], y.shape[-1])
            self._input = x
            self._outputs = {i: y[..., columns] for i, columns in enumerate(self.columns)}
        output = self._outputs.pop(place)
        if not self._outputs:
            self._input = None
        return output

    @torch.no_grad()
    def weight_at(self, path: str, places: Tensor) -> Tensor:
        """A layer's weights of n of its inputs: [n] → [n, O]."""
        device = places.device
        x = torch.zeros(len(places), self.inputs, dtype=self._weights.dtype, device=device)
        plain = self._weights.product(x)
        x[torch.arange(len(places), device=device), places] = 1
        columns = self.columns[self.paths.index(path)]
        return (self._weights.product(x) - plain)[:, columns]

    def add(self, adapter: Any, factors: Mapping[str, Factors], device: torch.device) -> int:
        """Take in what an adapter adds to these layers.

        Args:
            adapter: What segments name it by.
            factors: By path; other paths are left out.
            device: Where the base is.

        Returns:
            Bytes of memory.
        """
        by_place = {
            place: factors[path] for place, path in enumerate(self.paths) if path in factors
        }
        self.updates[adapter] = Update(by_place, self.columns, self.inputs, device)
        return self.updates[adapter].size_bytes

    def forget(self, adapter: Any) -> None:
        """Give an adapter's memory back."""
        self.updates.pop(adapter, None)


class ServedLinear(nn.Module):
    """In the place of a base's linear layer: its share of a group's output.

    Attributes:
        weight: For code that asks a layer's weight for its format, shape or device; no number.
    """

    def __init__(self, group: Group, place: int) -> None:
        super().__init__()
        self._group = group
        self._place = place
        columns = group.columns[place]
        self.in_features, self.out_features = group.inputs, columns.stop - columns.start
        number = torch.full((), torch.nan, dtype=group.dtype, device=group.device)
        self.weight = number.expand(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] → [..., O]."""
        return self._group.output(self._place, x)


def linear_paths(model: nn.Module) -> list[str]:
    """Paths of a model's linear layers outside of experts."""
    return [
        path
        for path, module in model.named_modules()
        if is_linear(module) and ".experts." not in path
    ]


def install(model: PreTrainedModel) -> tuple[Step, dict[str, Group]]:
    """Put groups in the place of every linear layer of a model outside of experts.

    Returns:
        What the layers follow, and each layer's group by path.
    """
    step, head, paths = Step(), model.get_output_embeddings(), linear_paths(model)
    siblings = sibling_paths(paths)
    lone = set(paths) - {path for group in siblings for path in group}
    groups: dict[str, Group] = {}
    for members in (*siblings, *([path] for path in paths if path in lone)):
        layers = [model.get_submodule(path) for path in members]
        group = Group(members, layers, step, head=head in layers)
        for place, path in enumerate(members):
            groups[path] = group
            model.set_submodule(path, ServedLinear(group, place))
    return step, groups
