"""PEFT in a plain, well-written training loop: the peer that needs nothing but PEFT itself.

Weights frozen in the base's format, adapters in float32 as PEFT keeps them, no autocast, no
attention mask (rows are right-padded and attention is causal), AdamW in one fused kernel, the loss
normalised over the whole step. Several adapters are trained one after another by `set_adapter`.

Dimensions: B rows of a micro-batch, T tokens of its longest row.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from benchmarks.engine import largest_move
from benchmarks.machine import synchronize
from benchmarks.steps import Row, Steps


def batch_of(rows: list[Row], device: str) -> tuple[Tensor, Tensor]:
    """Token ids and labels [B, T], right-padded."""
    longest = max(len(ids) for ids, _ in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full_like(tokens, -100)
    for place, (ids, mask) in enumerate(rows):
        row = torch.tensor(ids)
        tokens[place, : len(ids)] = row
        labels[place, : len(ids)] = row.masked_fill(~torch.tensor(mask), -100)
    return tokens.to(device), labels.to(device)


def train(
    model: PeftModel,
    lessons: Mapping[str, Steps],
    device: str,
    optimiser: Mapping[str, float],
    *,
    micro_rows: int | None = None,
    checkpointing: bool = False,
) -> dict[str, Any]:
    """Train the adapters one after another.

    Args:
        model: With an adapter of each lesson's name.
        lessons: Each adapter's steps.
        device: Where the model is.
        optimiser: transformers' names.
        micro_rows: Rows per micro-batch; None takes a step whole.
        checkpointing: Recompute layers in the backward pass.

    Returns:
        Losses, gradient norms, seconds per step and largest weight change by adapter.
    """
    model.config.use_cache = False
    if checkpointing:
        # transformers' newer name of the switch, where it has it; it works in train mode only.
        kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        enable = getattr(model, f"{kind}_checkpointing_enable")
        enable(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})
        model.train()
    results: dict[str, dict[str, Any]] = {
        key: {} for key in ("losses", "grad_norms", "moved", "step_seconds")
    }
    for name, steps in lessons.items():
        model.set_adapter(name)
        parameters = {key: value for key, value in model.named_parameters() if value.requires_grad}
        before = {key: value.detach().to("cpu", copy=True) for key, value in parameters.items()}
        adamw = torch.optim.AdamW(
            parameters.values(), lr=optimiser["learning_rate"],
            weight_decay=optimiser["weight_decay"],
            betas=(optimiser["adam_beta1"], optimiser["adam_beta2"]),
            eps=optimiser["adam_epsilon"], fused=True,
        )  # fmt: skip
        losses, norms, seconds = [], [], []
        for step in steps:
            synchronize(device)
            began = time.perf_counter()
            size = micro_rows or len(step)
            supervised = sum(sum(mask[1:]) for _, mask in step)
            loss = 0.0
            for start in range(0, len(step), size):
                ids, labels = batch_of(step[start : start + size], device)
                part_loss = model(input_ids=ids, labels=labels, num_items_in_batch=supervised).loss
                part_loss.backward()
                loss += float(part_loss.detach())
            norm = torch.nn.utils.clip_grad_norm_(
                list(parameters.values()), optimiser["max_grad_norm"]
            )
            adamw.step()
            adamw.zero_grad(set_to_none=True)
            synchronize(device)
            seconds.append(time.perf_counter() - began)
            losses.append(loss)
            norms.append(float(norm))
        results["losses"][name], results["grad_norms"][name] = losses, norms
        results["step_seconds"][name], results["moved"][name] = (
            seconds,
            largest_move(before, parameters),
        )
    return results
