"""Which linear layers a format has room for, by their shapes alone.

bitsandbytes (0.50.2) computes with 4 bits on processors where a row is whole blocks of 64 and
outputs come in 32s. Other rows get the scales of their neighbours' blocks, and processors with
bfloat16 arithmetic refuse them. They stay dense, which every loader of the folder understands.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lighten.adapters.decoder import decoder_layers, stacked_experts
from lighten.errors import UserError
from lighten.quantization.targets import DYNAMIC
from lighten.wording import counted

BLOCK, OUTPUTS = 64, 32


def linear_layers(model: PreTrainedModel, *, conv: bool = True) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the linear layers but the head, by path.

    Args:
        model: Its weights may be on the meta device.
        conv: GPT-2's `Conv1D` is one.
    """
    head = model.get_output_embeddings()
    shapes: dict[str, tuple[int, int]] = {}
    for path, module in model.named_modules():
        if module is head or not isinstance(module, (nn.Linear, Conv1D) if conv else nn.Linear):
            continue
        rows, columns = (int(size) for size in module.weight.shape)
        shapes[path] = (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
    return shapes


def dense_in_nf4(shapes: dict[str, tuple[int, int]]) -> list[str]:
    """Paths of those `linear_layers` that an NF4 folder keeps in 16 bits; the head always is.

    Raises:
        UserError: They are all.
    """
    dense = [path for path, shape in shapes.items() if shape[1] % BLOCK or shape[0] % OUTPUTS]
    if len(dense) == len(shapes):
        raise UserError(
            f"nf4 needs linear layers with rows that blocks of {BLOCK} divide and outputs in "
            f"{OUTPUTS}s, and the model's have rows of {_rows(shapes)}; use int8"
        )
    return dense


def about_nf4(model: PreTrainedModel) -> str:
    """What has to be said of layers that stay dense; nothing where none does.

    Raises:
        UserError: They all would.
    """
    shapes = linear_layers(model)
    reason = (
        f"their rows are no multiples of {BLOCK} or their outputs of {OUTPUTS}, with which "
        "bitsandbytes does not compute on processors"
    )
    return about_dense(dense_in_nf4(shapes), shapes, reason)


def about_int8(model: PreTrainedModel) -> str:
    """What has to be said of layers that torchao's INT8 leaves; nothing where it leaves none."""
    shapes = linear_layers(model)
    left = shapes.keys() - linear_layers(model, conv=False).keys()
    reason = "torchao takes PyTorch's own layers, and not GPT-2's; int8:bitsandbytes takes them too"
    return about_dense(left, shapes, reason)


def about_dense(dense: Collection[str], shapes: dict[str, tuple[int, int]], reason: str) -> str:
    """That layers stay in 16 bits, and why; nothing where none does."""
    if not dense:
        return ""
    sizes = {path: outputs * inputs for path, (outputs, inputs) in shapes.items()}
    share = sum(sizes[path] for path in dense) / sum(sizes.values())
    return (
        f"{counted(len(dense), 'linear layer')} of {len(shapes)}, {share:.0%} of their weights, "
        f"stay in 16 bits: {reason}"
    )


def about_experts(model: PreTrainedModel) -> str:
    """What has to be said of experts that are stacked in one tensor; nothing where none are."""
    stacked = sum(
        layer.get_parameter(name).numel()
        for layer in decoder_layers(model)
        for name in stacked_experts(layer)
    )
    if not stacked:
        return ""
    share = stacked / sum(parameter.numel() for parameter in model.parameters())
    return (
        f"the experts, {share:.0%} of the weights, stay in 16 bits: they are stacked in one tensor "
        "each layer, and formats of linear layers leave them as they are"
    )


def require_groups(model: PreTrainedModel, group_size: int) -> None:
    """Rows that groups do not divide would be left as they are in silence.

    Raises:
        UserError: There are some.
    """
    shapes = linear_layers(model, conv=False)
    if not shapes or any(inputs % group_size for _, inputs in shapes.values()):
        raise UserError(
            f"{DYNAMIC} needs linear layers with rows that groups of {group_size} divide, and the "
            f"model's have rows of {_rows(shapes)}; use int8 or nf4"
        )


def _rows(shapes: dict[str, tuple[int, int]]) -> str:
    return ", ".join(map(str, sorted({inputs for _, inputs in shapes.values()}))) or "no kind"


def words_in_int8(model: PreTrainedModel) -> bool:
    """Whether embedding and head are one tensor, which an INT8 folder of torchao's can hold.

    Gemma 3's embedding has a buffer beside its weight, which transformers (5.24) does not make
    where the weight is torchao's: the loaded model would answer at random.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    shared = head is not None and head.weight is embedding.weight
    return shared and not any(True for _ in embedding.buffers())
