"""An adapter merged into its base's weights, tensor by tensor: the model is never in memory whole.

    W' = W + scale · B A, and with DoRA each output's row is then brought to its trained length

A tensor is read some rows at a time, changed in float32, rounded once and written, so that the peak
of memory is that of a few rows and of the adapter, whatever the model. What PEFT trains beside
low-rank factors (whole modules, biases, rows of tokens) takes its place too; other methods need
PEFT's own code and the whole model in memory (`Unmergeable`).

An adapter of a base that was quantised for training (QLoRA) corrects the rounding too. It is added
to the original weights, or to those that it learnt on, dequantised; never to quantised ones.

Dimensions: O output features, I input features, r rank.
Source: LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353.
"""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from lighten import safetensors_stream
from lighten.errors import UserError
from lighten.machine.disk import require_room
from lighten.models.configuration import build_empty, read_config
from lighten.models.stored import stored_as
from lighten.peft_config import more_than_low_rank
from lighten.peft_config import read_config as read_adapter_config
from lighten.quantization.gguf_source import Weight, read_weights
from lighten.quantization.merge_update import (
    Changes,
    changed,
    read_changes,
    require_fit,
    streamable,
)
from lighten.quantization.rounding import Rounding
from lighten.runs import whole_folder
from lighten.safetensors_header import WHOLE, write_index
from lighten.wording import with_article

_WIDE = ("F32", "F64")
_FLOATS = (*_WIDE, "F16", "BF16")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_COPIED = 2**22  # bytes of a tensor that is no weight, at a time


class Unmergeable(Exception):
    """The adapter holds what only PEFT's own code can merge, as this says."""


def merge(
    base: Path,
    adapter: Path,
    target: Path,
    *,
    dtype: str = "auto",
    rounding: Rounding | None = None,
    words: int = 0,
    beside: Callable[[Path], None] = lambda _: None,
) -> list[str]:
    """Write a base with an adapter merged into its weights as a model folder.

    Args:
        base: A model folder with safetensors files, in 16 or 32 bits.
        adapter: In PEFT's format, trained on that base.
        target: The folder to write; an older one stays if anything fails.
        dtype: `auto` keeps the base's 16-bit format and what it holds in float32 beside that; a
            base all in float32 becomes bfloat16. Or `float32`, `bfloat16`, `float16`.
        rounding: How the base was quantised while the adapter learnt: it is added to those
            weights dequantised. None: to the base's own.
        words: Rows that the vocabulary has at least, where tokens were added.
        beside: Called with the folder before it is put in its place, to add what belongs there.

    Returns:
        What a user should know, a sentence each.

    Raises:
        UserError: The adapter is of another base, a file is torn, or the disk is full.
        Unmergeable: It has to be merged in memory.
    """
    config = read_adapter_config(adapter)
    if (stored := stored_as(base)) is not None:
        raise Unmergeable(f"the base's files are quantised ({stored.get('quant_method')})")
    if not streamable(config):
        kind = more_than_low_rank(config) or f"LoRA adapter with bias {config.get('bias')}"
        raise Unmergeable(f"it is {with_article(kind)}")
    plan = _Plan(base, adapter, dtype, rounding, words)
    require_room(target, plan.nbytes, f"merging into {target}")
    with whole_folder(target) as partial:
        plan.write(partial)
        beside(partial)
    return plan.notes


def merged_shapes(base: Path, adapter: Path, folder: Path, *, words: int = 0) -> dict[str, Weight]:
    """What `merge` would write: the tensors by name; the configuration is put into a folder.

    Args:
        base: As of `merge`.
        adapter: As of `merge`.
        folder: For the configuration.
        words: As of `merge`.

    Raises:
        UserError: The adapter is of another base, or a file is torn.
        Unmergeable: It has to be merged in memory.
    """
    config = read_adapter_config(adapter)
    if stored_as(base) is not None or not streamable(config):
        raise Unmergeable("it is merged in memory")
    plan = _Plan(base, adapter, "auto", None, words)
    plan.write_config(folder)
    return plan.shapes()


def _dtype(weights: dict[str, Weight], requested: str) -> torch.dtype:
    if requested != "auto":
        return _DTYPES[requested]
    kinds = collections.Counter(weight.kind for weight in weights.values())
    return torch.float16 if kinds["F16"] > kinds["BF16"] else torch.bfloat16


def _has_16_bits(weights: dict[str, Weight]) -> bool:
    return any(weight.kind in ("F16", "BF16") for weight in weights.values())


def in_float32(base: Path, model: Any) -> frozenset[str]:
    """Names, in a model, of what the base's files hold in float32 beside weights in 16 bits.

    Args:
        base: Its folder.
        model: The model of it.
    """
    weights = read_weights(base)
    if not _has_16_bits(weights):
        return frozenset()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix, own = model.base_model_prefix, model.state_dict()
    return frozenset(
        rename_source_key(key, renamings, converters, prefix, own)[0]
        for key, weight in weights.items()
        if weight.kind in _WIDE
    )


class _Plan:
    """Every tensor of the merged model, and where its numbers come from.

    Attributes:
        untied: The head becomes a tensor of its own.
        notes: What a user should know.
    """

    def __init__(
        self,
        base: Path,
        adapter: Path,
        dtype: str,
        rounding: Rounding | None,
        words: int,
    ) -> None:
        self._base, self._adapter, self._words = base, adapter, words
        self._rounding = rounding
        self._weights = read_weights(base)
        self._dtype = _dtype(self._weights, dtype)
        self._keeps_float32 = dtype == "auto" and _has_16_bits(self._weights)
        self._config = read_adapter_config(adapter)
        self._model = build_empty(str(base), read_config(base))
        self._changes: Changes = read_changes(adapter, self._config)
        self.notes: list[str] = []
        self._names = self._resolved()
        # Adapters of before transformers 5 call some weights as the files do.
        of_key = {key: name for name, key in self._names.items()}
        self._changes.by_name = {
            name if name in self._names else of_key.get(name, name): change
            for name, change in self._changes.by_name.items()
        }
        if any(change.embedding and change.magnitude for change in self._changes.by_name.values()):
            raise Unmergeable("it trains an embedding by DoRA")
        self._look_at_vocabulary()
        self._files = self._entries()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entries in self._files.values() for entry in entries)

    def write(self, folder: Path) -> None:
        """Write weights, index and configuration."""
        for name, entries in self._files.items():
            safetensors_stream.write(folder / name, entries)
        if len(self._files) > 1:
            places = {
                entry.name: name for name, entries in self._files.items() for entry in entries
            }
            write_index(folder, places, {"total_size": self.nbytes})
        self.write_config(folder)

    def shapes(self) -> dict[str, Weight]:
        """The tensors by name, of files that are not there."""
        return {
            entry.name: Weight(Path(name), entry.kind, entry.shape, 0)
            for name, entries in self._files.items()
            for entry in entries
        }

    def write_config(self, folder: Path) -> None:
        """Write the configuration alone."""
        config = json.loads((self._base / "config.json").read_bytes())
        inner = config.get("text_config")
        text = inner if isinstance(inner, dict) else config  # beside a picture tower
        for section in (config, text):
            section.pop("quantization_config", None)
            section.pop("torch_dtype", None)
            section["dtype"] = str(self._dtype)[6:]
            if "vocab_size" in section or section is text:
                section["vocab_size"] = self._rows
            if self.untied:
                section["tie_word_embeddings"] = False
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _resolved(self) -> dict[str, str]:
        """Name of a weight in the files by its name in the model, as transformers loads it."""
        prefix, own = self._model.base_model_prefix, self._model.state_dict()
        mapping = get_model_conversion_mapping(self._model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        names = {}
        for key in self._weights:
            for rules in (renamings, []):
                name, _ = rename_source_key(key, rules, [], prefix, own)
                if name in own:
                    names[name] = key
                    break
        return names

    def _look_at_vocabulary(self) -> None:
        """Find embedding and head, whether they part, and how many rows they have now."""
        embedding = self._model.get_input_embeddings()
        head = self._model.get_output_embeddings()
        paths = {id(module): path for path, module in self._model.named_modules()}
        self._embedding = f"{paths[id(embedding)]}.weight"
        self._head = f"{paths[id(head)]}.weight" if head is not None else ""
        tied = head is not None and head.weight is embedding.weight
        changes = self._changes.by_name
        touched = {
            name for name in (self._embedding, self._head)
            if name in changes and not _rows_alone(changes[name])
        }  # fmt: skip
        together = bool(self._config.get("ensure_weight_tying"))
        self.untied = bool(tied and touched and not together)
        self._tied = tied and not self.untied
        self._rows = self._size = int(embedding.weight.shape[0])  # type: ignore[index]
        taller = [self._changes.rows_of(name) or 0 for name in (self._embedding, self._head)]
        self._rows = max(self._size, self._words, *taller)
        if self.untied:
            self.notes.append("the head and the embedding are no longer one tensor")
        if self._rows > self._size:
            self.notes.append(
                f"{self._rows - self._size} rows were added to the vocabulary's {self._size}; "
                "what was not trained of them begins as the mean of the others"
            )

    def _entries(self) -> dict[str, list[safetensors_stream.Entry]]:
        """The tensors by file, in the order in which the base's files hold them."""
        unplaced = set(self._changes.by_name)
        files: dict[str, list[safetensors_stream.Entry]] = {}
        of_key = {key: name for name, key in self._names.items()}
        names = _file_names(self._weights)
        ordered = sorted(
            self._weights.items(), key=lambda item: (item[1].file.name, item[1].offset)
        )
        for key, weight in ordered:
            name = of_key.get(key, key)
            entries = files.setdefault(names[weight.file], [])
            if name == self._head and (self._tied or self.untied):
                unplaced.discard(name)  # the embedding's, which stands beside it
                continue
            entries.append(self._entry(key, name, weight))
            unplaced.discard(name)
            if name == self._embedding and self.untied:
                entries.append(self._entry(self._head, self._head, weight))
                unplaced.discard(self._head)
        if self._tied:
            unplaced.discard(self._head)
        if unplaced:
            raise UserError(
                f"{self._adapter} does not fit {self._base}: it changes "
                f"{min(unplaced)}, which the base does not have ({len(unplaced)} such weights); it "
                "was trained on another model"
            )
        return files

    def _entry(self, key: str, name: str, weight: Weight) -> safetensors_stream.Entry:
        if weight.kind not in _FLOATS:
            nbytes = _nbytes(weight)
            return safetensors_stream.Entry(
                key, weight.kind, weight.shape, nbytes, lambda: _raw(weight, nbytes)
            )
        turned = isinstance(self._module(name), Conv1D)
        vocabulary = name in (self._embedding, self._head)
        shape = weight.shape
        blocks: Callable[[], Iterator[Tensor]] = lambda: map(torch.from_numpy, weight.rows())  # noqa: E731
        if self._rounding is not None:
            blocks = self._as_trained(self._rounding, weight, name, turned=turned)
        if vocabulary and self._rows > shape[0] and len(shape) == 2:
            blocks = _grown(blocks, self._rows - shape[0])
            shape = (self._rows, *shape[1:])
        if name in self._changes.by_name:
            require_fit(self._changes, name, shape, turned=turned, grown=vocabulary)
            base, changes = blocks, self._changes
            blocks = lambda: changed(changes, name, base, turned=turned)  # noqa: E731
        # A router or a bias in float32 beside weights in 16 bits is so on purpose.
        kept = self._keeps_float32 and weight.kind in _WIDE
        dtype = torch.float32 if kept else self._dtype
        return safetensors_stream.entry(key, shape, dtype, _finite(blocks, name, dtype))

    def _module(self, name: str) -> nn.Module | None:
        try:
            return self._model.get_submodule(name.rpartition(".")[0])
        except AttributeError:
            return None

    def _is_linear(self, name: str) -> bool:
        return name.endswith(".weight") and type(self._module(name)) in (nn.Linear, Conv1D)

    def _as_trained(
        self, rounding: Rounding, weight: Weight, name: str, *, turned: bool
    ) -> Callable[[], Iterator[Tensor]]:
        """A weight as training computed with it."""

        def blocks() -> Iterator[Tensor]:
            if name != self._head and self._is_linear(name):
                yield rounding.rounded(torch.from_numpy(weight.read_all()), turned=turned)
                return
            for block in map(torch.from_numpy, weight.rows()):
                yield block.to(rounding.compute).float()

        return blocks


def _rows_alone(change: Any) -> bool:
    """Whether rows alone were trained: PEFT shares them with a tied head."""
    return change.rows is not None and change.A is None and change.replacement is None


def _grown(
    blocks: Callable[[], Iterator[Tensor]], extra_rows: int
) -> Callable[[], Iterator[Tensor]]:
    """A weight of the vocabulary with rows added, each the mean of those there are."""

    def grown() -> Iterator[Tensor]:
        total, count = torch.zeros(()), 0
        for block in blocks():
            total, count = total + block.sum(0), count + len(block)
            yield block
        yield (total / count).expand(extra_rows, -1)

    return grown


def _finite(
    blocks: Callable[[], Iterator[Tensor]], name: str, dtype: torch.dtype
) -> Callable[[], Iterator[Tensor]]:
    """The blocks, of which every number is one, and is one in the format that it goes to."""

    def looked_at() -> Iterator[Tensor]:
        for block in blocks():
            if not bool(block.isfinite().all()):
                raise UserError(
                    f"{name} would hold numbers that are not finite; the training diverged, or a "
                    "file is damaged"
                )
            require_range(block, name, dtype)
            yield block

    return looked_at


def require_range(weight: Tensor, name: str, dtype: torch.dtype) -> None:
    """A weight's numbers are not beyond what its format can say.

    Raises:
        UserError: They are, and would be infinite.
    """
    if dtype == torch.float16 and not bool(weight.to(dtype).isfinite().all()):
        raise UserError(
            f"{name} holds numbers beyond what float16 can say; choose --dtype bfloat16 or float32"
        )


def _file_names(weights: dict[str, Weight]) -> dict[Path, str]:
    """Names of the merged model's files, one for each of the base's."""
    files = sorted({weight.file for weight in weights.values()})
    if len(files) == 1:
        return {files[0]: WHOLE}
    return {
        file: f"model-{number:05d}-of-{len(files):05d}.safetensors"
        for number, file in enumerate(files, 1)
    }


_SIZES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def _nbytes(weight: Weight) -> int:
    if weight.kind not in _SIZES:
        raise UserError(
            f"{weight.file} holds numbers in the format {weight.kind}; merging needs plain weights "
            "(float32, float16 or bfloat16)"
        )
    return math.prod(weight.shape) * _SIZES[weight.kind]


def _raw(weight: Weight, nbytes: int) -> Iterator[bytes]:
    with weight.file.open("rb") as file:
        file.seek(weight.offset)
        while nbytes:
            data = file.read(min(nbytes, _COPIED))
            if not data:
                raise UserError(f"{weight.file} ends early; fetch or copy the model anew")
            nbytes -= len(data)
            yield data
