"""A base built around its feed: what is streamed has no memory, the rest is read at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, distributed, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from lighten.adapters.decoder import decoder_layers, stacked_experts
from lighten.adapters.frozen import out_in_features
from lighten.errors import UserError
from lighten.models.configuration import FAULTS, read_config, reason
from lighten.models.quantized import Storage, finish
from lighten.parallel.streamed.cuda import CudaSlots
from lighten.parallel.streamed.feed import LayerFeed, LayerPieces, MemorySlots, Slots
from lighten.parallel.streamed.layers import (
    Absent,
    Replaced,
    StreamedLinear,
    StreamedLinear4bit,
    StreamedLinear8bit,
)
from lighten.parallel.streamed.over_ranks import RankFeed, part_of
from lighten.parallel.streamed.packed import (
    INT8_SCALES,
    Linear,
    packed_layer,
    quantised,
    state_of,
)
from lighten.parallel.streamed.shards import DTYPES, Loaded, Shards
from lighten.safetensors_header import Stored

# Formats of weights as they are; others belong to a quantiser.
DENSE = ("F32", "F16", "BF16")
PACKED = ("U8", "I8")
LEFT_IN_FILE_BYTES = 2**20
Check = Callable[[PreTrainedModel], None]
AnyFeed = TypeVar("AnyFeed", LayerFeed, RankFeed)


@dataclass(frozen=True)
class Setting:
    """What asks for layers that are not in memory, for errors.

    Attributes:
        name: Of the recipe's setting.
        instead: What to do where it cannot be.
    """

    name: str = "offload_base"
    instead: str = "set offload_base to none"


@dataclass
class Streamed:
    """A base, most of which is not in memory.

    Attributes:
        model: Frozen, in the format of its products.
        feed: What brings its layers.
    """

    model: PreTrainedModel
    feed: LayerFeed | RankFeed


def build(
    name: str, folder: Path, dtype: torch.dtype, *, device: str, keeps: str = "disk",
    storage: Storage | None = None, trust_remote_code: bool = False, check: Check | None = None,
    setting: Setting | None = None,
) -> Streamed:  # fmt: skip
    """Build a model from a folder, its decoder layers' linear weights streamed.

    Args:
        name: As the user gave it.
        folder: Of the model, with safetensors.
        dtype: The format of the products.
        device: `cpu` or a CUDA device.
        keeps: Where the layers wait: `disk`, `cpu` for pinned main memory, or `ranks`: each of
            torch.distributed's holds a part of every layer.
        storage: What the linear layers are quantised to, once; None: they are as in their files.
        trust_remote_code: Run Python code that comes with the model.
        check: Looks at the model while none of its weights is there.
        setting: What asks for it; None: `offload_base`.

    Raises:
        UserError: The model's layers cannot be streamed, or its files lack a weight.
    """
    shards, setting = Shards.of(folder), setting or Setting()
    model = without_weights(name, folder, dtype, trust_remote_code)
    if check is not None:
        check(model)
    where = torch.device(device)
    names = Names(name, shards, model, setting)
    linears = _linears(name, model, names, setting)
    feed: LayerFeed | RankFeed
    if keeps == "ranks":
        feed = _over_ranks(model, linears, shards, storage, dtype, where)
    else:
        if storage is not None:
            packed = quantised(folder, shards, linears, storage, dtype)
        feed = _from_files(model, linears, packed if storage else shards, dtype, where, keeps)
    _fill(name, model, names, where)
    _give_rows_back(model, names)
    finish(model, storage, dtype, device)  # linear layers outside of the decoder's
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config._name_or_path = str(folder)
    _follow_passes(model, feed)
    return Streamed(model.requires_grad_(False).eval(), feed)


class Names:
    """What a model's weights are called in its files.

    Args:
        name: Of the model, for errors.
        shards: The files' tensors.
        model: Whose own names need not have the prefix of its backbone.
        setting: What asks for them.
    """

    def __init__(self, name: str, shards: Shards, model: PreTrainedModel, setting: Setting) -> None:
        self._name, self.shards, self._setting = name, shards, setting
        self._prefix = f"{model.base_model_prefix}."

    def get(self, weight: str) -> str | None:
        """The name in the files of the model's weight; None: there is none."""
        for name in (weight, weight.removeprefix(self._prefix), f"{self._prefix}{weight}"):
            if name in self.shards:
                return name
        return None

    def linear(self, weight: str, module: nn.Module) -> str:
        """The name of a linear layer's weight, dense or packed.

        Raises:
            UserError: It is not there as the model has it.
        """
        named = self.get(weight)
        if named is not None and self.shards[named].kind in PACKED:
            return named
        return self.dense(weight, tuple(module.weight.shape))[0]  # type: ignore[arg-type]

    def dense(self, weight: str, shape: tuple[int, ...]) -> tuple[str, Stored]:
        """The name of a dense weight, and where it is.

        Raises:
            UserError: It is not there as the model has it.
        """
        named = self.get(weight)
        if named is None:
            raise UserError(
                f"{self._setting.name}: the files of {self._name} have no {weight} under that "
                f"name, so it cannot be read from where it lies; {self._setting.instead}"
            )
        stored = self.shards[named]
        if stored.shape != shape or stored.kind not in DENSE:
            raise UserError(
                f"{self._setting.name}: {weight} of {self._name} is {stored.kind} "
                f"{list(stored.shape)} in its file, and {list(shape)} in the model; only "
                f"{', '.join(DENSE)} of the same shape can be read from where they lie; "
                f"{self._setting.instead}"
            )
        return named, stored


def without_weights(
    name: str, folder: Path, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    """The model with shapes in place of weights, and with the buffers that it computes.

    Args:
        name: As the user gave it.
        folder: Of the model; its configuration alone is read.
        dtype: The format of its products.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        UserError: The configuration describes no language model.
    """
    config = read_config(folder, trust_remote_code=trust_remote_code)
    try:
        with init_empty_weights(include_buffers=False), no_init_weights():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except FAULTS as error:
        raise UserError(f"{name} is no model that can be built: {reason(error)}") from error
    return model


def _linears(
    name: str, model: PreTrainedModel, names: Names, setting: Setting
) -> list[list[Linear]]:
    """The linear layers of each decoder layer."""
    layers = decoder_layers(model)
    if not layers:
        raise UserError(
            f"{setting.name}: {type(model).__name__} does not say which of its layers are alike, "
            f"so none can be streamed; {setting.instead}"
        )
    paths = {id(module): path for path, module in model.named_modules()}
    linears: list[list[Linear]] = []
    for layer in layers:
        if stacked := stacked_experts(layer):
            raise UserError(
                f"{setting.name}: the experts of {name} are stacked ({stacked[0]}) and would stay "
                f"in memory; {setting.instead}"
            )
        linears.append([])
        for module in layer.modules():
            if type(module) in (nn.Linear, Conv1D):
                path = paths[id(module)]
                linears[-1].append((path, module, names.linear(f"{path}.weight", module)))
    return linears


def _replaced(
    place: int, model: PreTrainedModel, linears: Sequence[Linear], shards: Shards | Loaded,
    dtype: torch.dtype, device: torch.device,
) -> tuple[LayerPieces, Absent]:  # fmt: skip
    """Put streamed layers in the place of a decoder layer's linear ones."""
    pieces, absent = LayerPieces(), Absent(place)
    for path, module, dense in linears:
        # What was quantised here has the model's own names.
        weight = dense if dense in shards else f"{path}.weight"
        state, features = state_of(weight, shards, device), out_in_features(module)
        was = Replaced(type(module), features, module.bias, dtype, device)  # type: ignore[arg-type]
        layer: StreamedLinear
        if shards[weight].kind == "I8":
            piece = pieces.add(weight, torch.int8, shards[weight].shape)
            scales = f"{weight.removesuffix('weight')}{INT8_SCALES}"
            blocks = pieces.add(scales, torch.float32, shards[scales].shape)
            layer = StreamedLinear8bit(was, absent, piece, blocks)
        elif state is None:
            piece = pieces.add(weight, dtype, module.weight.shape)  # type: ignore[arg-type]
            layer = StreamedLinear(was, absent, piece)
        else:
            if tuple(state.shape) != features:
                raise UserError(
                    f"{path} is {tuple(state.shape)} in its file, and {features} in the model; put "
                    "back the config.json that belongs to it"
                )
            piece = pieces.add(weight, torch.uint8, shards[weight].shape)
            scales = f"{weight}.absmax"
            blocks = pieces.add(scales, DTYPES[shards[scales].kind], shards[scales].shape)
            layer = StreamedLinear4bit(was, absent, piece, blocks, state)
        model.set_submodule(path, layer)
    return pieces, absent


def _from_files(
    model: PreTrainedModel, linears: Sequence[Sequence[Linear]], shards: Shards,
    dtype: torch.dtype, device: torch.device, keeps: str,
) -> LayerFeed:  # fmt: skip
    layers = [
        _replaced(place, model, layer, shards, dtype, device) for place, layer in enumerate(linears)
    ]
    pieces = [layer_pieces for layer_pieces, _ in layers]
    return _fed(layers, LayerFeed(pieces, _slots(pieces, shards, device, keeps)))


def _over_ranks(
    model: PreTrainedModel, linears: Sequence[Sequence[Linear]], shards: Shards,
    storage: Storage | None, dtype: torch.dtype, device: torch.device,
) -> RankFeed:  # fmt: skip
    """Read and pack a layer, keep this rank's part, and let go of the others' before the next."""
    rank, count = distributed.get_rank(), distributed.get_world_size()
    layers, parts = [], []
    for place, layer in enumerate(linears):
        source: Shards | Loaded = shards
        if storage is not None:
            source = Loaded(packed_layer(layer, shards, storage, dtype))
        layers.append(_replaced(place, model, layer, source, dtype, device))
        parts.append(part_of(layers[-1][0], source.read, rank, count).to(device))
    return _fed(layers, RankFeed([pieces for pieces, _ in layers], parts, count))


def _fed(layers: Sequence[tuple[LayerPieces, Absent]], feed: AnyFeed) -> AnyFeed:
    for _, absent in layers:
        absent.feed = feed
    return feed


def _slots(
    layers: Sequence[LayerPieces], shards: Shards, device: torch.device, keeps: str
) -> Slots:
    if device.type == "cuda":
        return CudaSlots(layers, shards.read, device, all_pinned=keeps == "cpu")
    return MemorySlots(layers, shards)


def _fill(name: str, model: PreTrainedModel, names: Names, device: torch.device) -> None:
    """Read what stays in memory."""
    model.tie_weights()  # so that what is tied is one parameter, and read once
    read: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for key, value in list(module.named_parameters(recurse=False)):
            if value.device.type != "meta":
                continue
            if id(value) not in read:
                weight = f"{path}.{key}".lstrip(".")
                resident = nn.Parameter(
                    _resident(names, weight, value).to(device), requires_grad=False
                )
                # Mapped for as long as it is there.
                resident.files = names.shards  # type: ignore[attr-defined]
                read[id(value)] = resident
            setattr(module, key, read[id(value)])
    for path, module in model.named_modules():
        for key, buffer in list(module.named_buffers(recurse=False)):
            weight = f"{path}.{key}".lstrip(".")
            stored_name = names.get(weight)
            if stored_name is not None and key not in module._non_persistent_buffers_set:
                names.shards.read(stored_name, buffer)
            module._buffers[key] = buffer.to(device)
    if any(value.device.type == "meta" for value in model.parameters()):
        raise UserError(f"{name} is not whole: a weight is in none of its files; fetch it anew")


def _resident(names: Names, weight: str, like: Tensor) -> Tensor:
    """A weight that stays: a large one in its file's format is left there, page by page in memory.

    The system takes back what it needs.
    """
    name, stored = names.dense(weight, tuple(like.shape))
    if DTYPES[stored.kind] == like.dtype and stored.bytes >= LEFT_IN_FILE_BYTES:
        return names.shards.mapped(name)
    weight_in_memory = torch.empty(like.shape, dtype=like.dtype)
    names.shards.read(name, weight_in_memory)
    return weight_in_memory


def _give_rows_back(model: PreTrainedModel, names: Names) -> None:
    """Let an embedding that lies in its file leave memory after each look-up.

    Linux maps a file in pieces of up to 2 MiB, as it holds them in its page cache: a few rows here
    and there bring all of it. One that is the head, too, is needed whole.
    """
    used = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for path, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or used[id(module.weight)] > 1:
            continue
        name, _ = names.dense(f"{path}.weight", tuple(module.weight.shape))
        in_place = names.shards.in_place(name, module.weight.dtype)
        if in_place is not None and in_place.data_ptr() == module.weight.data_ptr():
            module.register_forward_hook(lambda *_, name=name: names.shards.drop(name))


def _follow_passes(model: PreTrainedModel, feed: LayerFeed | RankFeed) -> None:
    def begin(_module: nn.Module, _args: Any) -> None:
        feed.begin(learns=torch.is_grad_enabled())

    model.base_model.register_forward_pre_hook(begin)
