"""How rows are laid out in micro-batches: chosen for machine and model, with the reasons."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from lighten import cpu, models
from lighten.adapters.decoder import decoder_layers
from lighten.engine import workers
from lighten.errors import UserError
from lighten.machine import hardware
from lighten.machine.hardware import Choice
from lighten.models import attention

# Matrix products of this many rows come near a processor's full rate. Each costs as much as some
# more rows before its first one, and of the quicker ones on AMX tiles that is a larger share
# (docs/lab-notes.md).
CPU_TOKENS, TILES_TOKENS = 1024, 1536
TILES = "amx_bf16"
# Kinds of layers, as transformers calls them, that carry something from token to token.
CARRYING = {"conv", "linear_attention", "mamba"}


def choose_packing(
    setting: bool | str, model: PreTrainedModel, hindered: str | None = None
) -> Choice:
    """Whether rows stand behind each other in a micro-batch, and why.

    Args:
        setting: The recipe's `packing`.
        model: The base.
        hindered: Why what learns cannot be packed, or None.

    Raises:
        UserError: It is wanted and a layer would look across rows.
    """
    hindered = hindered or _carries(model)
    implementation = str(model.config._attn_implementation)
    name = attention.setting_of(implementation)
    if setting is False:
        return Choice("off", "packing of the recipe")
    if hindered is not None:
        if setting is True:
            raise UserError(f"packing: {hindered}; set it to false or auto")
        return Choice("off", hindered)
    if implementation in attention.PACKS:
        return Choice("on", f"{name} attention keeps packed rows apart")
    if setting is True and name == "sdpa" and not cpu.enabled():
        raise UserError(
            f"packing: {cpu.OFF}, and PyTorch's own attention would let rows look at each other; "
            f"set packing to auto, or unset {cpu.SWITCH}"
        )
    if setting is True:
        offered = {attention.setting_of(packs) for packs in attention.PACKS} - {name}
        if model.device.type != "cpu":
            offered.discard("sdpa")  # on a processor alone it is ours
        raise UserError(
            f"packing: {name} attention would let rows look at each other; set packing to false, "
            f"or attn_implementation to one of {', '.join(sorted(offered))}"
        )
    return Choice("off", f"{name} attention does not keep packed rows apart")


def _carries(model: PreTrainedModel) -> str | None:
    """Why rows behind each other would not be told apart, whatever the attention is."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    convolutions = (
        module
        for layer in decoder_layers(model)
        for module in layer.modules()
        if isinstance(module, nn.Conv1d) and module.kernel_size[0] > 1
    )
    if CARRYING.isdisjoint(kinds) and next(convolutions, None) is None:
        return None
    return f"layers of {type(model).__name__} carry a state from one row to the next"


def choose_tokens(setting: int | str | None, device: str, dtype: str) -> tuple[int | None, str]:
    """Tokens of one micro-batch at most (None: as many as its rows have), and why.

    Args:
        setting: `auto`, or what the recipe says.
        device: `cpu` or `cuda`.
        dtype: Of the products.
    """
    if isinstance(setting, int):
        return setting, "tokens_per_microbatch of the recipe"
    if setting is None or device != "cpu":
        return None, "per_device_train_batch_size alone decides"
    if dtype == "bfloat16" and TILES in hardware.processor_flags():
        return TILES_TOKENS, "it fills matrix products on AMX tiles; more would only cost memory"
    return CPU_TOKENS, "it fills a processor's matrix products; more would only cost memory"


def choose_passes(base: models.Base, tokens: int, most: int | None, side_by_side: int) -> Choice:
    """Whether the adapters of a cohort share micro-batches, and why.

    Args:
        base: What it is trained on.
        tokens: Of one adapter in one step on this rank, on average.
        most: Tokens of a micro-batch at most; None: rows decide.
        side_by_side: The number of workers.
    """
    if base.feed is not None:
        return Choice("together", "a layer is brought once for all adapters")
    if base.quantization is not None:
        return Choice("together", "a weight is dequantised once for all adapters")
    if most is None:
        return Choice("together", "as many rows as fit read the base's weights once")
    if tokens < side_by_side * workers.FULL_TOKENS:
        return Choice("together", f"{tokens} tokens of one adapter alone fill no micro-batch")
    return Choice("apart", "each fills micro-batches, and one adapter's gradients are kept at once")
