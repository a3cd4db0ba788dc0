"""A recipe's base on fake tensors: the real classes, from a configuration alone.

Dense weights come from transformers' own constructors, quantised ones are bitsandbytes' parameters
over fake bytes and scales in the shapes its quantisers give them. Nothing is downloaded but the
configuration, and nothing is computed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from lighten import models
from lighten.machine.hardware import Choice
from lighten.models import gguf, quantized
from lighten.models.attention_setting import set_attention
from lighten.models.configuration import read_config
from lighten.models.load import locate
from lighten.models.stored import held_as, loaded_bytes, packed_paths, stored_in
from lighten.planning import streamed
from lighten.planning.storage_tracker import StorageTracker
from lighten.recipe import Recipe


def config_of(recipe: Recipe) -> tuple[Any, str, Path]:
    """The base's configuration, where it came from and its folder or file.

    Raises:
        UserError: No such model, transformers does not know its architecture, or a GGUF file
            splits text in a way that is not known here.
    """
    name, code = recipe.model_name_or_path, recipe.trust_remote_code
    source, path = locate(name, revision=recipe.revision, weights=False, code=code)
    if source == "gguf":
        config = gguf.read_config(path)
        gguf.require_tokens(path)
        return config, source, path
    return read_config(path, trust_remote_code=code), source, path


def storage_of(recipe: Recipe, config: Any) -> quantized.Storage | None:
    """How the linear layers of a base are stored once it is loaded; None: they are dense.

    Args:
        recipe: What is wanted.
        config: Of the base, whose files may be quantised already.

    Raises:
        UserError: They are, and in another way than the recipe wants.
        MissingExtra: bitsandbytes is needed and not installed.
    """
    asked = quantized.choose(
        recipe.load_in_4bit, recipe.load_in_8bit,
        recipe.bnb_4bit_quant_type, recipe.bnb_4bit_use_double_quant,
    )  # fmt: skip
    return held_as(recipe.model_name_or_path, stored_in(config), asked)


def stored_dtype(config: Any) -> torch.dtype:
    """The format that a configuration says of the dense weights in its files.

    Of models that see pictures too some say it of their language model alone (Qwen3.5).
    """
    stated = [getattr(part, "dtype", None) for part in (config, config.get_text_config())]
    name = str(stated[0] or stated[1] or "float32").removeprefix("torch.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def fake_base(
    recipe: Recipe, config: Any, dtype: Choice, device: str, tracker: StorageTracker,
    capability: tuple[int, int] | None = None,
) -> models.Base:  # fmt: skip
    """The base that `training.base.load_base` would load, inside fake tensors.

    Its `file_bytes` are those that its configuration says.

    Args:
        recipe: What is wanted.
        config: Of the base.
        dtype: The format of the products.
        device: `cpu` or `cuda`: what it is planned for.
        tracker: Learns what each weight is.
        capability: Compute capability of a CUDA device, if known.
    """
    trains_all = recipe.method == "full" and recipe.last_layers is None
    storage, stored = storage_of(recipe, config), stored_dtype(config)
    compute: torch.dtype = getattr(torch, dtype.value)
    with no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config),  # a model that is made changes the format that it says
            dtype=torch.float32 if trains_all else compute,
            trust_remote_code=recipe.trust_remote_code,
        )
    model.tie_weights()
    file_bytes = loaded_bytes(model, stored.itemsize)  # before it is made otherwise
    if storage is not None:
        _quantise(model, storage, compute, stored_in(config))
    feed = None
    if recipe.offload_base != "none":
        feed = streamed.stream(model, compute)
        if device == "cpu" and stored == compute:
            streamed.without_embeddings(model)
    model.requires_grad_(False)
    for tensor in feed.slots if feed is not None else ():
        tracker.mark(tensor, "base weights")
    for tensor in (*model.parameters(), *model.buffers()):
        tracker.mark(tensor, "base weights")
    for layer in model.modules():
        if hasattr(layer, "dense_weight") and not hasattr(layer, "streamed_bytes"):
            for tensor in quantized.scales_of(layer.weight):
                tracker.mark(tensor, "quantisation constants")
    return models.Base(
        model=model.eval(), tokenizer=None, name=recipe.model_name_or_path, source="folder",
        path=Path(), revision=None, file_bytes=file_bytes, dtype=dtype,
        attention=set_attention(model, recipe.attn_implementation, device, capability),
        quantization=None if storage is None else Choice(str(storage), "of the recipe"),
        feed=feed,
    )  # fmt: skip


def _quantise(
    model: PreTrainedModel, storage: quantized.Storage, compute: torch.dtype,
    stored: dict[str, Any] | None,
) -> None:  # fmt: skip
    """As `quantized.finish` does it, with bytes that are fake."""
    shared: dict[str, Tensor] = {}
    for path in packed_paths(model, stored):
        module: Any = model.get_submodule(path)
        weight: Tensor = module.weight.data
        shape = weight.T.shape if isinstance(module, Conv1D) else weight.shape
        packed = _packed(shape, storage, compute, shared)
        with _disable_current_modes():  # a layer makes a parameter of its own first
            layer = quantized.packed_layer(
                packed, module.bias, torch.Size(shape), compute, type(module)
            )
        model.set_submodule(path, layer)


def _packed(
    shape: torch.Size, storage: quantized.Storage, compute: torch.dtype, shared: dict[str, Tensor]
) -> Any:
    """What bitsandbytes makes of a weight [O, I], without values.

    A plain parameter: its own classes cannot be made of fake tensors, and nothing here needs them.
    """
    from bitsandbytes.functional import QuantState

    numbers = shape[0] * shape[1]
    if storage.kind == "int8":
        weight: Any = nn.Parameter(torch.empty(shape, dtype=torch.int8), requires_grad=False)
        weight.SCB = torch.empty(shape[0])
        return weight
    code = shared.setdefault("code", torch.empty(16))
    scales = -(-numbers // quantized.BLOCK_OF_FOUR_BITS)
    absmax, nested, offset = torch.empty(scales), None, None
    if storage.double:
        second = -(-scales // quantized.BLOCK_OF_SCALES)
        nested = QuantState(
            absmax=torch.empty(second), code=shared.setdefault("code2", torch.empty(256)),
            blocksize=quantized.BLOCK_OF_SCALES, dtype=torch.float32,
        )  # fmt: skip
        absmax, offset = torch.empty(scales, dtype=torch.uint8), torch.empty(())
    weight = nn.Parameter(
        torch.empty((numbers + 1) // 2, 1, dtype=torch.uint8), requires_grad=False
    )
    weight.quant_state = QuantState(
        absmax=absmax, shape=shape, code=code, blocksize=quantized.BLOCK_OF_FOUR_BITS,
        quant_type=storage.kind, dtype=compute, offset=offset, state2=nested,
    )  # fmt: skip
    return weight


@contextmanager
def converted_in_place() -> Iterator[None]:
    """Inside, `nn.Module.to`, `float` and their like keep a parameter and change its contents.

    PyTorch's own swap a fake parameter's whole tensor, which it refuses as soon as anything refers
    to it weakly, as whoever follows its memory does. PEFT calls them for each module it makes.
    """
    before = nn.Module._apply
    nn.Module._apply = _apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = before  # type: ignore[method-assign]


@torch.no_grad()
def _apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    if recurse:
        for child in module.children():
            _apply(child, fn)
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.data = fn(parameter.data)
            if parameter.grad is not None:
                parameter.grad.data = fn(parameter.grad.data)
    for key, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[key] = fn(buffer)
    return module
