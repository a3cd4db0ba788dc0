"""A LoRA adapter in PEFT's format as a GGUF adapter of llama.cpp.

llama.cpp scales each update by `adapter.lora.alpha / rank`, with one alpha for the file and the
rank read off each tensor. What differs from layer to layer is therefore folded into B. What it
would drop or misread (and its own converter lets through) is refused here with the reason.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from lighten.adapters.files import spec_from_peft
from lighten.errors import UserError
from lighten.gguf_names import ARCHITECTURE_OF, of_pictures, stored_name
from lighten.models.configuration import build_empty
from lighten.peft_config import (
    FACTOR,
    WEIGHTS,
    more_than_low_rank,
    read_config,
    tensor_shapes,
)
from lighten.quantization.gguf_file import GgufContent, TensorPlan, require_gguf, write
from lighten.quantization.gguf_settings import folded_scale, settings_of
from lighten.quantization.gguf_weights import is_transposed, rotary_interleaved

Array = np.ndarray[Any, Any]
_F32 = 0
_MERGE = "merge it into the model instead: lighten export RUN --as merged (or --as gguf)"


@dataclass(frozen=True)
class _Layer:
    """One linear layer's update."""

    stored: str
    keys: Mapping[str, str]  # of A and B in the adapter's file
    shapes: Mapping[str, tuple[int, ...]]
    scale: float  # of B A, and what the base's file has folded into this weight

    @property
    def rank(self) -> int:
        return self.shapes["A"][0]


def write_gguf_adapter(adapter_folder: Path, base_config: Any, target: Path) -> None:
    """Write a PEFT LoRA adapter as a GGUF adapter, in float32.

    Args:
        adapter_folder: With `adapter_config.json` and `adapter_model.safetensors`.
        base_config: The base's transformers configuration.
        target: The GGUF file, written whole or not at all.

    Raises:
        UserError: It is more than the low-rank parts of linear layers, belongs to another base,
            or the disk is full.
    """
    gguf = require_gguf()
    config = base_config.get_text_config()
    layers = _layers(adapter_folder, config)
    architecture = ARCHITECTURE_OF[config.model_type]
    query_heads = int(config.num_attention_heads)
    heads = (query_heads, int(getattr(config, "num_key_value_heads", None) or query_heads))
    # The commonest, so that most of the file is as it was trained. 0 would mean "unscaled" there.
    products = collections.Counter(layer.scale * layer.rank for layer in layers)
    alpha = next((value for value, _ in products.most_common() if value), 1.0)

    def settings(writer: Any) -> None:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(adapter_folder.resolve().name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)

    plans = [
        TensorPlan(f"{layer.stored}.lora_{factor.lower()}", layer.shapes[factor], _F32)
        for layer in layers
        for factor in "AB"
    ]

    def data() -> Iterator[Array]:
        with safe_open(adapter_folder / WEIGHTS, framework="pt") as file:
            for layer in layers:
                down, up = (file.get_tensor(layer.keys[factor]).float().numpy() for factor in "AB")
                for values in (down, up):
                    if not np.isfinite(values).all():
                        raise UserError(
                            f"{adapter_folder / WEIGHTS} holds numbers that are not finite for "
                            f"{layer.stored}; the training diverged, take an earlier checkpoint"
                        )
                yield down
                up = rotary_interleaved(up, layer.stored, architecture, heads)
                product = layer.scale * layer.rank
                if product != alpha:
                    up = up * np.float32(product / alpha)
                yield np.ascontiguousarray(up)

    write(target, GgufContent(architecture, settings, plans, data))


def _layers(folder: Path, config: Any) -> list[_Layer]:
    """The adapter's layers under their names in the file.

    Raises:
        UserError: As of `write_gguf_adapter`.
    """
    adapter = read_config(folder)
    if config.model_type not in ARCHITECTURE_OF:
        raise UserError(
            f"{folder} belongs to a base of the kind {config.model_type!r}; GGUF adapters are "
            f"written for {', '.join(sorted(ARCHITECTURE_OF))}"
        )
    # PEFT saves the base's frozen word embeddings beside the factors of an adapted head.
    shapes = {
        key: shape
        for key, shape in tensor_shapes(folder / WEIGHTS).items()
        if not (key.endswith(".base_layer.weight") and shape[0] == config.vocab_size)
    }
    _require_low_rank(folder, adapter, shapes)
    architecture = ARCHITECTURE_OF[config.model_type]
    spec = spec_from_peft("adapter", adapter, folder, shapes)
    pairs: dict[str, dict[str, str]] = {}
    for key in shapes:
        match = FACTOR.match(key)
        assert match is not None, key  # others are refused above
        pairs.setdefault(match["path"], {})[match["factor"]] = key
    base_shapes = _linear_shapes(str(folder), config, architecture)
    settings = settings_of(config.to_dict(), str(folder)) if architecture == "gemma2" else None
    layers = []
    for path, keys in sorted(pairs.items()):
        if of_pictures(path):
            continue
        stored = f"{stored_name(architecture, path)}.weight"
        if set(keys) != {"A", "B"}:
            raise UserError(
                f"{folder / WEIGHTS} has one half of the update of {path}; save it again"
            )
        factor_shapes = {factor: shapes[key] for factor, key in keys.items()}
        if stored == "output.weight" and stored not in base_shapes:
            raise UserError(
                f"{folder} changes {path}, which this base shares with its word embeddings: "
                f"llama.cpp would change both; {_MERGE}"
            )
        if stored not in base_shapes:
            raise UserError(
                f"{folder} changes {path}, which this base ({config.model_type}) does not have as "
                "a linear layer; it was trained on another model"
            )
        rows, columns = base_shapes[stored]
        if factor_shapes["A"] != (factor_shapes["B"][-1], columns) or factor_shapes["B"] != (
            rows,
            factor_shapes["A"][0],
        ):
            raise UserError(
                f"{folder} does not fit this base: {path} has factors {factor_shapes['B']} and "
                f"{factor_shapes['A']} where the base has {(rows, columns)}; it was trained on "
                "another model"
            )
        spec.require_rank(path, factor_shapes["A"][0], folder)
        folded = 1.0 if settings is None else folded_scale(stored, settings)
        layers.append(_Layer(stored, keys, factor_shapes, spec.scale_at(path) * folded))
    return layers


def _require_low_rank(
    folder: Path, adapter: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """llama.cpp serves the low-rank parts of linear layers, and drops or misreads the rest."""
    why = more_than_low_rank(adapter)
    if why is None and adapter.get("bias") not in (None, "none"):
        why = f"LoRA adapter that trains biases (bias: {adapter['bias']})"
    if why is None and adapter.get("modules_to_save"):
        why = f"LoRA adapter with modules trained whole ({', '.join(adapter['modules_to_save'])})"
    if why is None and adapter.get("trainable_token_indices"):
        why = "LoRA adapter with trained token rows"
    for key in shapes:
        if why is None and ".lora_embedding_" in key:
            why = "LoRA adapter of word embeddings"
        elif why is None and not FACTOR.match(key):
            why = f"LoRA adapter with more than low-rank parts ({key})"
    if why is not None:
        raise UserError(f"{folder}: a GGUF adapter cannot hold this {why}; {_MERGE}")
    if not shapes:
        raise UserError(f"{folder / WEIGHTS} holds no weights; save the adapter again")


def _linear_shapes(name: str, config: Any, architecture: str) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the base's linear layers by their name in a GGUF file."""
    empty = build_empty(name, config)
    tied = empty.get_output_embeddings() is not None and (
        empty.get_output_embeddings().weight is empty.get_input_embeddings().weight
    )
    shapes = {}
    for path, weight in empty.state_dict().items():
        base, _, suffix = path.rpartition(".")
        stored = f"{stored_name(architecture, base)}.weight"
        if suffix != "weight" or weight.dim() != 2:
            continue
        if stored in ("token_embd.weight", "position_embd.weight"):
            continue
        if stored == "output.weight" and tied:
            continue
        rows, columns = weight.shape
        shapes[stored] = (columns, rows) if is_transposed(stored, architecture) else (rows, columns)
    return shapes
