"""An adapter merged into its base's weights, tensor by tensor: the model is never in memory whole.

    W' = W + scale · B A, and with DoRA each output's row is then brought to its trained length

Rows of a weight are read, changed in float32 and written, so that the peak of memory is that of a
few rows and of the adapter, whatever the model. What PEFT trains beside low-rank factors of weights
(whole modules, biases, rows of new tokens) takes its place too; other methods need PEFT's own code
and the whole model in memory (`merge_in_memory`).

Dimensions: O output features, I input features, r rank.
Source: LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from lighten.errors import UserError
from lighten.peft_config import WEIGHTS, read_config
from lighten.quantize.gguf_source import Array, Weight, read_json, read_weights
from lighten.runs import whole_folder

INDEX = "model.safetensors.index.json"
_PEFT = re.compile(
    r"^base_model\.model\.(?P<path>.+?)\."
    r"(?:(?P<factor>lora_(?:embedding_)?[AB])(?:\.weight)?"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.weight)?"
    r"|(?P<parameter>weight|bias))$"
)
_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_BYTES = {"F32": 4, "BF16": 2, "F16": 2}


@dataclass
class Update:
    """What an adapter does to one weight.

    Attributes:
        A: [r, I]; None: no low-rank update.
        B: [O, r].
        scale: Factor before the product.
        magnitude: Trained lengths of the rows, [O] (DoRA).
        transposed: The weight is stored as [I, O].
    """

    A: Array | None = None
    B: Array | None = None
    scale: float = 1.0
    magnitude: Array | None = None
    transposed: bool = False

    def apply(self, rows: Array, first: int) -> Array:
        """Rows of the stored weight, changed.

        Args:
            rows: [n, columns], float32.
            first: Number of the first of them.
        """
        assert self.A is not None
        assert self.B is not None
        stop = first + len(rows)
        if self.transposed:
            changed = rows + self.scale * (self.A.T[first:stop] @ self.B.T)
        else:
            changed = rows + self.scale * (self.B[first:stop] @ self.A)
        if self.magnitude is None:
            return np.asarray(changed, dtype=np.float32)
        length = np.linalg.norm(changed, axis=1, keepdims=True)
        return np.asarray(changed * (self.magnitude[first:stop, None] / length), dtype=np.float32)


@dataclass(frozen=True)
class _Output:
    """A tensor of the merged model."""

    name: str
    kind: str
    shape: tuple[int, ...]
    rows: Callable[[], Iterator[Array]]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * _BYTES[self.kind]


class Unmergeable(Exception):
    """The adapter holds what only PEFT's own code can merge, as this says."""


def read_updates(folder: Path, transposed: bool) -> tuple[dict[str, Update], dict[str, Array]]:
    """What an adapter changes, by name of the base's tensor.

    Args:
        folder: In PEFT's format.
        transposed: The base's linear layers are stored as [I, O].

    Returns:
        Updates of weights, and tensors that take a base's place.

    Raises:
        UserError: It is no adapter, or torn.
        Unmergeable: It holds anything else.
    """
    config = read_config(folder)
    if config["peft_type"] != "LORA":
        raise Unmergeable(f"it is a {config['peft_type']} adapter")
    tensors = _tensors(folder)
    updates: dict[str, Update] = {}
    replaced: dict[str, Array] = {}
    for key, value in tensors.items():
        match = _PEFT.match(key)
        if match is None:
            raise Unmergeable(f"it holds {key}")
        path = match["path"].removesuffix(".base_layer")
        if match["parameter"] is not None:
            replaced[f"{path}.{match['parameter']}"] = value
            continue
        update = updates.setdefault(
            # GPT-2's head is a plain linear layer among transposed ones.
            f"{path}.weight",
            Update(transposed=transposed and path != "lm_head"),
        )
        if match["magnitude"] is not None:
            update.magnitude = value.reshape(-1)
        elif match["factor"] in ("lora_A", "lora_B"):
            setattr(update, match["factor"][-1], value)
        else:  # of an embedding [words, I]: its rows are what the layer puts out
            update.transposed = False
            if match["factor"] == "lora_embedding_A":
                update.B = value.T
            else:
                update.A = value.T
        update.scale = _scale(config, path, folder)
    for name, update in updates.items():
        if update.A is None or update.B is None:
            raise UserError(f"{folder}: one of the two factors of {name} is missing; save it again")
        if update.magnitude is not None and update.transposed:
            raise Unmergeable("it holds DoRA magnitudes of transposed layers")
    return updates, replaced


def _scale(config: Mapping[str, Any], path: str, folder: Path) -> float:
    from lighten.adapters.spec import AdapterSpec
    from lighten.peft_config import settings

    given = settings({**config, "target_modules": config.get("target_modules") or ["x"]}, folder)
    return AdapterSpec(name=folder.name, **given).scale_at(path)


def _tensors(folder: Path) -> dict[str, Array]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path} does not exist; export or save the adapter again")
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key).float().numpy() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from error


def merge(
    base: Path,
    adapter: Path,
    target: Path,
    *,
    dtype: str = "auto",
    beside: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write a base with an adapter merged into its weights as a model folder.

    Args:
        base: A model folder with safetensors files, in 16 or 32 bits.
        adapter: In PEFT's format, trained on that base.
        target: The folder to write; an older one stays if anything fails.
        dtype: `auto` keeps each tensor's format, float32 becomes bfloat16; or `float32`,
            `bfloat16`, `float16`.
        beside: Called with the folder before it is put in its place, to add what belongs there.

    Raises:
        UserError: The adapter is of another base, a file is torn, or the disk is full.
        Unmergeable: It has to be merged in memory.
    """
    settings = read_json(base / "config.json")
    weights = read_weights(base)
    transposed = bool(read_config(adapter).get("fan_in_fan_out")) or (
        settings.get("model_type") == "gpt2"
    )
    updates, replaced = read_updates(adapter, transposed)
    names = _names(weights, {*updates, *replaced}, adapter)
    outputs, untied = _outputs(weights, updates, replaced, names, settings, dtype, adapter)
    _check_space(outputs, target)
    with whole_folder(target) as partial:
        _write_shards(partial, weights, outputs)
        if untied:
            settings["tie_word_embeddings"] = False
        for name, value in replaced.items():
            if name.endswith("embed_tokens.weight") and "vocab_size" in settings:
                settings["vocab_size"] = len(value)
        settings.pop("quantization_config", None)
        kinds = {output.kind for output in outputs}
        for key in ("dtype", "torch_dtype"):
            if key in settings and len(kinds) == 1:
                settings[key] = next(k for k, v in _STORED.items() if v in kinds)
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        (partial / "config.json").write_text(text, encoding="utf-8")
        beside(partial)


def _names(weights: Mapping[str, Weight], wanted: set[str], adapter: Path) -> dict[str, str]:
    """Names of the base's tensors by those of the adapter's; a head tied to the embedding is new.

    Files may leave the model's own name out in front (`model.`, `transformer.`).
    """
    found = {}
    for name in wanted:
        short = name.partition(".")[2]
        if name in weights:
            found[name] = name
        elif short in weights:
            found[name] = short
        elif name == "lm_head.weight" or name.endswith(".bias"):
            found[name] = name
        elif any("experts" in own for own in weights):
            raise Unmergeable("the base's files keep its layers under other names")
        else:
            raise UserError(
                f"{adapter} changes {name.removesuffix('.weight')}, which the base does not have; "
                "it was trained on another model"
            )
    return found


def _outputs(
    weights: Mapping[str, Weight],
    updates: Mapping[str, Update],
    replaced: Mapping[str, Array],
    names: Mapping[str, str],
    settings: Mapping[str, Any],
    dtype: str,
    adapter: Path,
) -> tuple[list[_Output], bool]:
    """Every tensor of the merged model, and whether its head is its own from now on."""
    by_name = {names[name]: update for name, update in updates.items()}
    new = {names[name]: value for name, value in replaced.items()}
    outputs = []
    for name, weight in weights.items():
        kind = _kind(weight, dtype, name)
        if name in new:
            outputs.append(_whole(name, kind, _replacement(name, new, by_name, adapter)))
        elif name in by_name:
            _check_shape(name, weight.shape, by_name[name], adapter)
            outputs.append(_Output(name, kind, weight.shape, _changed(weight, by_name[name])))
        else:
            outputs.append(_Output(name, kind, weight.shape, weight.rows))
    for name in sorted(set(new) - set(weights)):
        kind = next(iter({output.kind for output in outputs}))
        outputs.append(_whole(name, kind, _replacement(name, new, by_name, adapter)))
    tied = bool(settings.get("tie_word_embeddings", settings.get("model_type") == "gpt2"))
    embedding = next((name for name in weights if re.search(r"(embed_tokens|wte)\.weight$", name)),
                     None)  # fmt: skip
    touched = {"lm_head.weight", embedding} & {*by_name, *new}
    untied = tied and bool(touched)
    if untied and "lm_head.weight" not in weights and "lm_head.weight" not in new:
        if embedding is None:
            raise Unmergeable("the head's weight is not among the base's files")
        source = weights[embedding]
        rows = source.rows
        if "lm_head.weight" in by_name:
            _check_shape("lm_head.weight", source.shape, by_name["lm_head.weight"], adapter)
            rows = _changed(source, by_name["lm_head.weight"])
        outputs.append(_Output("lm_head.weight", _kind(source, dtype, embedding), source.shape,
                               rows))  # fmt: skip
    return outputs, untied


def _kind(weight: Weight, dtype: str, name: str) -> str:
    if weight.kind not in _BYTES:
        raise UserError(
            f"{weight.file} holds {name} as {weight.kind}; merge onto a base of 16 or 32 bits"
        )
    if dtype == "auto":
        return "BF16" if weight.kind == "F32" else weight.kind
    return _STORED[dtype]


def _whole(name: str, kind: str, value: Array) -> _Output:
    return _Output(name, kind, value.shape, lambda: iter([value]))


def _replacement(
    name: str, new: Mapping[str, Array], updates: Mapping[str, Update], adapter: Path
) -> Array:
    """What takes a weight's place. PEFT keeps a head or an embedding beside its low-rank update."""
    if name not in updates:
        return new[name]
    _check_shape(name, new[name].shape, updates[name], adapter)
    return updates[name].apply(new[name], 0)


def _changed(weight: Weight, update: Update) -> Callable[[], Iterator[Array]]:
    def rows() -> Iterator[Array]:
        first = 0
        for block in weight.rows():
            yield update.apply(block, first)
            first += len(block)

    return rows


def _check_shape(name: str, shape: tuple[int, ...], update: Update, adapter: Path) -> None:
    assert update.A is not None
    assert update.B is not None
    wanted = (update.B.shape[0], update.A.shape[1])
    if tuple(shape) != (wanted[::-1] if update.transposed else wanted):
        raise UserError(
            f"{adapter}: the update of {name} is {wanted[0]} x {wanted[1]}, the base's weight "
            f"{' x '.join(map(str, shape))}; it was trained on another model"
        )


def _check_space(outputs: list[_Output], target: Path) -> None:
    """Refuse before anything is written where the disk has no room."""
    import shutil

    existing = next(path for path in (target, *target.parents) if path.exists())
    wanted, free = sum(output.size for output in outputs), shutil.disk_usage(existing).free
    if wanted > free:
        raise UserError(
            f"{target} needs {wanted / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB left; free "
            "some space or choose another --output_dir"
        )


def _write_shards(folder: Path, weights: Mapping[str, Weight], outputs: list[_Output]) -> None:
    """One file for each of the base's, and the index where there are several."""
    files = sorted({weight.file.name for weight in weights.values()})
    places = {name: weight.file.name for name, weight in weights.items()}
    for file in files:
        own = [output for output in outputs if places.get(output.name, files[-1]) == file]
        with (folder / file).open("wb") as opened:
            write_safetensors(opened, own)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(output.size for output in outputs)},
            "weight_map": {output.name: places.get(output.name, files[-1]) for output in outputs},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_safetensors(file: BinaryIO, outputs: list[_Output]) -> None:
    """Write tensors in the format of safetensors, some rows at a time.

    Source: https://github.com/huggingface/safetensors#format
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for output in outputs:
        header[output.name] = {
            "dtype": output.kind,
            "shape": list(output.shape),
            "data_offsets": [offset, offset + output.size],
        }
        offset += output.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for output in outputs:
        for block in output.rows():
            file.write(np.ascontiguousarray(_stored(block, output.kind)).data.cast("B"))


def _stored(values: Array, kind: str) -> Array:
    """Float32 numbers in a file's format, rounded to the nearest, ties to even."""
    if kind == "F32":
        return values.astype("<f4", copy=False)
    if kind == "F16":
        return values.astype("<f2")
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype("<u2")
