"""How much of its rank an adapter uses: the singular values of each layer's update.

An update is scale·B·A with B [O, r] and A [r, I]; O×I is never formed. QR of the two tall factors
leaves a core of at most r×r, whose singular values are the update's (Golub and Van Loan, Matrix
Computations, 4th ed., section 5.4.4).

Dimensions: O outputs, I inputs, r rank of the factors, k = min(r, O, I) singular values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lighten.adapters.files import read_weights, spec_from_peft
from lighten.adapters.spec import AdapterSpec
from lighten.errors import UserError
from lighten.peft_config import CONFIG, FACTOR, more_than_low_rank, read_config
from lighten.wording import with_article


@dataclass(frozen=True)
class Svd:
    """A singular value decomposition U·diag(values)·Vh, in float64.

    Attributes:
        U: [O, k], orthonormal columns.
        values: [k], falling.
        Vh: [k, I], orthonormal rows.
    """

    U: Tensor
    values: Tensor
    Vh: Tensor


def svd_of_product(B: Tensor, A: Tensor) -> Svd:
    """The decomposition of B·A by that of the small core.

    Args:
        B: [O, r].
        A: [r, I].
    """
    # float64: the products of two QRs would cost float32 factors some of their last digits.
    left, upper = torch.linalg.qr(B.detach().cpu().double())
    right, lower = torch.linalg.qr(A.detach().cpu().double().T)
    U, values, Vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return Svd(left @ U, values, Vh @ right.T)


def effective_rank(values: Tensor) -> float:
    """The rank in use by entropy: exp(-Σ p·ln p) of p = σ/Σσ; k equal values give k, none give 0.

    Source: Roy and Vetterli, The effective rank: a measure of effective dimensionality (2007).

    Args:
        values: Singular values [k].
    """
    if not values.any():
        return 0.0
    share = values.double() / values.double().sum()
    return math.exp(float(torch.special.entr(share).sum()))


def rank_for_energy(values: Tensor, share: float) -> int:
    """The smallest rank whose best approximation keeps this share of Σσ² (0 of a zero update).

    Args:
        values: Singular values [k], falling.
        share: Of the energy, over 0 and up to 1.
    """
    energy = values.double().square().cumsum(0)
    if not values.any():
        return 0
    # What rounding alone leaves in the tail is no rank.
    reaches_share = energy >= share * energy[-1] * (1 - 1e-12)
    return int(reaches_share.int().argmax()) + 1


@dataclass(frozen=True)
class Layer:
    """One layer's low-rank update as it was saved.

    Attributes:
        path: Of the module in the base.
        keys: Names of A and B in the file.
        A: [r, I].
        B: [O, r].
        scale: Factor before B·A.
    """

    path: str
    keys: tuple[str, str]
    A: Tensor
    B: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        return int(self.A.shape[0])

    @cached_property
    def svd(self) -> Svd:
        """Of B·A, without the scale."""
        return svd_of_product(self.B, self.A)

    @property
    def values(self) -> Tensor:
        """Singular values [k] of the update, scale and all."""
        return self.svd.values * abs(self.scale)

    def facts(self) -> dict[str, Any]:
        """What `lighten adapter info` shows of the layer."""
        values = self.values
        return {
            "path": self.path,
            "rank": self.rank,
            "outputs": int(self.B.shape[0]),
            "inputs": int(self.A.shape[1]),
            "scale": self.scale,
            "norm": float(values.square().sum().sqrt()),
            "effective_rank": effective_rank(values),
            "rank_90": rank_for_energy(values, 0.90),
            "rank_99": rank_for_energy(values, 0.99),
            "singular_values": values.tolist(),
        }


@dataclass(frozen=True)
class SavedAdapter:
    """A LoRA adapter in PEFT's format, read layer by layer.

    Attributes:
        folder: Where it was read.
        config: Its `adapter_config.json`.
        spec: The same as lighten's own layers take it.
        layers: Its low-rank updates.
        other_tensors: Further tensors by key: what `modules_to_save` trained whole.
        file_bytes: Of its weights.
    """

    folder: Path
    config: dict[str, Any]
    spec: AdapterSpec
    layers: tuple[Layer, ...]
    other_tensors: dict[str, Tensor]
    file_bytes: int

    @property
    def largest_rank(self) -> int:
        """Of all its layers."""
        return max(layer.rank for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Trained numbers, those of whole modules among them."""
        factors = sum(layer.A.numel() + layer.B.numel() for layer in self.layers)
        return factors + sum(value.numel() for value in self.other_tensors.values())

    def info(self) -> dict[str, Any]:
        """What `lighten adapter info` shows."""
        layers = [layer.facts() for layer in self.layers]
        return {
            "folder": str(self.folder),
            "base_model": self.config.get("base_model_name_or_path"),
            "r": self.spec.r,
            "lora_alpha": self.spec.alpha,
            "use_rslora": self.spec.use_rslora,
            "target_modules": self.config.get("target_modules")
            or [layer.path for layer in self.layers],
            "layers_adapted": len(self.layers),
            "modules_to_save": list(self.spec.modules_to_save),
            "parameters": self.parameters,
            "file_bytes": self.file_bytes,
            "largest_rank": self.largest_rank,
            "effective_rank_mean": sum(layer["effective_rank"] for layer in layers) / len(layers),
            "rank_90_max": max(layer["rank_90"] for layer in layers),
            "rank_99_max": max(layer["rank_99"] for layer in layers),
            "layers": layers,
        }


def read(folder: Path) -> SavedAdapter:
    """Read a LoRA adapter, ours or PEFT's.

    Raises:
        UserError: The folder holds none, or a kind whose update is not scale·B·A alone.
    """
    config = read_config(folder)
    if extra := more_than_low_rank(config):
        raise UserError(
            f"{folder / CONFIG}: {with_article(extra)} is more than scale·B·A, which singular "
            "values do not tell; only plain LoRA adapters can be taken apart"
        )
    weights = read_weights(folder)
    spec = spec_from_peft(folder.name, config, folder, weights)
    layers, other_tensors = _split_tensors(weights, spec, folder)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return SavedAdapter(folder, config, spec, layers, other_tensors, size)


def _split_tensors(
    weights: Mapping[str, Tensor], spec: AdapterSpec, folder: Path
) -> tuple[tuple[Layer, ...], dict[str, Tensor]]:
    """The low-rank updates in the order of the file, and every other tensor."""
    keys: dict[str, dict[str, str]] = {}
    other_tensors: dict[str, Tensor] = {}
    for key, value in weights.items():
        if match := FACTOR.match(key):
            keys.setdefault(match["path"], {})[match["factor"]] = key
        else:
            other_tensors[key] = value
    layers = []
    for path, factors in keys.items():
        if set(factors) != {"A", "B"}:
            raise UserError(f"{folder}: {path} has only one of lora_A and lora_B; it is not whole")
        A, B = weights[factors["A"]], weights[factors["B"]]
        if A.dim() != 2 or B.dim() != 2:
            raise UserError(f"{folder}: {path} is a convolution's; only linear layers can be cut")
        if not all(bool(factor.isfinite().all()) for factor in (A, B)):
            raise UserError(f"{folder}: {path} holds values that are not finite")
        if A.shape[0] != B.shape[1] or A.shape[0] != spec.rank_at(path):
            raise UserError(
                f"{folder}: {path} has factors {tuple(B.shape)} and {tuple(A.shape)}, but "
                f"{CONFIG} says rank {spec.rank_at(path)}; the two do not belong together"
            )
        layers.append(Layer(path, (factors["A"], factors["B"]), A, B, spec.scale_at(path)))
    if not layers:
        raise UserError(f"{folder}: there is no lora_A among its weights")
    return tuple(layers), other_tensors
