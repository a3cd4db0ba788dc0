"""Which attention a model computes with: the setting `attn_implementation` on a device."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from lighten import cpu
from lighten.errors import UserError
from lighten.machine.hardware import Choice
from lighten.models import attention as blocks
from lighten.wording import first_line

_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
FLASH_SINCE = (8, 0)  # compute capability from which its kernels compute


def require_attention(name: str, device: str, capability: tuple[int, int] | None = None) -> None:
    """Say what an attention lacks on a device, before anything is loaded.

    Args:
        name: transformers' name.
        device: `cpu` or a CUDA device.
        capability: Compute capability of a GPU that is only planned for; None: this machine's.

    Raises:
        UserError: Its package is not installed, or the device has not what its kernels want.
    """
    if name not in _PACKAGES:
        return
    if importlib.util.find_spec(_PACKAGES[name]) is None:
        raise UserError(
            f"attn_implementation: {name} needs the package {_PACKAGES[name]}, which is not "
            "installed; use sdpa, or install it (it needs a CUDA device)"
        )
    if device == "cpu":
        raise UserError(f"attn_implementation: {name} is for CUDA devices alone; use sdpa")
    if capability is None and device.startswith("cuda") and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(torch.device(device))
    if capability is not None and capability < FLASH_SINCE:
        raise UserError(
            f"attn_implementation: {name} needs compute capability {FLASH_SINCE[0]}.0, and this "
            f"GPU has {capability[0]}.{capability[1]}; use sdpa, which keeps no scores there either"
        )


def set_attention(
    model: PreTrainedModel, name: str, device: str, capability: tuple[int, int] | None = None
) -> Choice:
    """Set the attention implementation; plain attention where the architecture has no other.

    Args:
        model: Whose.
        name: transformers' name.
        device: `cpu` or `cuda`.
        capability: Compute capability of a GPU that is only planned for; None: this machine's, or
            a recent one.
    """
    require_attention(name, device, capability)
    if name == "sdpa" and getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
        return Choice("eager", f"{type(model).__name__} caps its scores, which sdpa leaves out")
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        if name != "sdpa":
            raise UserError(f"attn_implementation: {name}: {first_line(error)}") from error
        model.set_attn_implementation("eager")
    in_use = str(model.config._attn_implementation)
    if in_use == name == "sdpa" and (obstacle := _keeps_pytorchs(model)) is not None:
        return Choice(name, f"PyTorch's own: {obstacle}")
    if in_use == name == "sdpa" and device == "cpu" and not cpu.enabled():
        return Choice(name, f"PyTorch's own: {cpu.OFF}")
    if in_use == name == "sdpa" and device == "cpu":
        blocks.register()
        model.set_attn_implementation(blocks.NAME)
        return blocks.choice(model.dtype)
    if in_use == name == "sdpa" and device.startswith("cuda"):
        if capability is None and torch.cuda.is_available():
            capability = torch.cuda.get_device_capability()
        capability = capability or blocks.GROUPED_SINCE
        if capability < blocks.GROUPED_SINCE or model.dtype == torch.float32:
            blocks.register_repeated(capability)
            model.set_attn_implementation(blocks.REPEATS)
            text = model.config.get_text_config()
            heads = getattr(text, "num_attention_heads", None)
            if getattr(text, "num_key_value_heads", None) in (None, heads):
                return Choice("sdpa", "PyTorch's kernels for this GPU and format")
            why = "grouped keys are repeated: no kernel of this GPU, or of float32, reads them"
            return Choice("sdpa", why)
    if in_use == name:
        return Choice(name, "attn_implementation of the recipe")
    return Choice(in_use, f"{type(model).__name__} has no {name} attention")


def _keeps_pytorchs(model: PreTrainedModel) -> str | None:
    """Why a model's attention is PyTorch's under that name alone; None: it takes any other's."""
    name = type(model).__name__
    if not model._can_set_attn_implementation():
        return f"{name} takes none from outside"
    if any(map(_asks_for_a_name, {type(module) for module in model.modules()})):
        return f"{name} computes another attention where its name is not sdpa"
    return None


def _asks_for_a_name(layer: type[nn.Module]) -> bool:
    """Whether a layer calls whatever attention is set, and does more for one called sdpa.

    DeepSeek V3.2 and those after it hide the keys that an indexer has not chosen in a mask for
    PyTorch's attention alone; to others they give their places, which ours would not look at.
    """
    code = getattr(inspect.unwrap(layer.forward), "__code__", None)
    if code is None or not {"get_interface", "_attn_implementation"} <= set(code.co_names):
        return False
    return "sdpa" in _flat(code.co_consts)


def _flat(constants: object) -> Iterator[object]:
    """Constants, and those within them."""
    if isinstance(constants, tuple | frozenset):
        for constant in constants:
            yield from _flat(constant)
    else:
        yield constants
