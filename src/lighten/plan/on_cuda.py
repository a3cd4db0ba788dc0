"""What a CUDA device does otherwise than the processor whose fake tensors a trace has.

PyTorch chooses the kernel by device: a processor's own copies grouped keys and values for every
query head, a GPU's reads them as they are, and neither keeps what the other does.

Source: pytorch/aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import masking_utils

from lighten.adapters import ops

FLASH_SINCE = (8, 0)  # compute capability
MOST_FEATURES = 256  # of a head, for every fused kernel


@contextmanager
def as_on_cuda(capability: tuple[int, int] | None) -> Iterator[None]:
    """Attention by the operation that a CUDA device would choose, and merged low-rank products.

    Args:
        capability: Compute capability; None: a recent device.
    """
    has_flash = (capability or FLASH_SINCE) >= FLASH_SINCE
    with ExitStack() as stack:
        # By name: a mode of torch's would not hold while layers are recomputed in a backward pass.
        attend = partial(_attend, has_flash)
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", attend))
        stack.enter_context(patch.object(ops, "launches_cost", _yes))
        # From positions that it cannot read transformers concludes that rows may be packed, and
        # makes a mask for them: real ones are read, and show that they are not.
        stack.enter_context(patch.object(masking_utils, "find_packed_sequence_indices", _none))
        yield


def _attend(
    has_flash: bool,
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
    narrow = max(query.shape[-1], value.shape[-1]) <= MOST_FEATURES
    if has_flash and half and narrow and attn_mask is None:
        found = aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )
    elif query.shape[1] == key.shape[1] == value.shape[1]:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
        found = aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
        )
    else:
        found = aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal,
            scale=scale, enable_gqa=enable_gqa,
        )  # fmt: skip
    return found[0]


def _none(*args: Any, **kwargs: Any) -> None:
    del args, kwargs


def _yes(*args: Any) -> bool:
    del args
    return True
