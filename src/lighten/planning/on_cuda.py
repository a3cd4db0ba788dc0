"""What a CUDA device does otherwise than the processor whose fake tensors a trace has.

PyTorch chooses the kernel by device: a processor's own copies grouped keys and values for every
query head, a GPU's reads them as they are, and neither keeps what the other does. Meanwhile, in the
backward pass, a GPU's needs room of its own.

Dimensions: B rows, H query heads and K of keys and values, T tokens, D features of a head.
Sources: pytorch/aten/src/ATen/native/transformers/cuda/sdp_utils.cpp and flash_attn/flash_api.cpp;
what an H100's allocator was asked for (PyTorch 2.11).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import masking_utils

from lighten.adapters import ops
from lighten.cpu import dropout, products
from lighten.cpu.kernels import formats
from lighten.data.batches import MicroBatch

FLASH_SINCE = (8, 0)  # compute capability
CUDNN_SINCE = (9, 0)  # PyTorch prefers cuDNN's flash attention, which asks for its room at once
MOST_FEATURES = 256  # of a head, for every fused kernel


@contextmanager
def as_on_cuda(capability: tuple[int, int] | None) -> Iterator[None]:
    """Attention by the operation that a CUDA device would choose, and merged low-rank products.

    Nor has it the kernels of a processor, whose fake tensors these are.

    Args:
        capability: Compute capability; None: a recent device.
    """
    capability = capability or CUDNN_SINCE
    has_flash, at_once = capability >= FLASH_SINCE, capability >= CUDNN_SINCE
    with ExitStack() as stack:
        # By name: a mode of torch's would not hold while layers are recomputed in a backward pass.
        attend = partial(_attend, has_flash, at_once)
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", attend))
        stack.enter_context(patch.object(ops, "launches_cost", _yes))
        stack.enter_context(patch.object(formats, "obstacle", _elsewhere))
        stack.enter_context(patch.object(dropout, "library", _none))
        stack.enter_context(patch.object(products, "is_slow_on_mkl", _none))
        # From positions that it cannot read transformers concludes that rows may be packed, and
        # makes a mask for them: real ones are read, and show that they are not.
        stack.enter_context(patch.object(masking_utils, "find_packed_sequence_indices", _none))
        yield


@contextmanager
def as_unpacked(batches: Sequence[MicroBatch]) -> Iterator[None]:
    """What transformers concludes on a processor from positions that are no fake ones.

    Where learnt prompts stand in front of rows, their positions cannot be read, and it would make
    a mask that a real step does without.

    Args:
        batches: Those that are traced; packed ones have positions, and a mask for them.
    """
    packed = any(batch.position_ids is not None for batch in batches)
    read = nullcontext() if packed else patch.object(
        masking_utils, "find_packed_sequence_indices", _none
    )  # fmt: skip
    with read:
        yield


def _attend(
    has_flash: bool,
    at_once: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    aten = torch.ops.aten
    half = query.dtype in (torch.float16, torch.bfloat16)
    # Flash attention wants values as wide as keys, which those of latent attention are not.
    narrow = query.shape[-1] == value.shape[-1] <= MOST_FEATURES
    if has_flash and half and narrow and attn_mask is None:
        out: Tensor = _Flash.apply(query, key, value, dropout_p, is_causal, scale, at_once)
        return out
    if query.shape[1] == key.shape[1] == value.shape[1]:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
        outputs = aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
        )
    else:
        outputs = aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal,
            scale=scale, enable_gqa=enable_gqa,
        )  # fmt: skip
    return outputs[0]


class _Flash(torch.autograd.Function):
    """Flash attention with the room that its backward pass needs beside the gradients.

    Gradients of queries are summed in float32, and those of keys and values are formed for every
    query head before those of a group are added.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool,
        scale: float | None, at_once: bool,
    ) -> Tensor:  # fmt: skip
        outputs = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )
        out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = outputs
        ctx.save_for_backward(query, key, value, out, lse, cum_q, cum_k, seed, offset)
        ctx.longest, ctx.options = (max_q, max_k), (dropout_p, is_causal, scale, at_once)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, cum_q, cum_k, seed, offset = ctx.saved_tensors
        dropout_p, is_causal, scale, at_once = ctx.options
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, query, key, value, out, lse, cum_q, cum_k, *ctx.longest, dropout_p, is_causal,
            seed, offset, scale=scale,
        )  # fmt: skip
        rows, heads, tokens, _ = query.shape
        sizes = [4 * rows * heads * tokens, 4 * query.numel()]  # of the sums, in bytes
        if heads > key.shape[1]:
            each = key.element_size() * key.numel() * heads // key.shape[1]
            sizes += [each, each]
        room = [query.new_empty(size, dtype=torch.uint8)
                for size in ([sum(sizes)] if at_once else sizes)]  # fmt: skip
        del room
        return *gradients, None, None, None, None


def _none(*args: Any, **kwargs: Any) -> None:
    del args, kwargs


def _elsewhere(*args: Any) -> str:
    del args
    return "the plan is for a GPU"


def _yes(*args: Any) -> bool:
    del args
    return True
