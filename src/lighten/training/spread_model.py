"""The finished model whose weights are spread over ranks, written a few weights at a time.

Its files are byte for byte those that `save_pretrained` would write of it whole: names, index, tied
weights once, and what transformers merged as it read them (experts) apart again. A rank has one
weight whole at a time, or those of a layer where they are made of each other.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from lighten import safetensors_stream
from lighten.adapters import dtensors
from lighten.errors import UserError
from lighten.safetensors_header import read_header, write_index
from lighten.safetensors_stream import KINDS

_PATTERN = "model{suffix}.safetensors"
# Weights of one layer are alike up to the first number: `model.layers.7`.
_LAYER = re.compile(r"(.*?\.\d+)\.")


class _Source(NamedTuple):
    """What a tensor of the files is made of.

    Attributes:
        keys: The model's weights.
        as_it_is: It is the one weight.
    """

    keys: tuple[str, ...]
    as_it_is: bool


class SpreadModel:
    """The files of a model, each rank having some rows of its weights.

    All ranks go through the same weights in the same order: one writes, the others take part.

    Args:
        model: Whose.
        format_of: What a weight that learns is rounded to, by its name.
        max_shard_size: Of a file, as transformers says it.
        release: Is called when a weight was gathered: what was read for it is not needed any more.
    """

    def __init__(
        self, model: PreTrainedModel, format_of: Callable[[str], torch.dtype], max_shard_size: str,
        release: Callable[[], None],
    ) -> None:  # fmt: skip
        self._model, self._format_of, self._release = model, format_of, release
        self._weights: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
        empty = {key: torch.empty(value.shape, dtype=self._dtype_of(key), device="meta")
                 for key, value in self._weights.items()}  # fmt: skip
        for key in model._keys_to_ignore_on_save or ():
            empty.pop(key, None)
        # Of tensors without memory it looks at the model's parameters themselves.
        kept = remove_tied_weights_from_state_dict(empty, model)
        self._tensors = revert_weight_conversion(model, dict(kept))
        self._sources = _sources(model, kept, self._tensors)
        # What is cut from one tensor goes into one file, as with tensors that have memory.
        self._split = split_state_dict_into_shards_factory(
            self._tensors, filename_pattern=_PATTERN, max_shard_size=max_shard_size,
            get_storage_size=lambda tensor: tensor.untyped_storage().nbytes(),
            get_storage_id=lambda tensor: tensor.untyped_storage()._cdata,
        )  # fmt: skip
        self._gathered: tuple[_Source | None, dict[str, Tensor]] = (None, {})

    def write(self, folder: Path) -> None:
        """Write configuration, weights and index, and look at what was written.

        Raises:
            OSError: It cannot be written.
            UserError: What was written is not whole.
        """
        config, model = self._model.config, self._model
        model.save_pretrained(folder, state_dict={})
        floating = (key for key, value in model.named_parameters() if value.is_floating_point())
        config.dtype = self._dtype_of(next(floating))  # of what learns it says the format of now
        config.save_pretrained(folder)
        for file, names in self._files():
            safetensors_stream.write(folder / file, [self._entry(name) for name in names])
        if self._split.is_sharded:
            facts = {"total_parameters": model.num_parameters(), **self._split.metadata}
            write_index(folder, self._split.tensor_to_filename, facts)
        self._verify(folder)

    def take_part(self) -> None:
        """What every other rank does meanwhile: hand over the rows that it holds."""
        for _, names in self._files():
            for name in names:
                self._gather(name)

    def _files(self) -> Iterator[tuple[str, list[str]]]:
        """The files with their tensors' names, as safetensors orders them."""
        order = list(KINDS)
        for file, names in self._split.filename_to_tensors.items():
            yield (
                file,
                sorted(names, key=lambda name: (-order.index(self._tensors[name].dtype), name)),
            )

    def _entry(self, name: str) -> safetensors_stream.Entry:
        tensor = self._tensors[name]
        shape = tuple(tensor.shape)
        return safetensors_stream.entry(name, shape, tensor.dtype, lambda: [self._gather(name)])

    @torch.no_grad()
    def _gather(self, name: str) -> Tensor:
        """A tensor of the files, whole in main memory."""
        source = self._sources[name]
        if source != self._gathered[0]:
            self._gathered = (None, {})  # lets go of the last before the next one comes
            made = {key: self._whole(key) for key in source.keys}
            if not source.as_it_is:
                made = revert_weight_conversion(self._model, made)
            self._gathered = source, made
        return self._gathered[1][name]

    def _whole(self, key: str) -> Tensor:
        value = self._weights[key].detach().to(self._dtype_of(key))
        whole = dtensors.full_tensor(value).cpu()
        self._release()
        return whole

    def _dtype_of(self, key: str) -> torch.dtype:
        value = self._weights[key]
        return self._format_of(key) if value.requires_grad else value.dtype

    def _verify(self, folder: Path) -> None:
        """Each tensor is in its file with its format and shape, by the files' own account.

        Raises:
            UserError: One is not.
        """
        for file, names in self._files():
            stored = {name: (KINDS[self._tensors[name].dtype], tuple(self._tensors[name].shape))
                      for name in names}  # fmt: skip
            if stored != {name: (tensor.kind, tensor.shape)
                          for name, tensor in read_header(folder / file).items()}:  # fmt: skip
                raise UserError(f"{folder / file} does not hold what was written to it")


def _sources(
    model: PreTrainedModel, kept: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, _Source]:
    """Which of the model's weights each tensor of the files is made of, a layer's at most.

    Args:
        model: Whose.
        kept: Its weights, without memory.
        tensors: What is made of all of them for the files.
    """
    sources: dict[str, _Source] = {}
    shapes: dict[str, torch.Size] = {}
    for _, group in itertools.groupby(kept, key=_layer_of):
        keys = tuple(group)
        made = revert_weight_conversion(model, {key: kept[key] for key in keys})
        shapes |= {name: value.shape for name, value in made.items()}
        alone = {id(kept[key]): key for key in keys}
        for name, value in made.items():
            as_it_is = alone.get(id(value)) == name
            sources[name] = _Source((name,), True) if as_it_is else _Source(keys, False)
    if shapes == {name: value.shape for name, value in tensors.items()}:
        return sources
    return dict.fromkeys(tensors, _Source(tuple(kept), False))  # it takes several layers


def _layer_of(key: str) -> str:
    match = _LAYER.match(key)
    return key if match is None else match[1]
