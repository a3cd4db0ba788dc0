"""Attention over a cache of slots: one sequence per slot, many sequences per step.

A step's tokens stand behind each other in one row, whatever sequences they are of. Sequences that
write their answer have one token in a step; those whose prompt is being read have many.

Dimensions: N tokens of a step, H query heads, K key heads, D features of a head, S slots.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lighten.errors import UserError
from lighten.generation import kernels
from lighten.models import attention as blocks

NAME = "lighten_slots"
# Room of a slot grows by so many tokens at least.
GRANULE = 256
# Tokens of a prompt that attend in one product. A block of a prompt is always computed whole and at
# the same place, whatever else a step reads: sums of another shape are rounded in another way, and
# an answer would depend on its neighbours.
BLOCK = 64


def grown(capacity: int, tokens: int) -> int:
    """Tokens that a slot has room for once so many are needed."""
    if tokens <= capacity:
        return capacity
    return max(-(-tokens // GRANULE) * GRANULE, capacity * 3 // 2)


class SlotCache:
    """Keys and values of every layer, [S, K, capacity, D] each; room grows as sequences do.

    Args:
        slots: Sequences held at once.
        most_tokens: Of one sequence.

    Attributes:
        capacity: Tokens that each slot has room for now.
    """

    def __init__(self, slots: int, most_tokens: int) -> None:
        self.slots, self.most_tokens = slots, most_tokens
        self.capacity = 0
        self._layers: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # keys and values

    @property
    def size_bytes(self) -> int:
        """Memory that keys and values take now."""
        return sum(x.nbytes for kept in self._layers.values() for x in kept)

    def reserve(self, tokens: int) -> None:
        """Make room for sequences of this many tokens.

        Raises:
            RuntimeError: There is no memory for it; the room that there was stays.
        """
        if tokens <= self.capacity:
            return
        capacity = max(tokens, min(grown(self.capacity, tokens), self.most_tokens))
        for layer in list(self._layers):
            keys, values = self._layers[layer]
            if keys.shape[2] < capacity:  # others had grown before memory ran out
                self._layers[layer] = self._wider(keys, capacity), self._wider(values, capacity)
        self.capacity = capacity  # not before all have it

    def _wider(self, x: Tensor, capacity: int) -> Tensor:
        wider = self._room(x, capacity)
        wider[:, :, : x.shape[2]] = x
        return wider

    def _room(self, like: Tensor, capacity: int) -> Tensor:
        return like.new_zeros(self.slots, like.shape[1], capacity, like.shape[3])

    def repeat(self, tokens: int) -> None:
        """Copy the first slot's first tokens into all others."""
        for kept in self._layers.values():
            for x in kept:
                x[1:, :, :tokens] = x[:1, :, :tokens]

    def copy(self, source: int, target: int, start: int, stop: int) -> None:
        """Copy a slot's tokens from one place to before another into another slot."""
        for kept in self._layers.values():
            for x in kept:
                x[target, :, start:stop] = x[source, :, start:stop]

    def layer(self, index: tuple[int, int], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's keys and values.

        Args:
            index: Of the layer, and how often a step has run it before.
            key: New ones of the layer, [1, K, N, D].
            value: The same.
        """
        if index not in self._layers:
            room = self._room(key, self.capacity), self._room(value, self.capacity)
            self._layers[index] = room
        return self._layers[index]


@dataclass(frozen=True)
class Prefill:
    """A sequence whose prompt is being read in a step: its tokens [start, stop) of the step.

    Attributes:
        start: First of its tokens.
        stop: One past the last.
        slot: Where its keys and values are.
        cached: Tokens that the slot held already.
    """

    start: int
    stop: int
    slot: int
    cached: int


@dataclass
class Batch:
    """The sequences of one step.

    Attributes:
        cache: Where their keys and values are.
        slots: Of each token, [N].
        positions: Of each token in its sequence, [N].
        decode_rows: Tokens of the step that are one sequence's newest each.
        prefills: The other sequences.
        block: Tokens of a prompt that attend in one product.
        packed: All sequences are read from their beginning, as rows that stand behind each other
            in one (`models.packed_rows.packed`): the attention they train with reads them, and
            slots take their keys and values alone.
    """

    cache: SlotCache
    slots: Tensor
    positions: Tensor
    decode_rows: Sequence[int]
    prefills: Sequence[Prefill]
    block: int = BLOCK
    packed: bool = False
    _arrays: Any = field(default=None, repr=False)
    _turns: Counter[int] = field(default_factory=Counter, repr=False)

    def layer(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As `SlotCache.layer`; where a model runs its layers in turns, each turn has its own."""
        turn = self._turns[index]
        self._turns[index] += 1
        return self.cache.layer((index, turn), key, value)

    def arrays(self) -> Any:
        """For the kernel: tokens, slots and lengths of the sequences that write."""
        if self._arrays is None:
            rows = torch.tensor(list(self.decode_rows), dtype=torch.int64)
            self._arrays = rows, self.slots.cpu()[rows], self.positions.cpu()[rows] + 1
        return self._arrays

    def blocks(self, prefill: Prefill) -> Iterator[Prefill]:
        """The parts of a prompt that attend one after another; on a GPU all of it at once."""
        if self.slots.is_cuda:
            yield prefill
            return
        for start in range(prefill.start, prefill.stop, self.block):
            stop = min(start + self.block, prefill.stop)
            yield Prefill(start, stop, prefill.slot, prefill.cached + start - prefill.start)


_batch: ContextVar[Batch | None] = ContextVar("batch", default=None)


@contextmanager
def attending(batch: Batch) -> Iterator[None]:
    """A model that runs inside attends within this batch's sequences."""
    reset_token = _batch.set(batch)
    try:
        yield
    finally:
        _batch.reset(reset_token)


class _Job(ctypes.Structure):
    """`Job` in `attention.cpp`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "keys", "values", "out")),
        *((name, ctypes.c_int64) for name in ("query_row", "query_head", "out_row", "out_head")),
        *((name, ctypes.c_int64) for name in ("slot", "head", "token")),
        *((name, ctypes.c_void_p) for name in ("rows", "slots", "lengths")),
        *((name, ctypes.c_int64)
          for name in ("count", "heads", "key_heads", "features", "window")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    ]  # fmt: skip


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """What transformers calls: [1, H, N, D] → [1, N, H, D]."""
    batch = _batch.get()
    if batch is not None:
        if attention_mask is not None and not batch.packed:
            if attention_mask.dim():
                raise UserError("this model's attention has a mask of its own")
            sliding_window = int(attention_mask)
        keys, values = batch.layer(int(module.layer_idx), key, value)  # type: ignore[arg-type]
        keys[batch.slots, :, batch.positions] = key[0].transpose(0, 1)
        values[batch.slots, :, batch.positions] = value[0].transpose(0, 1)
    if batch is None or batch.packed:
        output: tuple[Tensor, Any] = ALL_ATTENTION_FUNCTIONS[blocks.NAME](
            module, query, key, value, attention_mask, scaling=scaling,
            sliding_window=sliding_window, softcap=softcap, **options,
        )  # fmt: skip
        return output
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
    window = sliding_window or 0
    if batch.decode_rows:
        _attend_decode_rows(batch, query[0], keys, values, out[0], scale, window, softcap or 0.0)
    for prefill in batch.prefills:
        for part in batch.blocks(prefill):
            out[0, part.start : part.stop] = _attend_sequence(
                query[:, :, part.start : part.stop], keys, values, part, scale, window, softcap
            )
    return out, None


def _attend_decode_rows(
    batch: Batch, query: Tensor, keys: Tensor, values: Tensor, out: Tensor,
    scale: float, window: int, softcap: float,
) -> None:  # fmt: skip
    """One query per sequence: [H, N, D], into [N, H, D]."""
    rows, slots, lengths = batch.arrays()
    alike = keys.shape == values.shape and query.dtype == keys.dtype == values.dtype
    if not (alike and kernels.takes(query)):
        for row, slot, length in zip(rows.tolist(), slots.tolist(), lengths.tolist(), strict=True):
            prefill = Prefill(row, row + 1, slot, length - 1)
            out[row : row + 1] = _attend_sequence(
                query[None, :, row : row + 1], keys, values, prefill, scale, window, softcap
            )
        return
    if query.stride(-1) != 1:
        query = query.contiguous()
    job = _Job(
        query.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr(), query.stride(1),
        query.stride(0), out.stride(0), out.stride(1), *keys.stride()[:3], rows.data_ptr(),
        slots.data_ptr(), lengths.data_ptr(), len(rows), query.shape[0], keys.shape[1],
        keys.shape[3], window, scale, softcap,
    )  # fmt: skip
    library = kernels.library()
    assert library is not None
    failed = library.lighten_decode_attention(
        ctypes.byref(job), ctypes.c_int(query.dtype == torch.bfloat16),
        ctypes.c_int64(torch.get_num_threads()),
    )  # fmt: skip
    if failed:
        raise MemoryError("the attention's kernel found no memory for its scores")


def _attend_sequence(
    query: Tensor, keys: Tensor, values: Tensor, prefill: Prefill,
    scale: float, window: int, softcap: float | None,
) -> Tensor:  # fmt: skip
    """One sequence's tokens over all that its slot holds: [1, H, n, D] → [n, H, D]."""
    count, length = query.shape[2], prefill.cached + query.shape[2]
    first = max(0, prefill.cached + 1 - window) if window else 0
    key = keys[prefill.slot : prefill.slot + 1, :, first:length]
    value = values[prefill.slot : prefill.slot + 1, :, first:length]
    mask = None
    # A lone token sees all that is there: a mask would keep a GPU's quick kernels from it.
    if count > 1 and (prefill.cached or (window and length > window)):
        query_positions = torch.arange(prefill.cached, length, device=query.device)[:, None]
        key_positions = torch.arange(first, length, device=query.device)[None]
        mask = key_positions <= query_positions
        if window:
            mask &= key_positions > query_positions - window
    if softcap:
        output = _softcapped(query, key, value, mask, scale, softcap)
    else:
        if _wants_every_head(query, mask):
            groups = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None and count > 1,
            scale=scale, enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
    return output[0].transpose(0, 1)


def _wants_every_head(query: Tensor, mask: Tensor | None) -> bool:
    """Whether none of a GPU's kernels reads grouped keys: all scores would be formed at once."""
    if not query.is_cuda:
        return False
    if mask is not None or query.dtype == torch.float32:
        return True
    return torch.cuda.get_device_capability(query.device) < blocks.GROUPED_SINCE


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Attention whose scores are bent as Gemma 2 does."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = softcap * torch.tanh(query @ key.mT * (scale / softcap))
    if mask is None and scores.shape[-2] > 1:
        size = scores.shape[-1]
        mask = torch.ones(size, size, dtype=torch.bool, device=query.device).tril_()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def _mask(*arguments: Any, **options: Any) -> Tensor | None:
    """Slots know who sees whom, given a window: its size, [], or None for all tokens before.

    Some models say which window a layer has by its mask alone (Qwen 2 MoE, Phi MoE). For whole rows
    it is what the attention they train with takes.
    """
    batch = _batch.get()
    if batch is None or batch.packed:
        mask: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[blocks.NAME](*arguments, **options)
        return mask
    window = options.get("local_size")
    return None if window is None else torch.tensor(int(window))


def register() -> None:
    """Let transformers' models take this attention by its name."""
    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, _mask)


@torch.inference_mode()
def take_over(model: PreTrainedModel) -> None:
    """Let a model attend in slots; one that cannot keeps the attention that it has.

    Masks of a model's own making are seen in a forward alone, here of one token.

    Raises:
        UserError: It cannot.
    """
    implementation = str(model.config._attn_implementation)
    register()
    model.set_attn_implementation(NAME)
    cache = SlotCache(1, 1)
    cache.reserve(1)
    first = torch.zeros(1, dtype=torch.int64, device=model.device)
    try:
        with attending(Batch(cache, first, first, [0], ())):
            model(input_ids=first[None], position_ids=first[None], use_cache=False,
                  logits_to_keep=1)  # fmt: skip
    except (UserError, IndexError) as error:  # the latter where it looks into a window's mask
        model.set_attn_implementation(implementation)
        raise UserError("this model's attention has a mask of its own") from error


def require_plain(model: PreTrainedModel) -> None:
    """Refuse what a cache of slots would get wrong.

    Raises:
        UserError: The base's attention is of another kind.
    """
    config = model.config.get_text_config()
    name = config.model_type
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds <= {"full_attention", "sliding_attention"}:
        raise UserError(f"{name} has layers of another kind ({', '.join(sorted(kinds))})")
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [rope] if "rope_type" in rope or not rope else [r for r in rope.values() if r]
    if any(r.get("rope_type") in ("dynamic", "longrope") for r in ropes if isinstance(r, dict)):
        raise UserError(f"{name}'s rotary embedding depends on the length of the whole batch")
    if not model._supports_attention_backend:
        raise UserError(f"{name}'s attention cannot be replaced")
    if any(path.endswith(".sinks") for path, _ in model.named_parameters()):
        raise UserError(f"{name}'s attention has sinks")
