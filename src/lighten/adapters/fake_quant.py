"""Linear layers that compute as their quantised selves will: quantisation-aware training.

Each token's input is rounded to 8 bits, asymmetric, and the weight to 4 bits, symmetric, a scale
per group of its rows' numbers (torchao's and ExecuTorch's 8da4w). Values are rounded and
dequantised by torchao's own primitives, and gradients go straight through (arXiv 1308.3432), so
that what its `quantize_` later makes of the weight computes the same. An adapter's update is
added to the weight *before* that is rounded: rounded apart they would not add up to what is
shipped.

Dimensions: N rows, I input features, O output features, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lighten.errors import UserError
from lighten.wording import with_article

# XNNPACK, which runs the format on phones, takes groups of whole multiples of this.
GROUP_MULTIPLE = 32

# First row, one past the last, A [r, I] and B [O, r] in float32, and the factor before B A.
Update = tuple[int, int, Tensor, Tensor, float]


class FakeQuantLinear(nn.Linear):
    """A linear layer whose class is changed in place: weight, hooks and ties stay what they are.

    Attributes:
        group_size: Numbers of a row that share a scale.
        computes: The format in which the weight will be shipped, and in which it is rounded.
        plain: Whether to compute unquantised just now: the untouched base is as it was.
    """

    group_size: int
    computes: torch.dtype
    plain: Callable[[], bool]

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] → [..., O]."""
        if self.plain():
            return F.linear(x, self.weight, self.bias)
        out: Tensor = checkpoint(
            self._product, x, use_reentrant=False, preserve_rng_state=False
        )  # nothing the size of the weight waits for the backward pass
        return out

    def with_updates(self, x: Tensor, updates: Sequence[Update]) -> Tensor:
        """The layer with adapters' updates in its weight, each on its own rows.

        Args:
            x: [..., I].
            updates: In order of their rows; other rows take the layer without any.
        """
        flat = x.reshape(-1, x.shape[-1])
        outs, row = [], 0
        for start, stop, A, B, scale in updates:
            if start > row:
                outs.append(self(flat[row:start]))
            outs.append(
                checkpoint(
                    self._product, flat[start:stop], A, B, scale,
                    use_reentrant=False, preserve_rng_state=False,
                )
            )  # fmt: skip
            row = stop
        if row < len(flat):
            outs.append(self(flat[row:]))
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out.view(*x.shape[:-1], out.shape[-1])

    def _product(
        self, x: Tensor, A: Tensor | None = None, B: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        weight: Tensor = self.weight
        with torch.autocast(x.device.type, enabled=False):
            if A is not None and B is not None:
                weight = weight.float() + scale * (B @ A)
            # In training `x` is in that format too; a receipt computes in float32.
            rounded = fake_weight(weight.to(self.computes), self.group_size).to(x.dtype)
            bias = None if self.bias is None else self.bias.to(self.computes).to(x.dtype)
            return F.linear(fake_activations(x), rounded, bias)


class _Rounded(torch.autograd.Function):
    """Values rounded to integers with a scale per block and dequantised; gradients pass as is.

    The calls are those that torchao's conversion makes, in their order and format, so that both
    round alike in 16 bits too: its fake-quantisers keep scales in float32 (0.18.0).
    """

    @staticmethod
    def forward(_ctx: Any, x: Tensor, block: list[int], lowest: int, highest: int) -> Tensor:
        from torchao.quantization.quant_primitives import (
            MappingType,
            choose_qparams_affine,
            dequantize_affine,
            quantize_affine,
        )

        symmetric = highest < torch.iinfo(torch.int8).max
        scale, zero = choose_qparams_affine(
            x, MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC, block,
            target_dtype=torch.int8, quant_min=lowest, quant_max=highest,
            zero_point_dtype=torch.int8,
        )  # fmt: skip
        integers = torch.int8, lowest, highest
        codes = quantize_affine(x, block, scale, zero, *integers)
        weight: Tensor = dequantize_affine(
            codes, block, scale, zero, *integers, output_dtype=x.dtype
        )
        return weight

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None, None


def fake_weight(weight: Tensor, group_size: int) -> Tensor:
    """A weight [O, I] rounded to 4 bits, symmetric per group, and dequantised."""
    rounded: Tensor = _Rounded.apply(weight, [1, group_size], -8, 7)
    return rounded


def fake_activations(x: Tensor) -> Tensor:
    """Inputs [..., I] rounded to 8 bits, asymmetric per token, and dequantised."""
    rounded: Tensor = _Rounded.apply(x, [*[1] * (x.dim() - 1), x.shape[-1]], -128, 127)
    return rounded


def scheme(group_size: int) -> Any:
    """Torchao's configuration of the same format."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup

    return Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]  # not in PyTorch's stubs
        weight_granularity=PerGroup(group_size),
    )


def rows_that_suit(model: nn.Module, head: nn.Module | None, group_size: int) -> list[str]:
    """Paths of the linear layers that are quantised: all but the head.

    Args:
        model: Its weights may be shapes alone.
        head: Of the model.
        group_size: Numbers of a row that share a scale.

    Raises:
        UserError: There is none, or groups do not divide the rows of one.
    """
    unsuitable = [
        (path, layer)
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head
    ]
    if not unsuitable:
        raise UserError(
            f"qat: {type(model).__name__} has no linear layer beside its head that torchao could "
            "quantise; leave qat out"
        )
    for path, layer in unsuitable:
        if layer.in_features % group_size:
            raise UserError(
                f"qat_group_size: {group_size} does not divide the rows of {path}, which have "
                f"{layer.in_features} numbers; choose a multiple of {GROUP_MULTIPLE} that does, or "
                "leave qat out"
            )
    return [path for path, _ in unsuitable]


def fake_quantise(
    model: PreTrainedModel,
    group_size: int,
    *,
    computes: torch.dtype | None = None,
    plain: Callable[[], bool] = lambda: False,
) -> None:
    """Let every linear layer but the head compute as its quantised self.

    Args:
        model: In place.
        group_size: Numbers of a row that share a scale.
        computes: The format of what will be shipped; None: that of the weights.
        plain: Whether layers shall compute unquantised when they are called.

    Raises:
        UserError: The shapes do not suit.
    """
    for path in rows_that_suit(model, model.get_output_embeddings(), group_size):
        layer = model.get_submodule(path)
        if type(layer) is not nn.Linear:
            raise UserError(
                f"qat: {path} is {with_article(type(layer).__name__)}, which torchao would not "
                "quantise; train on the plain, unquantised model"
            )
        fake: Any = layer
        fake.__class__ = FakeQuantLinear
        fake.group_size, fake.plain = group_size, plain
        fake.computes = computes or layer.weight.dtype


def make_plain(model: nn.Module) -> None:
    """Undo `fake_quantise`, in place."""
    for layer in model.modules():
        if isinstance(layer, FakeQuantLinear):
            del layer.group_size, layer.plain, layer.computes
            layer.__class__ = nn.Linear  # type: ignore[assignment]


def fake_layers(model: nn.Module) -> dict[str, FakeQuantLinear]:
    """The layers that compute as their quantised selves, by path."""
    return {p: m for p, m in model.named_modules() if isinstance(m, FakeQuantLinear)}


def really_quantised(layer: FakeQuantLinear, weight: Tensor | None = None) -> nn.Linear:
    """What torchao makes of the layer.

    Args:
        layer: Which.
        weight: [O, I] in its place, such as with an update; None: its own.
    """
    from torchao.quantization import quantize_

    with torch.device("meta"):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    trained_weight = layer.weight if weight is None else weight
    linear.weight = nn.Parameter(trained_weight.detach().to(layer.computes), requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().to(layer.computes), requires_grad=False)
    quantize_(linear, scheme(layer.group_size))
    return linear.eval()


@contextmanager
def standing_in(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Other modules at these paths until the end of the block."""
    originals = {path: model.get_submodule(path) for path in modules}
    try:
        for path, module in modules.items():
            model.set_submodule(path, module)
        yield
    finally:
        for path, module in originals.items():
            model.set_submodule(path, module)
