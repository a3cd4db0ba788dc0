"""Where a base keeps its decoder layers: whatever goes by layers asks here."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def stacked_experts(layer: nn.Module) -> list[str]:
    """Names of parameters that hold the weights of several experts, one behind the other."""
    return [
        f"{path}.{name}" if path else name
        for path, module in layer.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and not isinstance(module, nn.Conv1d)
    ]


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers of a base, first to last; none if the architecture does not say.

    They are the list of as many modules as the configuration says there are layers. transformers
    knows which part of a model that also sees or hears is the decoder.
    """
    layer_count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    decoder = model.get_decoder() or model.base_model
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layer_count:
            return list(module)
    return []
