"""GGUF files read into plain transformers models: converted once, and the copy is kept."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig
from transformers.models.auto.tokenization_auto import (
    TOKENIZER_MAPPING_NAMES,
    tokenizer_class_from_name,
)
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from lighten import streams
from lighten.errors import UserError
from lighten.gguf_names import (
    LAYER,
    PATTERNS,
    SPLITTINGS,
    STEM,
    STEM_OF_GPT2,
    WHOLE_WORDS,
    outer_names,
)
from lighten.machine.disk import require_cache_room
from lighten.machine.hardware import cache_folder
from lighten.models import links
from lighten.models.configuration import FAULTS, build_empty, reason
from lighten.models.gguf_config import config_of, refused
from lighten.models.gguf_header import Header, read_header
from lighten.safetensors_header import WHOLE, write_index

log = logging.getLogger(__name__)
# Raised when what a conversion writes changes, so that an old copy is not taken for it.
LAYOUT = 3
_SHARD_BYTES = 2**30  # a model that is small enough for tests is one file, as on the hub
# Classes that split text their own way, whatever their files say, by llama.cpp's name for it.
_OWN_SPLITTINGS = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}

# They became part of the configuration.
_IN_CONFIG = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def read_config(path: Path) -> Any:
    """A GGUF file's configuration, from its header alone.

    Raises:
        UserError: `gguf` is missing, or the file cannot be read as the model that it holds.
    """
    return config_of(read_header(path))


def require_tokens(path: Path) -> None:
    """A GGUF file's text is split in a way that is known here, by its header alone.

    Raises:
        UserError: It is not: what is trained on the file would read other tokens than it learnt.
    """
    _splitting(read_header(path))


def converted(path: Path) -> Path:
    """Folder with a GGUF file's model in float32 and its tokenizer, converted at the first call.

    The folder is known by the file's header, size and time of change, and written whole or not at
    all.

    Raises:
        UserError: `gguf` is missing, the file cannot be read as the model that it holds, or there
            is no room for the copy.
    """
    header = read_header(path)
    if (done := converted_already(path)) is not None:
        return done
    folder = _cache_path(header, "model")
    config_of(header)  # what it refuses costs nothing yet
    tokenizer = read_tokenizer(path)
    needed_bytes = sum(4 * tensor.numbers for tensor in header.tensors.values())
    require_cache_room(folder, needed_bytes, f"{path} as a model in float32")
    folder.parent.mkdir(parents=True, exist_ok=True)
    log.warning(
        "converting %s once; the copy (%.1f GB) is kept in %s", path, needed_bytes / 1e9, folder
    )
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".convert-") as scratch:
        output = Path(scratch) / "model"
        _write(header, output)
        tokenizer.save_pretrained(output)
        _move_into_place(output, folder)
    for older in folder.parent.parent.glob(f"{_cache_name(header)}-*"):
        if older != folder.parent:
            shutil.rmtree(older, ignore_errors=True)  # of an earlier layout
    return folder


def converted_already(path: Path) -> Path | None:
    """The folder that `converted` gives where it is there already.

    Raises:
        UserError: `gguf` is missing, or the file cannot be read.
    """
    folder = _cache_path(read_header(path), "model")
    return folder if (folder / "config.json").is_file() else None


def conversion_bytes(path: Path) -> tuple[int, int]:
    """Bytes of the float32 copy of a GGUF file, and of memory that making it takes.

    Raises:
        UserError: `gguf` is missing, or the file cannot be read.
    """
    sizes = [4 * tensor.numbers for tensor in read_header(path).tensors.values()]
    # A shard waits to be written; of the largest tensor there are the numbers and their order.
    return sum(sizes), min(sum(sizes), _SHARD_BYTES) + 2 * max(sizes, default=0)


def read_tokenizer(path: Path) -> Any:
    """A GGUF file's tokenizer with its chat template, made once and kept.

    Raises:
        UserError: `gguf` is missing, or the file cannot be read, or splits text in a way that is
            not known here.
    """
    header = read_header(path)
    folder = _cache_path(header, "tokenizer")
    tokenizer_class = _tokenizer_class(header)
    if (folder / "tokenizer.json").is_file():
        return tokenizer_class.from_pretrained(folder, local_files_only=True)
    tokenizer = _build_tokenizer(header, tokenizer_class)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".convert-") as scratch:
        output = Path(scratch) / "tokenizer"
        tokenizer.save_pretrained(output)
        _move_into_place(output, folder)
    return tokenizer


def convert(path: Path, folder: Path) -> None:
    """Write a GGUF file's model as a safetensors folder in float32.

    Raises:
        UserError: The file cannot be read as the model that it holds.
    """
    header = read_header(path)
    tokenizer = _build_tokenizer(header, _tokenizer_class(header))
    _write(header, folder)
    tokenizer.save_pretrained(folder)


def _cache_path(header: Header, name: str) -> Path:
    return cache_folder() / "gguf" / f"{_cache_name(header)}-{LAYOUT}" / name


def _cache_name(header: Header) -> str:
    return str(header.fingerprint[:24])


def _move_into_place(output: Path, folder: Path) -> None:
    try:
        os.replace(output, folder)
    except OSError:
        # Another process was quicker; its folder is as good.
        if not any((folder / file).is_file() for file in ("config.json", "tokenizer.json")):
            raise


def _tokenizer_class(header: Header) -> Any:
    """The class that transformers takes for the architecture, where it splits as the file does."""
    class_name = TOKENIZER_MAPPING_NAMES.get(config_of(header).model_type)
    splitting = _splitting(header)
    if splitting is not None and _OWN_SPLITTINGS.get(class_name or "", splitting) != splitting:
        return TokenizersBackend
    tokenizer_class = tokenizer_class_from_name(class_name) if class_name else None
    if tokenizer_class is None or not issubclass(tokenizer_class, TokenizersBackend):
        return TokenizersBackend
    return tokenizer_class


def _build_tokenizer(header: Header, tokenizer_class: Any) -> Any:
    path = header.path
    splitting = _splitting(header)
    # Alone in a folder: transformers prefers tokenizer files that lie beside it to its own.
    with tempfile.TemporaryDirectory() as scratch:
        links.show(path, Path(scratch) / path.name)
        try:
            tokenizer = tokenizer_class.from_pretrained(
                scratch, gguf_file=path.name, local_files_only=True
            )
        except FAULTS as error:
            raise UserError(f"{path} has no usable tokenizer: {reason(error)}") from error
    if splitting is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = _splitter(splitting)
    _mend_words(header, tokenizer)
    return tokenizer


def _mend_words(header: Header, tokenizer: Any) -> None:
    """Leave out tokens that the file does not have, and take words whole where llama.cpp does.

    transformers adds an `<|endoftext|>` to every byte-level vocabulary, Llama 3's and Mistral's
    too, for which the model has no row. And it merges all words, those too that a vocabulary has
    and no merges lead to.
    """
    count = int(header.settings["tokenizer.ggml.tokens"])
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [token for token in state["added_tokens"] if token["id"] < count]
    whole = header.settings.get("tokenizer.ggml.pre") in WHOLE_WORDS
    if whole or len(tokens) < len(state["added_tokens"]):
        state["added_tokens"] = tokens
        if whole:
            state["model"]["ignore_merges"] = True
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


def _splitting(header: Header) -> str | None:
    """llama.cpp's first name for how the file splits text; None of SentencePiece, which does not.

    transformers leaves GPT-2's way in place where it does not know a file's.

    Raises:
        UserError: The way is not known here, or the file does not say it.
    """
    if header.settings.get("tokenizer.ggml.model") != "gpt2":
        return None
    # Files did not say it before there was more than one way; GPT-2's own is certain.
    by_default = "gpt-2" if header.architecture == "gpt2" else None
    name = header.settings.get("tokenizer.ggml.pre", by_default)
    if str(name) in SPLITTINGS:
        return SPLITTINGS[str(name)]
    why = (
        "does not say how text is split before merging (tokenizer.ggml.pre)"
        if name is None
        else f"splits text as {name!r} (tokenizer.ggml.pre), a way that is not known here"
    )
    raise UserError(
        f"{header.path} {why}, so its tokens would be other than those that the model learnt; use "
        "the model's transformers folder instead"
    )


def _splitter(name: str) -> Any:
    """How text is split, by llama.cpp's first name for it."""
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name not in PATTERNS)
    if name == "gpt-2":
        return whole
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[name]]
    return pre_tokenizers.Sequence([*splits, whole])


def _write(header: Header, folder: Path) -> None:
    """Write configuration and weights, a shard at a time, so that the model is never there whole.

    Raises:
        UserError: A tensor of the file has no place in the model, or the model one without tensor.
    """
    config = config_of(header)
    empty = build_empty(str(header.path), config)
    shapes = {name: tensor.shape for name, tensor in empty.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    folder.mkdir(parents=True)
    shard: dict[str, Tensor] = {}
    places: dict[str, str] = {}

    def flush() -> None:
        if not shard:
            return
        name = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    label = f"converting {header.path.name}"
    for name, weight in streams.counted(_weights(header, config), label, len(header.tensors)):
        if shapes.get(name) != weight.shape:
            expected = tuple(shapes[name]) if name in shapes else "no such weight"
            raise refused(
                header, f"holds {name} as {tuple(weight.shape)}, the model has {expected}"
            )
        shard[name] = weight
        if sum(tensor.nbytes for tensor in shard.values()) >= _SHARD_BYTES:
            flush()
    for name in sorted(set(shapes) - set(places) - set(shard)):
        if not name.endswith("bias"):
            raise refused(header, f"lacks the weight {name}")
        shard[name] = torch.zeros(shapes[name])  # one projection has a bias, its neighbours none
    flush()
    _index(folder, places, 4 * sum(shape.numel() for shape in shapes.values()))
    config.dtype = torch.float32
    config.architectures = [type(empty).__name__]
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    config.save_pretrained(folder)


def _index(folder: Path, places: dict[str, str], total_bytes: int) -> None:
    """Name the shards as `save_pretrained` does: one is the whole, several have an index."""
    shards = list(dict.fromkeys(places.values()))
    if len(shards) == 1:
        (folder / shards[0]).rename(folder / WHOLE)
        return
    names = {}
    for number, shard in enumerate(shards, 1):
        names[shard] = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / shard).rename(folder / names[shard])
    weight_map = {weight: names[shard] for weight, shard in places.items()}
    write_index(folder, weight_map, {"total_size": total_bytes})


def _weights(header: Header, config: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file under its transformers name, dense and in float32."""
    architecture = header.architecture
    outer = outer_names(architecture)
    stem = STEM_OF_GPT2 if architecture == "gpt2" else STEM
    for stored in header.tensors:
        if stored in _IN_CONFIG:
            continue
        base, _, suffix = stored.rpartition(".")
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", base)
        if layer is not None:
            part = LAYER[architecture].get(layer[2])
            name = None if part is None else f"{stem}.{layer[1]}.{part}.{suffix}"
        else:
            name = f"{outer[base]}.{suffix}" if base in outer else None
        if name is None or suffix not in ("weight", "bias"):
            raise refused(
                header, f"holds the tensor {stored}, which no plain {architecture} model has"
            )
        yield (
            name,
            torch.from_numpy(
                np.array(
                    _to_transformers(header.dense(stored), stored, architecture, config), order="C"
                )
            ),
        )


def _to_transformers(
    weight: np.ndarray[Any, Any], stored: str, architecture: str, config: Any
) -> np.ndarray[Any, Any]:
    """A weight as transformers has it: what llama.cpp's conversion did to it is taken back."""
    if architecture.startswith("gemma") and stored.endswith("norm.weight"):
        return weight - np.float32(1)
    if architecture == "gpt2" and re.search(r"\.(attn_qkv|attn_output|ffn_\w+)\.weight$", stored):
        return weight.T if "norm" not in stored else weight
    if architecture == "llama" and (part := re.search(r"\.attn_([qk])\.", stored)):
        # Its rotary halves lie interleaved there, head by head.
        heads = config.num_attention_heads if part[1] == "q" else config.num_key_value_heads
        pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
        return pairs.swapaxes(1, 2).reshape(weight.shape)
    return weight
