"""A model as an ExecuTorch program for a phone's processor: XNNPACK, 4-bit weights.

How it is rounded says `executorch_rounding`; the rest computes in float32. The program keeps keys
and values as its state. Its method and its facts are those of ExecuTorch's runner of language
models: `forward(tokens [1, T], start [1])` gives the scores of the token after the last, [1, V];
start is the position of the first of the tokens.

Dimensions: T tokens of a call, L positions of the cache, H query heads, K key heads, D of a head,
V words.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.cache_utils import Cache, StaticLayer
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from lighten.errors import UserError
from lighten.quantization.executorch_rounding import ProgramRounding, write_rounded
from lighten.wording import first_line

PREFILL_TOKENS = 128  # of one call at most; ExecuTorch's runner cuts longer prompts
ATTENTION = "lighten_grouped"


def write_program(
    folder: Path,
    target: Path,
    *,
    context_tokens: int,
    ends: list[int],
    rounding: ProgramRounding,
    keep: Path | None = None,
) -> list[str]:
    """Lower a model folder to an ExecuTorch program.

    Args:
        folder: A transformers model in safetensors.
        target: The `.pte` file.
        context_tokens: Positions of the cache: prompt and answer together.
        ends: Ids of the tokens that end an answer.
        rounding: How weights are rounded.
        keep: File for the rounded weights, as `write_rounded` writes it.

    Returns:
        What a user should know, a sentence each.

    Raises:
        UserError: The model cannot be loaded or traced, or the disk is full.
    """
    from lighten import whole_files

    model, notes = rounded_model(folder, rounding, keep)
    words = int(model.get_output_embeddings().weight.shape[0])
    bos = model.config.bos_token_id
    facts = {
        "get_max_seq_len": min(PREFILL_TOKENS, context_tokens),
        "get_max_context_len": context_tokens, "get_vocab_size": words,
        "get_bos_id": next(iter(ends), 0) if bos is None else int(bos), "get_eos_ids": ends,
        "use_kv_cache": True, "use_sdpa_with_kv_cache": False, "enable_dynamic_shape": True,
    }  # fmt: skip
    try:
        data = _lowered(_WithCache(model, context_tokens).eval(), facts)
    except (RuntimeError, ValueError, AssertionError, TypeError, NotImplementedError) as error:
        kind = model.config.model_type
        raise UserError(
            f"{folder} cannot become an ExecuTorch program: models of the type {kind} cannot be "
            f"traced ({first_line(error)}); export it --as gguf"
        ) from error
    whole_files.write_bytes(target, data)
    return notes


def rounded_model(
    folder: Path, rounding: ProgramRounding, keep: Path | None
) -> tuple[Any, list[str]]:
    """The model as a program has it.

    Args:
        folder: A transformers model in safetensors.
        rounding: How weights are rounded.
        keep: File for the rounded weights, as `write_rounded` writes it.

    Returns:
        The model, and what a user should know, a sentence each.

    Raises:
        UserError: The model cannot be loaded.
    """
    # Rounding by data goes by what layers compute, to the last bit: with the program's attention.
    AttentionInterface.register(ATTENTION, grouped_attention)
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    model = load(folder, ATTENTION)
    notes = rounding.apply(model)
    if keep is not None:
        write_rounded(model, keep)
    return model, notes


def load(folder: Path, attention: str = "eager") -> Any:
    """The model in float32, as it is rounded.

    Raises:
        UserError: It cannot be loaded.
    """
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{folder} cannot be loaded: {first_line(error)}") from error
    return model.eval()


def grouped_attention(
    module: nn.Module,  # noqa: ARG001  # transformers gives it
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention whose query heads share a key head without a copy of it for each.

    Args:
        module: The layer's.
        query: [1, H, T, D].
        key: [1, K, L, D].
        value: [1, K, L, D].
        attention_mask: Added to scores, [1, 1, T, L].
        scaling: Of scores; 1 / √D when None.
        softcap: Scores are held within ± this (Gemma 2).
        kwargs: What transformers passes along, of no effect here but for attention sinks.

    Returns:
        [1, T, H, D], and no weights.

    Raises:
        ValueError: The layer has attention sinks.
    """
    if kwargs.get("s_aux") is not None:
        raise ValueError("attention sinks")
    _, heads, tokens, width = query.shape
    shared = key.shape[1]
    group = heads // shared
    # Dimensions are split and joined one at a time: tracing cannot follow more for every T.
    scaled = query[0] * (width**-0.5 if scaling is None else scaling)
    rows = scaled.unflatten(0, (shared, group)).flatten(1, 2)
    scores = (rows @ key[0].transpose(1, 2)).unflatten(1, (group, tokens))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = torch.softmax(scores + attention_mask[0], dim=-1).flatten(1, 2)
    mixed = (weights @ value[0]).unflatten(1, (group, tokens)).flatten(0, 1)
    return mixed.transpose(0, 1)[None].contiguous(), None


class _Layer(StaticLayer):
    """Keys and values of a layer, written where the program says."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        places = torch.arange(key_states.shape[2]) + self.cumulative_length
        self.keys.index_copy_(2, places, key_states)
        self.values.index_copy_(2, places, value_states)
        return self.keys, self.values


class _WithCache(nn.Module):
    """A model whose keys and values are buffers."""

    def __init__(self, model: Any, positions: int) -> None:
        super().__init__()
        self.model = model
        names = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        count = model.config.get_text_config().num_hidden_layers
        self._layers = [_Layer(positions) for _ in range(count)]
        with torch.no_grad():  # which gives every layer its shape
            self._scores(torch.zeros((1, 2), dtype=torch.long), torch.zeros(1, dtype=torch.long))
        for number, layer in enumerate(self._layers):
            assert layer.keys is not None
            assert layer.values is not None
            self.register_buffer(f"keys_{number}", torch.zeros_like(layer.keys), False)
            self.register_buffer(f"values_{number}", torch.zeros_like(layer.values), False)

    def forward(self, tokens: Tensor, start: Tensor) -> Tensor:
        for number, layer in enumerate(self._layers):
            layer.keys = getattr(self, f"keys_{number}")
            layer.values = getattr(self, f"values_{number}")
        return self._scores(tokens, start)

    def _scores(self, tokens: Tensor, start: Tensor) -> Tensor:
        for layer in self._layers:
            layer.cumulative_length = start[0]
        places = start + torch.arange(tokens.shape[1])
        scores: Tensor = self.model(
            input_ids=tokens, position_ids=places[None], use_cache=True, logits_to_keep=1,
            **{self._cache_name: Cache(layers=list(self._layers))},
        ).logits  # fmt: skip
        return scores[:, -1]


def _lowered(model: nn.Module, facts: dict[str, Any]) -> bytes:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
        XnnpackDynamicallyQuantizedPartitioner,
        XnnpackPartitioner,
    )
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig
    from executorch.exir import to_edge_transform_and_lower as lower

    example = (torch.ones((1, 3), dtype=torch.long), torch.zeros(1, dtype=torch.long))
    tokens = torch.export.Dim("T", min=2, max=facts["get_max_seq_len"])
    with torch.no_grad():
        traced = torch.export.export(
            model, example, dynamic_shapes={"tokens": {1: tokens}, "start": None}, strict=False
        )
    edge = lower(
        traced,
        partitioner=[XnnpackDynamicallyQuantizedPartitioner(), XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods=facts,
    )
    # Embeddings of 8 bits are one operation, and caches are written where they are.
    settings = ExecutorchBackendConfig(do_quant_fusion_and_const_prop=True, run_reinplace_pass=True)
    return bytes(edge.to_executorch(settings).buffer)
