"""A model folder as one GGUF file for llama.cpp, Ollama and `lighten serve`.

Tensors are read, brought into llama.cpp's order, quantised by its own code and written one after
another, some rows at a time: no file of another format lies between, and the model is never in
memory whole.
"""

from __future__ import annotations

import collections
import importlib.util
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lighten.errors import UserError
from lighten.gguf_names import LAYER, has_bias, outer_names, stored_name
from lighten.quantization import gguf_types as types
from lighten.quantization.gguf_file import GgufContent, TensorPlan, require_gguf, write
from lighten.quantization.gguf_settings import Settings, folded_scale, refused, settings_of
from lighten.quantization.gguf_source import Weight, as_user_error, read_settings, read_weights
from lighten.quantization.gguf_tokenizer import Vocabulary, read_vocabulary
from lighten.quantization.gguf_weights import as_stored, is_transposed
from lighten.quantization.llamacpp import available_threads, library, quantize_rows
from lighten.wording import counted

log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
# Buffers that old checkpoints carry and no architecture reads.
_BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
_MOST_HALF = 65504.0  # of float16
_PICTURES = ("vision_tower.", "multi_modal_projector.", "visual.")


@dataclass(frozen=True)
class GgufPlan:
    """What a GGUF file will be, before it is written.

    Attributes:
        type: As users write it, such as `q4_k_m`.
        bytes: Of its tensors; the header adds the vocabulary.
        peak_bytes: Of memory that writing takes, beside the interpreter and its libraries.
        formats: Number of tensors by format.
        numbers: Numbers in tensors by ggml's number of their format.
        fallbacks: Number of tensors by (format of the type, format taken instead), because their
            rows are no multiple of the first one's block.
        notes: What a user should know of the file, a sentence each.
    """

    type: str
    bytes: int
    peak_bytes: int
    formats: Mapping[str, int]
    numbers: Mapping[int, int]
    fallbacks: Mapping[tuple[str, str], int]
    notes: tuple[str, ...] = ()

    def sentences(self) -> list[str]:
        """The fall-backs and notes in words."""
        total = sum(self.formats.values())
        lines = [
            f"{count} of {total} tensors are {actual} and not {preferred}: their rows are no "
            f"multiple of {types.BLOCK_OF_NAME[preferred]}"
            for (preferred, actual), count in self.fallbacks.items()
        ]
        return [*lines, *self.notes]


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file and where its numbers come from."""

    plan: TensorPlan
    preferred: int
    source: Weight | None  # None of what is computed
    values: Array | None = None


@dataclass
class _Model:
    """Everything that a file holds."""

    type: types.FileType
    settings: Settings
    tensors: list[_Tensor]


def plan_gguf(
    model_folder: Path, type: str, *, weights: Mapping[str, Weight] | None = None
) -> GgufPlan:
    """What a GGUF file of a model will be: nothing is written, no weight is read.

    Args:
        model_folder: A transformers model in safetensors.
        type: `f32`, `f16`, `bf16`, `q8_0`, `q4_k_m` or another of llama.cpp's.
        weights: Names, formats and shapes of a model whose files are not there; None: the folder's.

    Raises:
        UserError: As of `write_gguf`, but for what only weights show.
    """
    return _plan(_model(model_folder, type, weights))


def file_bytes(
    model_folder: Path,
    type: str,
    *,
    name: str | None = None,
    weights: Mapping[str, Weight] | None = None,
) -> int:
    """Size that the file of `write_gguf` will have, to the byte.

    Args:
        model_folder: Of configuration and tokenizer.
        type: As of `write_gguf`.
        name: As of `write_gguf`.
        weights: As of `plan_gguf`.

    Raises:
        UserError: As of `write_gguf`, but for what only weights show.
    """
    require_gguf()
    model = _model(model_folder, type, weights)
    return _content(model_folder, model, name)[0].file_bytes()


def write_gguf(
    model_folder: Path,
    target: Path,
    type: str,
    *,
    name: str | None = None,
) -> GgufPlan:
    """Write a model as a GGUF file with its tokenizer and chat template.

    Args:
        model_folder: A transformers model in safetensors, with its tokenizer.
        target: The file, written whole or not at all.
        type: `f32`, `f16`, `bf16`, `q8_0`, `q4_k_m` or another of llama.cpp's.
        name: What the file calls the model; the folder's name when None.

    Returns:
        What was written.

    Raises:
        UserError: llama.cpp has no such model, type or tokenizer, a weight is missing, torn or not
            finite, a package is missing, or the disk is full.
    """
    require_gguf()
    model = _model(model_folder, type)
    _require_quantiser(model)
    plan = _plan(model)
    content, vocabulary = _content(model_folder, model, name)
    write(target, content)
    _tell_tokens(vocabulary, target)
    for sentence in plan.sentences():
        log.info("%s: %s", target, sentence)
    return plan


def _content(folder: Path, model: _Model, name: str | None) -> tuple[GgufContent, Vocabulary]:
    gguf = require_gguf()
    with as_user_error(f"{folder / 'tokenizer.json'} is no tokenizer that can be read"):
        vocabulary = read_vocabulary(folder, model.settings.vocabulary)

    def header(writer: Any) -> None:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(vocabulary.name_for(name or folder.resolve().name))
        writer.add_file_type(model.type.number)
        if model.type.kind not in types.PLAIN:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _write_values(writer, model.settings)
        vocabulary.write(writer)

    tensors = [tensor.plan for tensor in model.tensors]
    content = GgufContent(
        model.settings.architecture, header, tensors, lambda: _data(model, available_threads())
    )
    return content, vocabulary


def _tell_tokens(vocabulary: Vocabulary, target: Path) -> None:
    if vocabulary.otherwise:
        log.warning(
            "%s: llama.cpp reads white space behind %s otherwise than the model's tokenizer",
            target, ", ".join(vocabulary.otherwise[:5]),
        )  # fmt: skip
    if vocabulary.without_row:
        log.warning(
            "%s leaves out %s: the model has no row for them",
            target, ", ".join(vocabulary.without_row[:5]),
        )  # fmt: skip
    if vocabulary.composes:
        log.warning(
            "%s: llama.cpp takes letters as they come, which the model's tokenizer composes first "
            "(NFC): give it composed texts; decomposed ones, such as names of files on macOS, are "
            "other tokens", target,
        )  # fmt: skip
    named = {vocabulary.special.get(role) for role in ("eos", "eot", "eom")}
    unsaid = [vocabulary.tokens[token] for token in vocabulary.ends if token not in named]
    if unsaid:
        log.warning(
            "%s names three of the tokens that end an answer; llama.cpp may not stop at %s",
            target, ", ".join(unsaid),
        )  # fmt: skip


def _write_values(writer: Any, settings: Settings) -> None:
    for key, value in settings.values.items():
        full_key = f"{settings.architecture}.{key}"
        if isinstance(value, bool):
            writer.add_bool(full_key, value)
        elif isinstance(value, int):
            writer.add_uint32(full_key, value)
        elif isinstance(value, float):
            writer.add_float32(full_key, value)
        elif isinstance(value, str):
            writer.add_string(full_key, value)
        else:
            writer.add_array(full_key, value)


def _model(folder: Path, type: str, weights: Mapping[str, Weight] | None = None) -> _Model:
    """What the file will hold, from configuration and headers alone."""
    kind = types.file_type(type)
    config = read_settings(folder)
    with as_user_error(f"{folder / 'config.json'} holds settings that no model has"):
        settings = settings_of(config, str(folder))
    weights = read_weights(folder) if weights is None else weights
    architecture = settings.architecture
    sources: dict[str, tuple[str, Weight]] = {}
    pictures = 0
    for name, weight in weights.items():
        base, _, suffix = name.rpartition(".")
        if name.endswith(_BUFFERS):
            continue
        if any(part in name for part in _PICTURES):
            pictures += 1
            continue
        stored = stored_name(architecture, base)
        if stored is None or suffix not in ("weight", "bias"):
            raise UserError(
                f"{folder} holds {name}, which has no place in a GGUF file of the architecture "
                f"{architecture}; where it is an adapter's, merge it first"
            )
        if stored == "output" and settings.tied:
            continue
        if suffix == "bias" and not has_bias(architecture, stored):
            raise refused(str(folder), f"it has the bias {name}")
        sources[f"{stored}.{suffix}"] = (name, weight)
    _require_all(folder, settings, sources)
    shape = types.Shape(
        settings.layers,
        settings.heads // settings.kv_heads,
        "output.weight" not in sources,
        architecture,
    )
    tensors = []
    extra = {} if settings.rope is None else settings.rope.tensors
    for stored, values in extra.items():
        tensors.append(
            _Tensor(TensorPlan(stored, values.shape, types.F32), types.F32, None, values)
        )
    for stored, (name, weight) in sorted(sources.items(), key=lambda item: _order(item[0])):
        if weight.kind not in ("F32", "F16", "BF16", "F64"):
            raise UserError(
                f"{folder} holds {name} in the format {weight.kind}; a GGUF file is made from "
                "plain weights (float32, float16 or bfloat16)"
            )
        dimensions = weight.shape
        if is_transposed(stored, architecture):
            dimensions = (dimensions[1], dimensions[0])
        tensor_format = types.choose(kind, stored, dimensions, shape)
        tensors.append(
            _Tensor(
                TensorPlan(stored, dimensions, tensor_format.kind), tensor_format.preferred, weight
            )
        )
    if pictures:
        settings.notes.append(
            f"the text model alone: without {counted(pictures, 'tensor')} of its picture tower"
        )
    return _Model(kind, settings, tensors)


def _order(name: str) -> tuple[int, int, str]:
    """Word embeddings first, then layer by layer."""
    if name.startswith("blk."):
        return 1, int(name.split(".")[1]), name
    return (0 if "embd" in name else 2), 0, name


def _require_all(
    folder: Path, settings: Settings, sources: Mapping[str, tuple[str, Weight]]
) -> None:
    """Every weight of the architecture is there, and as long as the configuration says."""
    required = [f"{name}.weight" for name in outer_names(settings.architecture)]
    if settings.tied:
        required.remove("output.weight")
    for layer in range(settings.layers):
        required += [f"blk.{layer}.{module}.weight" for module in LAYER[settings.architecture]]
    if missing := [name for name in required if name not in sources]:
        raise UserError(
            f"{folder} lacks the weight that a GGUF file calls {missing[0]} ({len(missing)} are "
            "missing); fetch or copy the model anew"
        )
    beyond = f"blk.{settings.layers}.attn_norm.weight"
    if beyond in sources:
        raise UserError(f"{folder} holds more layers than its config.json says ({settings.layers})")
    hidden = settings.values["embedding_length"]
    embedding = sources["token_embd.weight"][1].shape
    if embedding != (settings.vocabulary, hidden):
        raise UserError(
            f"{folder} has word embeddings of the shape {embedding} where its config.json says "
            f"{(settings.vocabulary, hidden)}; save the model again after resizing them"
        )
    head = settings.values.get("attention.key_length")
    if head is not None and "blk.0.attn_q.weight" in sources:
        rows = sources["blk.0.attn_q.weight"][1].shape[0]
        if rows != settings.heads * int(head):
            raise UserError(
                f"{folder} has queries of {rows} rows where its config.json says {settings.heads} "
                f"heads of {head} dimensions"
            )


def _require_quantiser(model: _Model) -> None:
    """K-quants are llama.cpp's own code; the older formats are in the `gguf` package too."""
    if any(tensor.plan.kind in types.K_QUANTS for tensor in model.tensors):
        library()


def _plan(model: _Model) -> GgufPlan:
    formats: collections.Counter[str] = collections.Counter()
    numbers: collections.Counter[int] = collections.Counter()
    fallbacks: collections.Counter[tuple[str, str]] = collections.Counter()
    for tensor in model.tensors:
        format_name = types.FORMAT_NAMES[tensor.plan.kind]
        formats[format_name] += 1
        numbers[tensor.plan.kind] += math.prod(tensor.plan.shape)
        if tensor.plan.kind != tensor.preferred:
            fallbacks[types.FORMAT_NAMES[tensor.preferred], format_name] += 1
    largest = max(tensor.plan.nbytes for tensor in model.tensors)
    return GgufPlan(
        model.type.name,
        sum(tensor.plan.stored_bytes for tensor in model.tensors),
        # The packed tensor, and rows of it in float32 in several steps.
        largest + 6 * 4 * 2**21,
        dict(formats),
        dict(numbers),
        dict(fallbacks),
        tuple(model.settings.notes),
    )


def _data(model: _Model, threads: int) -> Iterator[Array]:
    """Every tensor in its format, in the order of the file."""
    for tensor in model.tensors:
        if tensor.source is None:
            assert tensor.values is not None
            yield tensor.values
        else:
            yield _packed(model, tensor, threads)


def _packed(model: _Model, tensor: _Tensor, threads: int) -> Array:
    source, plan = tensor.source, tensor.plan
    assert source is not None
    settings = model.settings
    one_block = len(plan.shape) == 1 or is_transposed(plan.name, settings.architecture)
    turned = settings.architecture == "llama" and (
        ".attn_q." in plan.name or ".attn_k." in plan.name
    )
    blocks = [source.read_all()] if one_block or turned else source.rows()
    packed = np.empty(plan.packed_shape(), dtype=np.uint8)
    row = 0
    for block in blocks:
        heads = (settings.heads, settings.kv_heads)
        values = as_stored(block, plan.name, settings.architecture, heads)
        scale = folded_scale(plan.name, settings)
        if scale != 1.0:
            values = values * np.float32(scale)
        if not np.isfinite(values).all():
            raise UserError(
                f"{source.file} holds numbers in {plan.name} that are not finite; the model "
                "diverged, or the file is damaged"
            )
        data = pack(np.ascontiguousarray(values), plan.kind, threads, plan.name)
        if len(plan.shape) == 1:
            return data
        packed[row : row + len(values)] = data.view(np.uint8).reshape(len(values), -1)
        row += len(values)
    return packed


def pack(values: Array, kind: int, threads: int, name: str) -> Array:
    """Numbers in one of ggml's formats.

    Args:
        values: In float32; rows are a multiple of the format's block.
        kind: ggml's number of the format.
        threads: Of the quantiser.
        name: What an error calls them.

    Raises:
        UserError: A number, or a block's scale, is beyond float16, or `xllamacpp` is missing for a
            K-quant.
    """
    if kind == types.F32:
        return values
    if kind == types.F16:
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.isfinite(half).all():
            raise UserError(_beyond(name))
        return half
    if kind == types.BF16:
        bits = values.view(np.uint32)
        # To the nearest, ties to even.
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    gguf = require_gguf()
    ggml_type = gguf.GGMLQuantizationType(kind)
    packed: Array
    if importlib.util.find_spec("xllamacpp") is not None or kind in types.K_QUANTS:
        packed = quantize_rows(values, kind, threads)
    else:
        packed = gguf.quants.quantize(values, ggml_type)
    # A block's scale is a float16: of numbers that are not far beyond it, it says what they are.
    if max(values.max(initial=0), -values.min(initial=0)) > _MOST_HALF:
        with np.errstate(all="ignore"):
            read_back = gguf.quants.dequantize(packed, ggml_type)
        if not np.isfinite(read_back).all():
            raise UserError(_beyond(name))
    return packed


def _beyond(name: str) -> str:
    return f"{name} holds numbers beyond what float16 can say; choose bf16 or f32"
