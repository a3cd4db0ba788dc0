"""Steps of training: their time, real tokens per second and peak memory, beside the plan's."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# What learns, by name: settings over those of the user.
WAYS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "last 2 layers": {"method": "full", "trainable_layers": "last_2"},
    "LoRA": {"method": "lora"},
    "QLoRA": {"method": "lora", "load_in_4bit": True},
}
# Settings that each way decides, so that a recipe's are not followed.
DECIDED = (
    "method", "trainable_layers", "load_in_4bit", "load_in_8bit", "gradient_checkpointing",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "torch_compile",
    "offload_params",
)  # fmt: skip


def run(
    recipe: Mapping[str, Any],
    *,
    kind: str,
    lengths: Sequence[int] | None,
    supervised: float,
    least: int,
    most: int,
    budget_s: float,
) -> Iterator[dict[str, Any]]:
    """The record of one way to train.

    Args:
        recipe: Completed.
        kind: `cpu` or `cuda`.
        lengths: Tokens of each row; None: all have `max_length`.
        supervised: Share of each row's tokens that are supervised.
        least: Steps that are timed, at least.
        most: At most.
        budget_s: Seconds for them.

    Raises:
        UserError: Nothing was trained.
    """
    from lighten.planning.probe import measure
    from lighten.recipe import Recipe

    with tempfile.TemporaryDirectory(prefix="lighten-bench-") as scratch:
        # Offloaded activations would go into the run's folder; nothing is resumed or watched here.
        scratched = {"output_dir": scratch, "torch_compile": False}
        measurement = measure(
            Recipe.model_validate({**recipe, **scratched}), kind, lengths, supervised,
            random=False, least=least, most=most, budget_s=budget_s,
        )  # fmt: skip
    memory = measurement["memory"]
    yield {
        "seconds": measurement["timing"],
        "tokens_per_s": measurement["tokens"] / measurement["seconds"],
        "tokens": measurement["tokens"], "rows": measurement["rows"],
        "longest": measurement["longest"], "parameters": measurement["parameters"],
        "peak_bytes": memory["peak_bytes"], "memory_by": memory["method"],
        "reserved_bytes": memory.get("reserved_bytes"),
    }  # fmt: skip
