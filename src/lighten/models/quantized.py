"""Linear layers of a frozen base kept in NF4, FP4 or INT8 by bitsandbytes.

The layers are bitsandbytes' own with two differences, on any device:

- Their product is x Wᵀ with W dequantised, forward and backward; the dense weight lives for the
  length of the product and is never kept for the backward pass. For INT8 that is more exact than
  LLM.int8 (arXiv 2208.07339), which rounds the activations to 8 bits as well.
- A 4-bit weight is dequantised as one long row. bitsandbytes' kernel for processors begins a new
  block with each row, so that rows whose length is no multiple of the block came out wrong.

NF4 and double quantisation: QLoRA, arXiv 2305.14314, section 3. Embeddings, norms and the head stay
as they are, in the format that the products are computed in.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lighten.errors import UserError, require_package
from lighten.machine.hardware import Choice

# On import bitsandbytes complains of lacking a kernel that is not used here; peft imports it too.
# And it tells of every product of INT8 that its input is rounded.
for _name in ("backends.cpu.ops", "autograd._functions"):
    logging.getLogger(f"bitsandbytes.{_name}").setLevel(logging.ERROR)
THEIR_LAYERS = ("Linear4bit", "Linear8bitLt")  # bitsandbytes' layers
BLOCK_OF_FOUR_BITS = 64  # numbers per scale, bitsandbytes' default
BLOCK_OF_SCALES = 256  # scales per scale of their own, with double quantisation


@dataclass(frozen=True)
class Storage:
    """How frozen linear weights are stored.

    Attributes:
        kind: `nf4`, `fp4` or `int8`.
        double: Whether the blocks' scales are quantised too (4 bits only).
    """

    kind: str
    double: bool = False

    def __str__(self) -> str:
        return f"{self.kind}, scales quantised too" if self.double else self.kind

    def config(self, compute: torch.dtype) -> BitsAndBytesConfig:
        """The same for transformers, which then quantises each weight as it is read."""
        if self.kind == "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.kind,
            bnb_4bit_use_double_quant=self.double,
            bnb_4bit_compute_dtype=compute,
        )


@dataclass(frozen=True)
class Census:
    """What a model's weights are.

    Attributes:
        parameters: All of them, tied ones once.
        quantized: Those in quantised layers.
        stacked: Those of fused experts, whose weights [E, O, I] no quantised layer can hold.
        weight_bytes: What they take, scales and tables included.
        storage: How the quantised ones are stored; None if there are none.
    """

    parameters: int
    quantized: int
    stacked: int
    weight_bytes: int
    storage: Storage | None


class WeightFetched(torch.autograd.Function):
    """x Wᵀ + b with W made for the product alone by `dense_weight`, once more in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        """[..., I] → [..., O]; the layer is kept, its weight is not."""
        ctx.layer = layer
        return F.linear(x, layer.dense_weight(), layer.bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """[..., O] → [..., I]; a frozen weight has no gradient."""
        return grad @ ctx.layer.dense_weight(), None


def require_bitsandbytes() -> None:
    """Say so if bitsandbytes is missing.

    Raises:
        MissingExtra: It is not installed.
    """
    require_package("bitsandbytes", "quant")


def dense_of_4bit(
    packed: Tensor, absmax: Tensor, state: Any, shape: torch.Size, compute: torch.dtype
) -> Tensor:
    """A 4-bit weight, dequantised as one long row.

    Args:
        packed: Its numbers, two in a byte.
        absmax: Of its blocks.
        state: bitsandbytes' `QuantState`, of which all but `absmax` and `shape` is read.
        shape: [O, I].
        compute: The format of the products.

    Returns:
        [O, I] in `compute`.
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit

    row = QuantState(
        absmax=absmax,
        shape=torch.Size((1, 2 * packed.numel() * packed.element_size())),
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=compute,
        offset=state.offset,
        state2=state.state2,
    )
    dense: Tensor = dequantize_4bit(packed, row)
    return dense.reshape(-1)[: shape.numel()].view(shape)


def dense_of_int8(numbers: Tensor, scales: Tensor, compute: torch.dtype) -> Tensor:
    """An INT8 weight dequantised.

    As `int8_vectorwise_dequant` does it, but rounded on the way: no float32 copy is made.

    Args:
        numbers: [O, I].
        scales: [O], the largest of each row, which 127 stands for.
        compute: The format of the products.

    Returns:
        [O, I] in `compute`.
    """
    dense = torch.empty_like(numbers, dtype=compute)
    return torch.mul(numbers, scales[:, None] / 127, out=dense)


@functools.cache
def layer_types() -> tuple[type[nn.Linear], type[nn.Linear]]:
    """The layer for 4 bits and the one for 8, made when first used: bitsandbytes is an extra."""
    require_bitsandbytes()
    import bitsandbytes as bnb

    class Linear4bit(bnb.nn.Linear4bit):
        """A frozen linear layer in 4 bits."""

        @property
        def storage(self) -> Storage:
            """How its weight is stored."""
            state = self.weight.quant_state
            return Storage(state.quant_type, state.nested)

        def dense_weight(self) -> Tensor:
            """The weight [O, I] in the format of the products."""
            state = self.weight.quant_state
            return dense_of_4bit(
                self.weight.data, state.absmax, state, state.shape, self.compute_dtype
            )

        def forward(self, x: Tensor) -> Tensor:
            """The product, x Wᵀ + b."""
            return WeightFetched.apply(x, self)

    class Linear8bit(bnb.nn.Linear8bitLt):
        """A frozen linear layer in 8 bits, one scale per output."""

        compute_dtype: torch.dtype
        storage = Storage("int8")

        def dense_weight(self) -> Tensor:
            """The weight [O, I] in the format of the products."""
            return dense_of_int8(self.weight.data, self.weight.SCB, self.compute_dtype)

        def forward(self, x: Tensor) -> Tensor:
            """The product, x Wᵀ + b; the activations are not quantised."""
            return WeightFetched.apply(x, self)

    return Linear4bit, Linear8bit


def choose(four: bool, eight: bool, quant_type: str, double: bool) -> Storage | None:
    """The storage that the settings ask for, None if they ask for none.

    Raises:
        UserError: Both 4 and 8 bits are asked for.
        MissingExtra: bitsandbytes is not installed.
    """
    if four and eight:
        raise UserError("load_in_4bit and load_in_8bit cannot both be true; keep one")
    if not (four or eight):
        return None
    require_bitsandbytes()
    return Storage(quant_type, double) if four else Storage("int8")


def finish(
    model: PreTrainedModel, storage: Storage | None, compute: torch.dtype, device: str
) -> None:
    """Bring a model's linear layers into our form, one by one: no more than one is dense twice.

    Args:
        model: Its layers are dense, or bitsandbytes' own.
        storage: What becomes of dense layers other than the head; None leaves them as they are.
        compute: The format that products are computed in.
        device: Where quantised layers go.
    """
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if type(module).__name__ in THEIR_LAYERS:
            layer = _adopted(module, compute)
        elif storage is not None and module is not head and type(module) in (nn.Linear, Conv1D):
            layer = quantised(module, storage, compute, device)
        else:
            continue
        model.set_submodule(path, layer)


def copy_out_of_files(model: nn.Module) -> None:
    """Copy what stayed dense, so that no tensor keeps the weight files mapped.

    A dense tensor of the files' own format is a view of their mapping, and a mapping goes as a
    whole: one embedding kept the pages of every weight that was read to be quantised.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.untyped_storage().nbytes():
            tensor.data = tensor.data.clone()


def quantised(module: nn.Module, storage: Storage, compute: torch.dtype, device: str) -> nn.Module:
    """A dense linear layer's weight in few bits, in our layer.

    Args:
        module: `nn.Linear` or `Conv1D`.
        storage: How it is stored.
        compute: The format of the products.
        device: Where it goes.

    Raises:
        MissingExtra: bitsandbytes is not installed.
    """
    layer_types()  # says so if bitsandbytes is missing
    import bitsandbytes as bnb

    weight: Tensor = module.weight.data  # type: ignore[assignment]
    dense = weight.T.contiguous() if isinstance(module, Conv1D) else weight
    packed: Any
    if storage.kind == "int8":
        packed = bnb.nn.Int8Params(dense.cpu(), requires_grad=False).to(device)
    else:
        packed = bnb.nn.Params4bit(
            dense, quant_type=storage.kind, compress_statistics=storage.double
        ).to(device)
    return packed_layer(packed, module.bias, dense.shape, compute, type(module))


def rounded(weight: Tensor, storage: Storage, compute: torch.dtype) -> Tensor:
    """A dense weight as a quantised layer computes with it, dequantised.

    Args:
        weight: [O, I], in the format in which it would be quantised.
        storage: How it would be stored.
        compute: The format of the products.

    Returns:
        [O, I] in `compute`.

    Raises:
        MissingExtra: bitsandbytes is not installed.
    """
    with torch.device("meta"):
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    layer: Any = quantised(plain, storage, compute, "cpu")
    dense: Tensor = layer.dense_weight()
    return dense


def _adopted(module: nn.Module, compute: torch.dtype) -> nn.Module:
    shape = torch.Size((int(module.out_features), int(module.in_features)))  # type: ignore[arg-type]
    source = getattr(module, "source_cls", nn.Linear)
    return packed_layer(module.weight, module.bias, shape, compute, source)


def packed_layer(
    weight: Any, bias: Any, shape: torch.Size, compute: torch.dtype, source: type[nn.Module]
) -> nn.Module:
    """Our layer over a quantised weight.

    Args:
        weight: Packed 4 bits with a `quant_state`, or int8 with its scales as `SCB`.
        bias: Of the layer, or None.
        shape: [O, I].
        compute: The format of the products.
        source: What the layer was.
    """
    four, eight = layer_types()
    layer: Any
    with torch.device("meta"):  # nothing is drawn at random only to be thrown away
        if weight.dtype == torch.int8:
            layer = eight(shape[1], shape[0], bias is not None, has_fp16_weights=False)  # type: ignore[call-arg]
        else:
            layer = four(shape[1], shape[0], bias is not None, compute_dtype=compute)  # type: ignore[call-arg]
    layer.weight, layer.bias = weight, bias
    layer.compute_dtype = compute
    # GPT-2's Conv1D keeps its weight as [I, O]; a dense copy must become one again.
    layer.source_cls = source
    if weight.dtype != torch.int8:
        weight.module, layer.quant_state = layer, weight.quant_state
    return layer.requires_grad_(False).eval()


def census(model: nn.Module) -> Census:
    """Count a model's weights as they are stored."""
    layers_by_weight = {id(m.weight): m for m in model.modules() if hasattr(m, "dense_weight")}
    layers = [
        layer for layer in layers_by_weight.values() if getattr(layer, "storage", None) is not None
    ]
    convolutions = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv1d)}
    parameters = quantized = stacked = weight_bytes = 0
    counted: set[int] = set()
    for parameter in model.parameters():
        layer: Any = layers_by_weight.get(id(parameter))
        numbers = parameter.numel() if layer is None else layer.in_features * layer.out_features
        parameters += numbers
        quantized += numbers if getattr(layer, "storage", None) is not None else 0
        fused = parameter.dim() == 3 and id(parameter) not in convolutions
        stacked += numbers if layer is None and fused else 0
        if hasattr(layer, "streamed_bytes"):  # of which none is here
            weight_bytes += layer.streamed_bytes
            continue
        for part in _parts(parameter, quantised=layer is not None):
            if part.data_ptr() not in counted:  # layers share tables
                counted.add(part.data_ptr())
                weight_bytes += part.numel() * part.element_size()
    for module in model.modules():
        # Layers of GPTQ and its kin have no parameter: 32 bits of a buffer hold several weights.
        packed = getattr(module, "qweight", None)
        if isinstance(packed, Tensor) and packed.dtype == torch.int32:
            parameters += packed.numel() * (32 // _packed_bits(model))
            weight_bytes += sum(b.numel() * b.element_size() for b in module.buffers(recurse=False))
    storage: Any = layers[0].storage if layers else None
    return Census(parameters, quantized, stacked, weight_bytes, storage)


def _parts(parameter: Tensor, *, quantised: bool) -> Iterator[Tensor]:
    """What a parameter lies in: torchao's tensors are several, and have no storage themselves."""
    names = getattr(parameter, "tensor_data_names", None)
    if names is not None:
        yield from (getattr(parameter, name) for name in names)
        return
    yield parameter
    if quantised:
        yield from scales_of(parameter)


def _packed_bits(model: nn.Module) -> int:
    settings: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    bits = settings.get("bits") if isinstance(settings, dict) else getattr(settings, "bits", None)
    return int(bits or 4)


def explain(model: PreTrainedModel, storage: Storage | None) -> Choice | None:
    """How a model's linear layers are stored, and why; None if in no special way."""
    totals = census(model)
    if totals.storage is None:
        return None
    setting = "load_in_8bit" if totals.storage.kind == "int8" else "load_in_4bit"
    why = f"{setting} of the recipe" if storage is not None else "the model's files hold them so"
    share = totals.quantized / totals.parameters
    dense = "the rest is dense"
    if totals.stacked:
        dense += f", {totals.stacked:,} of fused experts, which bitsandbytes has no layer for"
    return Choice(str(totals.storage), f"{why}; {share:.0%} of the parameters, {dense}")


def scales_of(weight: Any) -> Iterator[Tensor]:
    """Whatever it takes to dequantise a weight, beside the weight."""
    if weight.dtype == torch.int8:
        yield weight.SCB
        return
    state = weight.quant_state
    yield from (state.absmax, state.code)
    if state.nested:
        yield from (state.offset, state.state2.absmax, state.state2.code)
