"""A model folder read for conversion: settings and weights, without torch.

A weight is read from its safetensors file rows at a time into memory of its own: neither the model
nor a mapped file is ever there whole, and a quarter of a gigabyte of libraries is not loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lighten.errors import UserError
from lighten.safetensors_header import WHOLE, index_of, read_header

Array = np.ndarray[Any, Any]
_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
_BLOCK_NUMBERS = 2**21  # read and converted at a time
# Settings of every model; a config.json without them relies on defaults of its class.
_NEEDED = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size",
           "max_position_embeddings", "rms_norm_eps", "vocab_size")  # fmt: skip
_NEEDED_BY = {
    "gpt2": ("n_layer", "n_head", "n_embd", "n_positions", "layer_norm_epsilon", "vocab_size"),
    "gemma": (*_NEEDED, "head_dim"),
    "gemma2": (*_NEEDED, "head_dim", "sliding_window", "query_pre_attn_scalar"),
    "gemma3_text": (*_NEEDED, "head_dim", "sliding_window", "query_pre_attn_scalar"),
    "qwen3": (*_NEEDED, "head_dim"),
    "mistral": (*_NEEDED, "sliding_window", "num_key_value_heads"),
    "phi3": (*_NEEDED, "num_key_value_heads"),
    "qwen2": (*_NEEDED, "num_key_value_heads"),
}


@dataclass(frozen=True)
class Weight:
    """Where a weight lies.

    Attributes:
        file: Its safetensors file.
        kind: Its format there.
        shape: As PyTorch orders it.
        offset: Of its first byte in the file.
    """

    file: Path
    kind: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    def rows(self) -> Iterator[Array]:
        """Its numbers in float32, some rows at a time (one-dimensional: all at once).

        Raises:
            UserError: The file is shorter than it says, or cannot be read.
        """
        columns = self.numbers // self.shape[0] if len(self.shape) > 1 else self.numbers
        count = self.shape[0] if len(self.shape) > 1 else 1
        step = max(1, _BLOCK_NUMBERS // max(columns, 1))
        dtype = np.dtype(_TYPES[self.kind])
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.offset)
                for start in range(0, count, step):
                    size = min(step, count - start) * columns
                    raw = np.empty(size, dtype=dtype)
                    _fill(file, raw.data.cast("B"))
                    values = _float32(raw, self.kind)
                    yield values if len(self.shape) == 1 else values.reshape(-1, columns)
        except (OSError, EOFError) as error:
            raise UserError(
                f"{self.file} cannot be read to its end ({error}); fetch or copy the model anew"
            ) from error

    def read_all(self) -> Array:
        """All its numbers in float32.

        Raises:
            UserError: As of `rows`.
        """
        parts = list(self.rows())
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return joined.reshape(self.shape)


def _fill(file: Any, room: memoryview) -> None:
    filled = 0
    while filled < len(room):
        count = file.readinto(room[filled:])
        if not count:
            raise EOFError("it ends early")
        filled += count


def _float32(raw: Array, kind: str) -> Array:
    if kind == "BF16":
        wide = raw.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return raw.astype(np.float32, copy=False)


def read_weights(folder: Path) -> dict[str, Weight]:
    """Where each weight of a model folder lies, by its name.

    Raises:
        UserError: There are none, a file is missing or torn, or a format is none of a plain model.
    """
    index, whole = index_of(folder), folder / WHOLE
    places: dict[str, str] = {}
    if index is not None:
        places = read_json(index).get("weight_map", {})
        files = [folder / name for name in sorted(set(places.values()))]
    else:
        files = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{folder} holds no safetensors files; a model's weights are read from them"
        )
    weights: dict[str, Weight] = {}
    for file in files:
        weights |= {
            name: Weight(file, tensor.kind, tensor.shape, tensor.start)
            for name, tensor in read_header(file).items()
        }
    if missing := sorted(set(places) - set(weights)):
        raise UserError(
            f"{index} names {missing[0]}, which {places[missing[0]]} does not hold; fetch or copy "
            "the model anew"
        )
    return weights


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        UserError: It cannot be read, is torn or holds something else.
    """
    try:
        value: Any = json.loads(file.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}; fetch or copy it anew") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} does not hold settings by name; fetch or copy it anew")
    return value


def declared_ends(folder: Path) -> list[int]:
    """Ids that end an answer: `eos_token_id` of a model's generation settings, else of the model.

    Raises:
        UserError: As for `read_json`.
    """
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            settings = read_json(folder / name)
            for part in (settings, settings.get("text_config") or {}):
                ends = part.get("eos_token_id")
                if ends is not None:
                    return ends if isinstance(ends, list) else [ends]
    return []


@contextmanager
def as_user_error(problem: str) -> Iterator[None]:
    """What others' files hold in places where nobody looked is one sentence too.

    Args:
        problem: The file, and what is wrong with it in general.

    Raises:
        UserError: Something in the block met a value that it cannot use.
    """
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{problem} ({reason}); fetch or copy the model anew") from error


def read_settings(folder: Path) -> dict[str, Any]:
    """A text model's configuration as plain values.

    Where config.json leaves out what is needed, transformers fills it in.

    Raises:
        UserError: There is none, or it is torn.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no model folder: it has no config.json")
    config = read_json(folder / "config.json")
    values = (
        {**config, **config["text_config"]}
        if isinstance(config.get("text_config"), dict)
        else config
    )
    kind = str(values.get("model_type"))
    if all(key in values for key in _NEEDED_BY.get(kind, _NEEDED)):
        return values
    from lighten.models.configuration import read_config  # it brings torch

    text = read_config(folder).get_text_config()
    return {**text.to_dict(), **{k: values[k] for k in ("quantization_config",) if k in values}}
