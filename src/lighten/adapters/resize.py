"""An adapter at a lower rank: the best approximation of each layer's update.

Of all matrices of rank k, the first k singular triplets of a matrix are nearest to it, in the
Frobenius and in the spectral norm (Eckart and Young, The approximation of one matrix by another of
lower rank, Psychometrika, 1936). The scale before B·A stays what it was: alpha follows the rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from lighten.adapters.spec import AdapterSpec
from lighten.adapters.spectrum import Layer, SavedAdapter, svd_of_product
from lighten.errors import UserError
from lighten.peft_config import CONFIG, WEIGHTS

CARD = "README.md"
# What belongs to an adapter beside its weights: card, licence, tokenizer, template, generation.
# A trainer's checkpoint holds its optimizer and state too, larger than all else and pickled.
BESIDE = (
    CARD, "LICENSE*", "NOTICE*", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "spiece.model", "sentencepiece*.model", "chat_template.*",
    "generation_config.json", "processor_config.json", "preprocessor_config.json",
)  # fmt: skip
# In the header of the weights' file: whoever trains or saves something else there replaces it.
WRITTEN_BY = {"written_by": "lighten adapter resize"}


@dataclass(frozen=True)
class Cut:
    """What a lower rank left of one layer's update.

    Attributes:
        path: Of the module in the base.
        before: Rank.
        after: Rank.
        energy: Squared Frobenius norm of the update.
        lost: Squared Frobenius norm of what is gone, rounding of the new factors among it.
    """

    path: str
    before: int
    after: int
    energy: float
    lost: float

    @property
    def error(self) -> float:
        """Frobenius norm of what is gone over that of the update."""
        return math.sqrt(self.lost / self.energy) if self.energy else 0.0


@dataclass(frozen=True)
class Resized:
    """An adapter at a lower rank.

    Attributes:
        config: Its `adapter_config.json`.
        weights: Its tensors by key in PEFT's format.
        cuts: One entry per layer.
        left_behind: Files of the folder that belong to no adapter and are not copied.
    """

    config: dict[str, Any] = field(repr=False)
    weights: dict[str, Tensor] = field(repr=False)
    cuts: tuple[Cut, ...] = field(repr=False)
    left_behind: tuple[str, ...] = ()

    @property
    def energy_kept(self) -> float:
        """Share of the squared norm of all updates together; 1 of an adapter that does nothing."""
        energy = sum(cut.energy for cut in self.cuts)
        return 1.0 - sum(cut.lost for cut in self.cuts) / energy if energy else 1.0

    @property
    def error(self) -> float:
        """Norm of what is gone over that of all updates together."""
        energy = sum(cut.energy for cut in self.cuts)
        return math.sqrt(sum(cut.lost for cut in self.cuts) / energy) if energy else 0.0

    @property
    def largest_rank(self) -> int:
        """Of all its layers."""
        return max(cut.after for cut in self.cuts)

    @property
    def parameters(self) -> int:
        """Trained numbers that are left."""
        return sum(value.numel() for value in self.weights.values())

    def facts(self) -> dict[str, Any]:
        """What `lighten adapter resize` says."""
        worst = max(self.cuts, key=lambda cut: cut.error)
        return {
            "r": self.config["r"],
            "largest_rank": self.largest_rank,
            "left_behind": list(self.left_behind),
            "lora_alpha": self.config["lora_alpha"],
            "parameters": self.parameters,
            "layers_cut": sum(cut.after < cut.before for cut in self.cuts),
            "energy_kept": self.energy_kept,
            "error": self.error,
            "worst_layer": {"path": worst.path, "error": worst.error},
        }


def at_rank(adapter: SavedAdapter, rank: int) -> Resized:
    """The adapter with no layer over `rank`; layers that are not keep their factors bitwise.

    Args:
        adapter: Of `spectrum.read`.
        rank: The highest that a layer may have.

    Raises:
        UserError: The rank is below 1.
    """
    if rank < 1:
        raise UserError(f"--rank {rank}: an adapter has a rank of 1 at least")
    weights, cuts = dict(adapter.other_tensors), []
    for layer in adapter.layers:
        B, A = (layer.B, layer.A) if layer.rank <= rank else factors(layer, rank)
        weights[layer.keys[0]], weights[layer.keys[1]] = A.contiguous(), B.contiguous()
        energy = float(layer.values.square().sum())
        lost = 0.0 if A is layer.A else layer.scale**2 * distance(layer.B, layer.A, B, A) ** 2
        cuts.append(Cut(layer.path, layer.rank, int(A.shape[0]), energy, lost))
    config = _config(adapter, rank, {cut.path: cut.after for cut in cuts})
    return Resized(config, weights, tuple(cuts), tuple(left_behind(adapter)))


def factors(layer: Layer, rank: int) -> tuple[Tensor, Tensor]:
    """B [O, rank] and A [rank, I], nearest to the layer's own B·A, in its own format.

    The root of each singular value goes to either side, so that both are of a size and neither
    loses digits to a narrow format. A layer with fewer outputs or inputs than `rank` is filled up
    with zeros.
    """
    svd = layer.svd
    root = svd.values[:rank].sqrt()
    B = svd.U.new_zeros(svd.U.shape[0], rank)
    A = svd.Vh.new_zeros(rank, svd.Vh.shape[1])
    B[:, : len(root)], A[: len(root)] = svd.U[:, :rank] * root, root[:, None] * svd.Vh[:rank]
    return B.to(layer.B.dtype), A.to(layer.A.dtype)


def distance(B: Tensor, A: Tensor, other_B: Tensor, other_A: Tensor) -> float:
    """Frobenius norm of B·A - B'·A', by the same small core; the ranks may differ."""
    both_B = torch.cat([B.double(), -other_B.double()], dim=1)
    both_A = torch.cat([A.double(), other_A.double()])
    return float(svd_of_product(both_B, both_A).values.square().sum().sqrt())


def contents(adapter: SavedAdapter, resized: Resized) -> dict[str, bytes]:
    """The new adapter's files as bytes by name: what belongs to the old one comes along.

    Its card says what has been done.
    """
    files = {
        path.name: path.read_bytes()
        for path in sorted(adapter.folder.iterdir())
        if path.is_file() and _belongs(path.name)
    }
    facts = resized.facts()
    sentence = (
        f"Resized by lighten from rank {adapter.largest_rank} to {resized.largest_rank}: each "
        "layer's best "
        f"approximation, {facts['energy_kept']:.2%} of the update's energy kept.\n"
    )
    card = files.get(CARD, f"# {adapter.folder.name}\n".encode())
    files[CARD] = card.rstrip() + b"\n\n" + sentence.encode()
    files[CONFIG] = (json.dumps(resized.config, indent=2, sort_keys=True) + "\n").encode()
    files[WEIGHTS] = to_bytes(resized.weights, metadata={"format": "pt", **WRITTEN_BY})
    return files


def require_free(folder: Path) -> None:
    """A resized adapter may go into this folder: it is not there, empty, or holds one and no more.

    Raises:
        UserError: Anything else is in it, which would be lost.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"--output_dir {folder} is a link or a file; choose another name")
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if not names:
        return
    foreign = [name for name in names if name not in (CONFIG, WEIGHTS) and not _belongs(name)]
    if foreign or not _was_written_here(folder / WEIGHTS):
        examples = ", ".join((foreign or names)[:3])
        raise UserError(
            f"--output_dir {folder} holds what adapter resize did not write ({examples}); "
            "nothing was changed, choose another folder"
        )


def _was_written_here(weights: Path) -> bool:
    try:
        with safe_open(weights, "pt") as file:
            return WRITTEN_BY.items() <= (file.metadata() or {}).items()
    except (OSError, SafetensorError):
        return False


def _belongs(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in BESIDE)


def left_behind(adapter: SavedAdapter) -> list[str]:
    """Names of the folder's files that belong to no adapter, and so are not copied."""
    return [
        path.name
        for path in sorted(adapter.folder.iterdir())
        if path.is_file()
        and path.name not in (CONFIG, WEIGHTS)
        and not _belongs(path.name)
        and not path.name.startswith("adapter_model")
    ]


def _config(adapter: SavedAdapter, rank: int, ranks: Mapping[str, int]) -> dict[str, Any]:
    """The configuration under which every layer has its new rank and its old scale."""
    spec = adapter.spec
    r = min(spec.r, rank)
    alpha = _alpha(spec.alpha / (math.sqrt(spec.r) if spec.use_rslora else spec.r), r, spec)
    rank_pattern, alpha_pattern = {}, {}
    for layer in adapter.layers:
        layer_rank = ranks[layer.path]
        # Anchored, for a pattern matches the end of a path.
        if layer_rank != r:
            rank_pattern[f"^{layer.path}"] = layer_rank
        if (layer_alpha := _alpha(layer.scale, layer_rank, spec)) != alpha:
            alpha_pattern[f"^{layer.path}"] = layer_alpha
    return {
        **adapter.config, "r": r, "lora_alpha": alpha,
        "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern,
    }  # fmt: skip


def _alpha(scale: float, rank: int, spec: AdapterSpec) -> float | int:
    """The alpha that gives this scale at this rank; whole where it can be, as other tools write."""
    alpha = scale * (math.sqrt(rank) if spec.use_rslora else rank)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
