"""The held-out loss during training: over all supervised tokens, with its standard error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from lighten.data import lengths_of
from lighten.data.batches import Item, TokenRow, collate, layout
from lighten.engine.forward_backward import measure, undropped
from lighten.engine.loss import Objective
from lighten.engine.validation_loss import ValidationLoss
from lighten.engine.workers import Workers
from lighten.parallel import ranks


def held_out(
    objective: Objective,
    rows: Sequence[TokenRow],
    adapter: str | None,
    *,
    max_rows: int,
    max_tokens: int | None = None,
    device: torch.device | str = "cpu",
    workers: Workers | None = None,
    progress: Callable[[int, int], None] | None = None,
    passes: Callable[[int], int] | None = None,
    spare: TokenRow | None = None,
) -> ValidationLoss:
    """Loss of one adapter (None: the base) on encoded rows; no logits are kept (trap 43).

    Args:
        objective: The loss, with the cohort it runs under.
        rows: Encoded rows; those without a supervised token are passed over.
        adapter: The adapter's name.
        max_rows: Rows per batch at most.
        max_tokens: Padded tokens per batch at most.
        device: Where the model is.
        workers: Take batches side by side; None: one after another.
        progress: Log how many rows are measured, and of how many, where they are not side by side.
        passes: How many are made where there are so many batches: other ranks may have more.
        spare: A row for those that count nothing.
    """
    lengths = lengths_of(rows)
    items = [Item(adapter, i, 0) for i, row in enumerate(rows) if any(row.supervised[1:])]
    nll, tokens = [0.0] * len(rows), [0] * len(rows)
    parts = layout(
        items, lengths, max_rows=max_rows, max_tokens=max_tokens, packed=objective.packs,
        workers=workers.count if workers else 1,
    )  # fmt: skip
    batches = [
        collate(part, rows, [adapter], packed=objective.packs, device=device) for part in parts
    ]
    if batches:
        objective.verify(batches[0], undropped(batches[0]))
    # Before the first of them: ranks that gather layers together say nothing else meanwhile.
    idle = passes(len(batches)) - len(batches) if passes is not None else 0

    if workers is None or not batches:
        losses, measured = [], 0
        for batch in batches:
            if progress is not None:
                progress(measured, len(items))
            losses.append(measure(batch, objective))
            measured += len(batch.items)
        if progress is not None:
            progress(len(items), len(items))
    else:
        losses = workers.measure(objective, batches)
    if idle:
        assert spare is not None
        spare_batch = collate([Item(adapter, 0, 0)], [spare], [adapter], packed=objective.packs,
                              device=device)  # fmt: skip
        for _ in range(idle):
            measure(spare_batch, objective)
    for batch, row_losses in zip(batches, losses, strict=True):
        for place, item in enumerate(batch.items):
            nll[item.row] = row_losses[place]
            tokens[item.row] = batch.supervised_in(place, place + 1)
    counted = [item.row for item in items]
    return ValidationLoss(tuple(nll[i] for i in counted), tuple(tokens[i] for i in counted))


def held_out_over(
    accelerator: Accelerator,
    objective: Objective,
    rows: Sequence[TokenRow],
    adapter: str | None,
    **options: Any,
) -> ValidationLoss:
    """`held_out` with every rank measuring its share; all get the same figures, bit for bit.

    What follows from them (the best state, an early stop) is so decided alike on every rank.

    Args:
        accelerator: The ranks.
        objective: The loss.
        rows: Encoded rows, the same on every rank.
        adapter: The adapter's name.
        options: More arguments of `held_out`.

    Raises:
        PeerLost: A rank has ended.
    """
    supervised = [row for row in rows if any(row.supervised[1:])]
    share = supervised[accelerator.process_index :: accelerator.num_processes]
    spare = min(supervised, key=lambda row: len(row.input_ids), default=None)
    part = held_out(objective, share, adapter, spare=spare, **options)
    shares = ranks.gather(accelerator, part)
    nll, tokens = [0.0] * len(supervised), [0] * len(supervised)
    for rank, result in enumerate(shares):
        nll[rank :: len(shares)], tokens[rank :: len(shares)] = result.nll, result.tokens
    return ValidationLoss(tuple(nll), tuple(tokens))
