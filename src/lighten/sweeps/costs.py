"""What an adapter costs: in training, to ship, and to serve. Pure formulas; bytes and FLOPs.

They count what grows with parameters: matrix products of weights and activations. Attention over
the context, norms and sampling are left out; they are the same for every arm.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

# Bytes per parameter that an optimiser keeps; 8-bit states have a scale per 256 values beside.
OPTIMIZER_BYTES = {
    "adamw_torch": 8.0, "adamw_torch_fused": 8.0, "paged_adamw_32bit": 8.0, "adamw_8bit": 2.0,
    "adamw_bnb_8bit": 2.0, "paged_adamw_8bit": 2.0, "lion_32bit": 4.0, "lion_8bit": 1.0,
    "paged_lion_32bit": 4.0, "paged_lion_8bit": 1.0, "sgd": 0.0,
}  # fmt: skip


def state_bytes(parameters: int, optim: str) -> int | None:
    """Bytes of weights, gradients (float32) and optimiser state of what learns.

    None for adafactor, whose state depends on the shapes.
    """
    optimizer_bytes = OPTIMIZER_BYTES.get(optim)
    return None if optimizer_bytes is None else round(parameters * (8 + optimizer_bytes))


def training_flops(base_parameters: int, adapter_parameters: int) -> float:
    """FLOPs of one token in training an adapter on a frozen base.

    The base's weights take part in the forward pass and in the gradient of its inputs (2 + 2 per
    parameter), the adapter's in these and in the gradient of its weights (2 + 2 + 2).
    """
    return 4.0 * base_parameters + 6.0 * adapter_parameters


def serving_flops(parameters: int) -> float:
    """FLOPs of one token through so many parameters: a multiplication and an addition each."""
    return 2.0 * parameters


def shares(weights: Sequence[float]) -> list[float]:
    """Each weight as a share of their sum."""
    total = sum(weights)
    return [weight / total if total else 0.0 for weight in weights]


def low_rank_parameters(adapter: Path) -> int:
    """Parameters that an adapter folder adds beside the base's own layers.

    Modules saved as whole copies stand in the place of the base's and add none.
    """
    count = 0
    for path in sorted(adapter.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118  # it is no mapping
                if "lora_" in key:
                    size = 1
                    for length in file.get_slice(key).get_shape():
                        size *= length
                    count += size
    return count
