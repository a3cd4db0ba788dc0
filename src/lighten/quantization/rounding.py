"""The weights that an adapter learnt on where its base was quantised while it was loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lighten.artifacts import Artefact
from lighten.machine import hardware
from lighten.models import quantized


@dataclass(frozen=True)
class Rounding:
    """What became of a base's weights in training.

    Attributes:
        storage: How linear layers but the head were quantised.
        compute: The format of the products, and of everything else.
    """

    storage: quantized.Storage
    compute: torch.dtype

    def apply(self, model: Any) -> None:
        """Give a dense model the weights of training, dequantised, in place and in its format."""
        head = model.get_output_embeddings()
        linear = {
            id(module.weight): module for module in model.modules()
            if type(module) in (nn.Linear, Conv1D) and module is not head
        }  # fmt: skip
        for parameter in model.parameters():
            rounded = parameter.data.to(self.compute)
            if (layer := linear.get(id(parameter))) is not None:
                rounded = self.rounded(parameter.data, turned=isinstance(layer, Conv1D))
            parameter.data.copy_(rounded)

    def rounded(self, weight: Tensor, *, turned: bool) -> Tensor:
        """A linear layer's weight as its quantised layer computed with it.

        Args:
            weight: [O, I], or [I, O] where it is `turned` as in GPT-2.
            turned: Whether it is.
        """
        dense = weight.to(self.compute)
        dense = dense.T.contiguous() if turned else dense
        dense = quantized.rounded(dense, self.storage, self.compute)
        return (dense.T if turned else dense).float()


def rounding_of(artefact: Artefact) -> Rounding:
    """How the base of an artefact was quantised in its run.

    Raises:
        UserError: It was not, or bitsandbytes is missing.
    """
    settings = artefact.quantization
    storage = quantized.choose(
        settings["load_in_4bit"], settings["load_in_8bit"], settings["bnb_4bit_quant_type"],
        settings["bnb_4bit_use_double_quant"],
    )  # fmt: skip
    assert storage is not None  # a base that was not quantised has no such artefact
    return Rounding(storage, getattr(torch, trained_dtype(artefact)))


def trained_dtype(artefact: Artefact) -> str:
    """The format in which the products of the run's training were computed."""
    assert artefact.run is not None
    choices = {choice["what"]: choice["value"] for choice in artefact.run.info().get("choices", [])}
    requested = artefact.run.recipe().compute_dtype
    return str(choices.get("dtype") or hardware.choose_dtype(requested, "cpu").value)
