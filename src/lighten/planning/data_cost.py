"""What a run's data take: main memory while they are encoded and afterwards, and disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lighten.data import EncodedRows
from lighten.data.storage import IN_MEMORY_BYTES
from lighten.machine import forks
from lighten.planning.result import DataCost, MemoryPart, Plan
from lighten.training.rows import Rows

MIB = 2**20
ROWS = "encoded rows"
# Encoding holds no more than a few hundred examples at a time, and of the arrays that it writes a
# piece. 20,000 chat rows took 19 MiB, with 26 MiB in each of two processes that were forked, for
# what these write to and would otherwise share (benchmarks/data_reading.py).
ENCODING_BYTES, PROCESS_BYTES = 30 * MIB, 30 * MIB
# Data of fewer tokens are encoded by the process itself.
FORKED_TOKENS = 1_000_000
# Ids, marks, and what is kept of a row.
TOKEN_BYTES, ROW_BYTES = 4 + 1 / 8, 30


def cost_of(rows: Rows) -> DataCost:
    """What the data of a run take.

    Args:
        rows: Encoded, all of them or a sample.
    """
    tokens, count, held = 0, 0, 0
    for part in (rows.train, rows.held_out):
        if part is None:
            continue
        tokens += part.counts.tokens
        count += len(part.rows)
        held += _bytes(part.rows)
    if rows.of_rows is not None and rows.train.rows:
        share = rows.of_rows / len(rows.train.rows)
        tokens, count, held = (round(share * number) for number in (tokens, count, held))
    encoding = 0
    if not rows.cached:
        forked = forks.possible() and tokens > FORKED_TOKENS
        processes = forks.processors() if forked else 1
        encoding = ENCODING_BYTES + PROCESS_BYTES * (processes if processes > 1 else 0)
        encoding += min(held, IN_MEMORY_BYTES)
    return DataCost(count, tokens, encoding, held)


def _bytes(rows: Sequence[Any]) -> int:
    if isinstance(rows, EncodedRows):
        return sum(array.nbytes for array in rows.arrays().values())
    tokens = sum(len(row.input_ids) for row in rows)
    return round(TOKEN_BYTES * tokens) + ROW_BYTES * len(rows)


def with_data(plan: Plan, cost: DataCost, *, on_processor: bool) -> Plan:
    """The plan with what the data take.

    Args:
        plan: Of the training alone.
        cost: Of its data.
        on_processor: The plan's device is the processor, whose memory the rows lie in.
    """
    # They are encoded before a base is loaded, so a training's own peak, which runs measure from
    # there on, is without it; once encoded, they stay.
    host = max(plan.host_bytes + cost.resident_bytes, cost.encoding_bytes)
    disk = plan.disk_bytes + cost.resident_bytes
    plan = replace(plan, data=cost, host_bytes=host, disk_bytes=disk)
    if not on_processor:
        return plan
    memory, data_bytes = plan.memory, cost.resident_bytes
    parts = tuple(
        MemoryPart(part.name, part.bytes + data_bytes * (part.name == ROWS))
        for part in memory.parts
    )
    memory = replace(
        memory, parts=parts, low=memory.low + data_bytes, expected=memory.expected + data_bytes,
        high=memory.high + data_bytes,
    )  # fmt: skip
    return replace(plan, memory=memory)
