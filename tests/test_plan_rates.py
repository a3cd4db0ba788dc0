"""How long operations take here: what is kept of a good moment, and what of a bad one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lighten.plan import rates
from lighten.plan.rates import Measured
from lighten.plan.work import Shaped, Work

ADD = torch.ops.aten.add.Tensor


def sum_of(numbers: int) -> Work:
    flat = Shaped((numbers,), (1,), torch.float32)
    return Work("aten::add", 0, 12 * numbers, torch.float32, ADD, (flat, flat), {})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How many times slower than at its best the machine is; the last value stays."""
    slower = [1.0]

    def timed(own: Work) -> float:
        now = slower.pop(0) if len(slower) > 1 else slower[0]
        return now * (2e-3 if own.flops else 1e-4)

    monkeypatch.setattr(rates, "timed", timed)
    monkeypatch.setattr(rates, "PATIENCE_S", 0.0)
    monkeypatch.setattr(rates, "PACE_SIDES", {torch.float32: 384})
    return slower


def step(own: Measured) -> float:
    return own.seconds([sum_of(1000)]) - rates.INTERPRETER_S


def test_rates_are_timed_once_and_kept(clock: list[float], tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    assert step(Measured(path)) == pytest.approx(1e-4)
    clock[:] = [1.1]
    again = Measured(path)
    assert step(again) == pytest.approx(1e-4)
    assert again.best == pytest.approx(2e-3)


def test_a_rate_of_a_bad_moment_is_timed_again_by_the_next_plan(
    clock: list[float], tmp_path: Path
) -> None:
    path = tmp_path / "rates.json"
    # Good when the machine is first looked at, bad while the operation is timed and after it.
    clock[:] = [1.0, 2.0, 2.0]
    assert step(Measured(path)) == pytest.approx(2e-4), "no better time was seen"
    assert len(json.loads(path.read_text())["doubted"]) == 1
    clock[:] = [3.0]
    assert step(Measured(path)) == pytest.approx(2e-4), "the better of two bad moments"
    clock[:] = [1.0]
    assert step(Measured(path)) == pytest.approx(1e-4)
    assert json.loads(path.read_text())["doubted"] == []


def test_a_machine_faster_than_it_was_known_to_be_doubts_all_rates(
    clock: list[float], tmp_path: Path
) -> None:
    path = tmp_path / "rates.json"
    clock[:] = [2.0]
    assert step(Measured(path)) == pytest.approx(2e-4), "nothing better is known yet"
    clock[:] = [1.0]
    assert step(Measured(path)) == pytest.approx(1e-4)


def test_a_plan_waits_for_a_better_moment(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "PATIENCE_S", 60.0)
    clock[:] = [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0]
    own = Measured()
    assert step(own) == pytest.approx(1e-4)
    assert not own._doubted


def test_a_moment_that_slows_one_format_alone_is_not_good(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A neighbour that multiplies bfloat16 leaves float32 as it was."""
    slow = [1.0, 1.0, 3.0]  # before the first operation, after it, and from then on

    def timed(own: Work) -> float:
        if own.dtype != torch.bfloat16:
            return 1e-3 if own.flops else 1e-4
        return 1e-3 * (slow.pop(0) if len(slow) > 1 else slow[0])

    monkeypatch.setattr(rates, "timed", timed)
    monkeypatch.setattr(rates, "PATIENCE_S", 0.0)
    monkeypatch.setattr(rates.kernels, "processor_flags", lambda: {rates.kernels.NEEDED})
    path = tmp_path / "rates.json"
    own = Measured(path)
    own.seconds([sum_of(1000), sum_of(10**6)])
    assert own.best == pytest.approx(2e-3)
    assert json.loads(path.read_text())["doubted"] == ["aten::add|float32|24"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"of": 1}', '{"of": null, "rates": {}}'])
def test_a_broken_file_of_rates_is_as_none(text: str, clock: list[float], tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(text)
    assert step(Measured(path)) == pytest.approx(1e-4)
    assert json.loads(path.read_text())["rates"]


def test_real_operations_take_a_time_that_grows_with_their_size() -> None:
    own = Measured()
    small, large = (own.seconds([sum_of(n)]) - rates.INTERPRETER_S for n in (10**3, 10**7))
    assert 0.0 < small < large
    assert rates.pace() > 0.0
