"""PiSSA and OLoRA: LoRA that starts from a part of the base's weight, which stays untouched.

PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775) write W = W' + s B₀A₀ and train A and B, from
A₀ and B₀ on, over W'. PEFT changes the base to W'. Here W stays as it is and s B₀A₀ is taken off
each product instead, and what is saved is the update s (B A − B₀A₀) as a LoRA adapter of twice the
rank for W, which is how PEFT converts such an adapter too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lighten.adapters.spec import OWN_INITS, AdapterSpec


class Starts:
    """A₀ [r, I] and B₀ [O, r] of the layers that start from the base's weight, by path.

    Args:
        parts: PEFT's modules by path; the factors of its LoRA layers are set to A₀ and B₀.
        spec: The adapter.
        key: PEFT's name of it.
    """

    def __init__(self, parts: Mapping[str, nn.Module], spec: AdapterSpec, key: str) -> None:
        self.spec, self._key = spec, key
        self._layers: dict[str, Any] = {}
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        if spec.init_lora_weights in OWN_INITS or spec.peft is not None:
            return
        for path, layer in parts.items():
            if isinstance(layer, LoraLayer):
                self._layers[path] = layer
                self._factors[path] = self._initial_factors(layer)

    def __bool__(self) -> bool:
        return bool(self._factors)

    def __contains__(self, path: str) -> bool:
        return path in self._factors

    @torch.no_grad()
    def _initial_factors(self, layer: Any) -> tuple[Tensor, Tensor]:
        """A₀ and B₀ as PEFT makes them; it changes the base's weight, which is put back."""
        weight = layer.get_base_layer().weight
        base_weight, start = weight.data, str(self.spec.init_lora_weights)
        if start == "olora":
            # It reckons in place, and does not know how a Conv1D lies.
            weight.data = _lying(layer, base_weight).clone()
            layer.olora_init(self._key)
        else:
            layer.pissa_init(self._key, start)
        weight.data = base_weight
        A, B = layer.lora_A[self._key].weight, layer.lora_B[self._key].weight
        return A.detach().clone(), B.detach().clone()

    def product(self, path: str, x: Tensor) -> Tensor:
        """What the start took from the base: s · x A₀ᵀ B₀ᵀ, [..., I] → [..., O] in x's format."""
        A, B = (factor.to(x.dtype) for factor in self._factors[path])
        return self._scale(path) * F.linear(F.linear(x, A), B)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the updates to the base's weights, rounded once, and leave PEFT none to merge."""
        for path, (A, B) in self._factors.items():
            layer = self._layers[path]
            factor, weight = layer.lora_B[self._key].weight, layer.get_base_layer().weight
            delta = self._scale(path) * (factor @ layer.lora_A[self._key].weight - B @ A)
            weight.copy_((weight.float() + _lying(layer, delta)).to(weight.dtype))
            factor.zero_()

    def joined(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """PEFT's state of the adapter with the start beside it, in twice the rank."""
        for path, (A, B) in self._factors.items():
            down, up = _keys(path)
            state[down] = torch.cat([state[down], A])
            state[up] = torch.cat([state[up], -B], 1)
        return state

    def parted(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The reverse of `joined`: the start is taken over, PEFT's state is given back."""
        for path, (A, B) in self._factors.items():
            down, up = _keys(path)
            weights[down], first = weights[down].chunk(2)
            A.copy_(first)
            weights[up], first = weights[up].chunk(2, 1)
            B.copy_(-first)
        return weights

    def config(self) -> dict[str, Any]:
        """What the joined adapter's configuration says otherwise: rank doubled, scale the same."""
        if not self:
            return {}
        spec = self.spec
        factor = math.sqrt(2) if spec.use_rslora else 2.0
        return {
            "r": 2 * spec.r,
            "lora_alpha": factor * spec.alpha,
            "rank_pattern": {key: 2 * rank for key, rank in spec.rank_pattern.items()},
            "alpha_pattern": {key: factor * a for key, a in spec.alpha_pattern.items()},
        }

    def _scale(self, path: str) -> float:
        return float(self._layers[path].scaling[self._key])


def _keys(path: str) -> tuple[str, str]:
    prefix = f"base_model.model.{path}"
    return f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"


def _lying(layer: Any, weight: Tensor) -> Tensor:
    """[O, I] to how the base's layer holds it, and back."""
    return weight.T if isinstance(layer.get_base_layer(), Conv1D) else weight
