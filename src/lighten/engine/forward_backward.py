"""What a micro-batch goes through the model for: to learn from it, or to be measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from lighten.adapters.layers import Share
from lighten.data.batches import MicroBatch
from lighten.engine.loss import Objective


def learn(
    batch: MicroBatch,
    objective: Objective,
    per_token: Mapping[str, float],
    scales: Mapping[str, float],
    backward: Callable[[Tensor], None],
) -> dict[str, float]:
    """Forward and backward of a micro-batch; each adapter's summed token losses, in nats.

    Args:
        batch: The micro-batch.
        objective: The loss.
        per_token: What a supervised token's loss counts, by adapter.
        scales: Factor of the loss by adapter: float16's gradients would underflow without one.
        backward: Takes the scaled loss's gradients to wherever they are summed.
    """
    shares = shares_of(batch)
    weights = torch.empty(len(batch.labels), dtype=torch.float32, device=batch.labels.device)
    spans = {str(s.adapter): slice(batch.supervised_before[s.start],
                                   batch.supervised_before[s.stop]) for s in shares}  # fmt: skip
    # The common factor stays outside of the weights, which may be put into float16 (a head that
    # learns): a supervised token alone in its step times the factor is more than that can hold.
    common = max(scales[name] for name in spans)
    for name, span in spans.items():
        weights[span] = per_token[name] * (scales[name] / common)
    with objective.at(batch, shares):
        loss, nll = objective(batch, shares, weights)
        backward(loss if common == 1.0 else loss * common)
    return {name: _total(nll[span]) for name, span in spans.items()}


@torch.no_grad()
def measure(batch: MicroBatch, objective: Objective) -> list[float]:
    """The summed token losses of each row of a micro-batch, in nats, without dropout."""
    batch = batch if objective.packs else batch.padded()
    shares = undropped(batch)
    with objective.at(batch, shares):
        weights = torch.ones(len(batch.labels), device=batch.labels.device)
        _, nll = objective(batch, shares, weights)
    starts = batch.supervised_before
    return [_total(nll[start:stop]) for start, stop in pairwise(starts)]


def _total(losses: Tensor) -> float:
    """Their sum in float64, which Apple's GPUs do not have."""
    return float(losses.cpu().double().sum())


def shares_of(batch: MicroBatch) -> tuple[Share, ...]:
    """Runs of rows that belong to one adapter, with what dropout needs to know of them."""
    shares: list[Share] = []
    start = 0
    for stop in range(1, len(batch.items) + 1):
        ends = stop == len(batch.items) or batch.items[stop].adapter != batch.items[start].adapter
        if ends:
            keys = tuple(item.key for item in batch.items[start:stop])
            adapter = batch.items[start].adapter
            shares.append(Share(adapter, start, stop, keys))
            start = stop
    return tuple(shares)


def undropped(batch: MicroBatch) -> tuple[Share, ...]:
    """`shares_of` without dropout: measured, or compared with rows that are laid out otherwise."""
    return tuple(replace(share, dropout_keys=None) for share in shares_of(batch))
