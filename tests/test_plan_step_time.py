"""A step's seconds: every operation of it, and workers that wait for the fullest of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lighten.planning.build import config_of
from lighten.planning.rates import Datasheet
from lighten.planning.step_time import parts_of, time_of, workers_of
from lighten.planning.steps import Traced, follow_recipe
from tests.test_plan_trace import FLOAT32, Card, Cpu, folder_of, recipe_of

ROW = 32


def traced(folder: Path, rows: int, **values: Any) -> Traced:
    recipe = recipe_of(folder, tokens_per_microbatch=ROW, **values)
    return follow_recipe(recipe, config_of(recipe)[0], FLOAT32, "cpu", rows_tokens=(rows, ROW))


@pytest.mark.parametrize(
    ("workers", "rows", "waited"), [(1, 3, 3), (2, 3, 2), (2, 4, 2), (3, 2, 1)]
)
def test_a_step_waits_for_the_fullest_lane(
    workers: int, rows: int, waited: int, tmp_path: Path
) -> None:
    step = traced(folder_of(tmp_path), rows, workers=workers)
    assert workers_of(step) == min(workers, rows)
    parts = parts_of(step)
    assert sum(part.share for part in parts if not part.alone) == pytest.approx(rows)
    assert sum(part.times for part in parts if not part.alone) == pytest.approx(waited)
    (optimiser,) = (part for part in parts if part.alone)
    assert optimiser.share == optimiser.times == 1.0
    assert any("adam" in work.name for work in optimiser.work)


def test_adapters_one_after_another_wait_for_each_other(tmp_path: Path) -> None:
    """A group of micro-batches is shared out by itself: two of one each do not fill two workers."""
    step = traced(folder_of(tmp_path), 1, workers=2, lora_r=[4, 8])

    def waited() -> float:
        return sum(part.times for part in parts_of(step) if not part.alone)

    assert waited() == pytest.approx(1.0), "side by side"
    step.setup.one_adapter_at_a_time = True
    assert waited() == pytest.approx(2.0)


def test_seconds_of_a_device_are_those_of_its_datasheet(tmp_path: Path) -> None:
    step = traced(folder_of(tmp_path), 3)
    step_time = time_of(step, Card())
    assert step_time is not None
    sheet = Datasheet("card", Card.flops, Card.bandwidth)
    assert step_time.seconds == pytest.approx(
        sum(part.times * sheet.seconds(part.work) for part in parts_of(step))
    )
    products = sum(work.flops for part in parts_of(step) for work in part.work)
    assert 0 < products <= step_time.flops


def test_a_device_without_rates_has_no_seconds(tmp_path: Path) -> None:
    class Unknown(Cpu):
        kind = "cuda"

    assert time_of(traced(folder_of(tmp_path), 1), Unknown()) is None
