"""What one adapter is: its name, rank, scale, targets and seed, as plain values."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lighten.errors import UserError

# Initial weights that the cohort's own layers know; PEFT makes the others.
OWN_INITS = (True, False, "gaussian", "orthogonal")


@dataclass(frozen=True)
class AdapterSpec:
    """One low-rank adapter of a cohort. The names are those of `peft.LoraConfig`.

    Attributes:
        name: Folder name of the adapter inside a run.
        r: Rank of the update.
        alpha: Numerator of the scale, `lora_alpha` in PEFT.
        dropout: Probability of dropping an input feature before `A`.
        target_modules: `"all-linear"`, `"attention"` or `"mlp"` for the linear layers of those
            blocks, a regular expression matched against whole module paths, or module names
            matched at the end of the path.
        use_rslora: Scale by alpha / sqrt(r) (arXiv 2312.03732) in place of alpha / r.
        init_lora_weights: True for PEFT's default (A Kaiming-uniform, B zero), "gaussian" for
            A normal with deviation 1/r and B zero, "orthogonal" for factors whose product is
            zero though none of them is, False for both random (for tests); "pissa",
            "pissa_niter_N" and "olora" are made by PEFT from the base's own weight.
        modules_to_save: Modules trained as whole copies beside the low-rank layers.
        rank_pattern: Rank by module-name pattern where it differs from `r`.
        alpha_pattern: Alpha by module-name pattern where it differs from `alpha`.
        seed: Seed of the initial weights and of the dropout.
        use_dora: Learn a magnitude per output feature beside the update (arXiv 2402.09353).
        peft: Settings of another PEFT method, `peft_type` among them; the fields above, but for
            name and seed, mean nothing then.
    """

    name: str = "default"
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    modules_to_save: tuple[str, ...] = ()
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    seed: int = 42
    use_dora: bool = False
    peft: dict[str, Any] | None = None

    @property
    def needs_peft(self) -> bool:
        """Whether PEFT's own modules train it, one adapter at a time."""
        ours = self.init_lora_weights in OWN_INITS
        return self.use_dora or self.peft is not None or not ours

    def rank_at(self, path: str) -> int:
        """Rank at the module path, `rank_pattern` honoured."""
        return self.rank_pattern.get(_pattern_key(self.rank_pattern, path), self.r)

    def require_rank(self, path: str, rank: int, where: str | os.PathLike[str]) -> None:
        """Refuse factors of another rank than the settings say: their scale would be wrong.

        Raises:
            UserError: Names the layer and both ranks.
        """
        if rank != self.rank_at(path):
            raise UserError(
                f"{where}: the factors of {path} have rank {rank} and adapter_config.json says "
                f"{self.rank_at(path)}; save the adapter again"
            )

    def scale_at(self, path: str) -> float:
        """Factor before `B @ A` at the module path."""
        alpha = self.alpha_pattern.get(_pattern_key(self.alpha_pattern, path), self.alpha)
        rank = self.rank_at(path)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _pattern_key(patterns: Iterable[str], path: str) -> str:
    """The first pattern that matches the end of the path, as PEFT's `get_pattern_key` does."""
    for pattern in patterns:
        if re.match(rf"(.*\.)?({pattern})$", path):
            return pattern
    return path
