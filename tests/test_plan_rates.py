"""How long operations take here: means of samples, of which more are taken where they differ."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lighten.cpu.kernels import attention, formats
from lighten.engine import fused_loss
from lighten.planning import rates
from lighten.planning.operation_cost import Shaped, Work, work_of
from lighten.planning.rates import Measured, Rate
from tests import quick_rates

ATEN, OWN = torch.ops.aten, torch.ops.lighten
assert fused_loss is not None  # its operation is known once it is imported
CALL_S = 1e-6


def sum_of(numbers: int) -> Work:
    flat = Shaped((numbers,), (1,), torch.float32)
    return Work("aten::add", 0, 12 * numbers, torch.float32, ATEN.add.Tensor, (flat, flat), {})


class Clock:
    """A machine on which every operation takes what it is told to."""

    def __init__(self) -> None:
        self.seconds: Callable[[], float] = lambda: 1e-4
        self.samples = 0

    def timed(self, operation: Work) -> float:
        del operation
        self.samples += 1
        return self.seconds()


@pytest.fixture(autouse=True)
def as_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in quick_rates.SHIPPED.items():
        monkeypatch.setattr(rates, name, seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake_clock = Clock()
    monkeypatch.setattr(rates, "timed", fake_clock.timed)
    monkeypatch.setattr(rates, "interpreted", lambda: CALL_S)
    return fake_clock


def step(measured: Measured) -> float:
    return measured.seconds([sum_of(1000)]) - rates.CALLS_PER_OPERATION * CALL_S


def test_what_is_known_well_is_not_timed_again(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    assert step(Measured(path)) == pytest.approx(1e-4)
    samples = clock.samples
    assert 1 < samples < rates.MOST_SAMPLES
    clock.seconds = lambda: 5e-4
    assert step(Measured(path)) == pytest.approx(1e-4)
    assert clock.samples == samples


def test_where_samples_differ_more_are_taken_and_their_mean_counts(clock: Clock) -> None:
    step(Measured())
    quiet = clock.samples
    times = itertools.cycle([1e-4, 3e-4])
    clock.seconds = lambda: next(times)
    assert step(Measured()) == pytest.approx(2e-4, rel=2 * rates.SURE)
    assert clock.samples > 2 * quiet


def test_a_plan_has_no_more_patience_than_it_says(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "PATIENCE_S", 0.0)
    times = itertools.cycle([1e-4, 9e-4])
    clock.seconds = lambda: next(times)
    measured = Measured()
    measured.seconds([sum_of(1000), sum_of(10**6)])
    assert clock.samples == 2


def test_what_was_never_timed_has_a_limit_and_the_rest_takes_the_rate_of_what_is_like_it(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A format that is only emulated may need minutes; nobody waits that long for a plan."""
    monkeypatch.setattr(rates, "PATIENCE_S", -1.0)
    now = [0.0]
    monkeypatch.setattr(rates.time, "perf_counter", lambda: now[0])

    def slow() -> float:
        now[0] += 4.0
        return 1e-3

    clock.seconds = slow
    sizes = [1000 * 4**i for i in range(8)]
    seconds = Measured().seconds([sum_of(n) for n in sizes])
    assert clock.samples == 2  # after 8 s there are no more first ones
    largest, next_one = 12 * sizes[-1], 12 * sizes[-2]
    interpreter = len(sizes) * rates.CALLS_PER_OPERATION * CALL_S
    untimed_bytes = sum(12 * n for n in sizes[:-2])
    assert seconds == pytest.approx(2e-3 + untimed_bytes * 1e-3 / next_one + interpreter)
    assert largest > next_one


def test_products_of_a_slow_format_are_timed_with_fewer_rows(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[Work] = []

    def at_a_gigaflop(operation: Work) -> float:
        timed.append(operation)
        return operation.flops / 1e9

    monkeypatch.setattr(rates, "timed", at_a_gigaflop)
    a, b = (Shaped((1024, 1024), (1024, 1), torch.bfloat16) for _ in range(2))
    product = Work("aten::mm", 2 * 1024**3, 6 * 2**20, torch.bfloat16, ATEN.mm.default, (a, b), {})
    seconds = Measured().seconds([product])
    assert seconds == pytest.approx(product.flops / 1e9, rel=0.01)
    assert all(operation.flops <= 3e8 for operation in timed)
    assert sum(operation.flops for operation in timed) / 1e9 < 2 + rates.PATIENCE_S


def test_what_is_old_is_timed_again_and_counts_less(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rates.json"
    step(Measured(path))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 2 * rates.OLD_S)
    clock.seconds = lambda: 2e-4
    assert step(Measured(path)) > 1.5e-4


def test_samples_on_purpose_are_one_of_each_kind(clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    Measured(path).sample([sum_of(1000), sum_of(1000), sum_of(10**6)])
    assert clock.samples == 2
    assert set(json.loads(path.read_text())["rates"]) == {
        "aten::add|float32|14|--", "aten::add|float32|24|--", "interpreter",
    }  # fmt: skip


def test_a_mean_and_its_error() -> None:
    rate = Rate()
    for sample in (1.0, 3.0, 2.0, 2.0):
        rate.add(sample)
    assert rate.mean == pytest.approx(2.0)
    assert rate.variance == pytest.approx(0.5)
    assert rate.error() == pytest.approx(((0.5 + 0.6**2 / 4) / 4) ** 0.5)


@pytest.mark.parametrize("text", [
    "", "{", "[]", '{"of": 1}', '{"of": null, "rates": {}}', '{"of": OWN, "rates": {"a": 1}}',
    '{"of": OWN, "rates": []}', '{"of": OWN, "rates": {"a": {"b": 1}}}',
])  # fmt: skip
def test_a_broken_file_of_rates_is_as_none(text: str, clock: Clock, tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(text.replace("OWN", json.dumps(Measured()._stamp)))
    assert step(Measured(path)) == pytest.approx(1e-4)
    assert json.loads(path.read_text())["rates"]


def test_real_operations_take_a_time_that_grows_with_their_size() -> None:
    small, large = (Measured().seconds([sum_of(n)]) for n in (10**3, 10**7))
    assert 0.0 < small < large


def work(func: Any, *args: Any, **kwargs: Any) -> Work:
    outs = func(*args, **kwargs)
    operation = work_of(func, args, kwargs, list(outs) if isinstance(outs, tuple) else [outs])
    assert operation is not None
    return operation


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def heads(tokens: int, count: int = 4) -> torch.Tensor:
    return meta(1, tokens, count, 32).transpose(1, 2)


def attended(tokens: int, starts: list[int], backward: bool) -> Work:
    query, key = heads(tokens), heads(tokens, 2)
    out, sums = attention.outputs(query)
    if backward:
        return work(OWN.attention_backward.default, query, key, key, out, sums, out, 0.1, starts)
    return work(OWN.attention.default, query, key, key, 0.1, starts)


def adam(shapes: list[tuple[int, ...]]) -> Work:
    lists = [[meta(*shape, dtype=torch.float32) for shape in shapes] for _ in range(4)]
    steps = [meta(dtype=torch.float32) for _ in shapes]
    options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8,
               "amsgrad": False, "maximize": False}  # fmt: skip
    args = (*lists, [], steps)
    operation = work_of(ATEN._fused_adamw_.default, args, options, [])
    assert operation is not None
    return operation


LARGE = {
    "a product": lambda: work(ATEN.mm.default, meta(512, 256), meta(256, 1024)),
    "into memory that is there": lambda: work(
        ATEN.mm.out, meta(512, 256), meta(1024, 256).t(), out=meta(512, 1024)),
    "with a sum": lambda: work(
        ATEN.addmm_.default, meta(512, 1024), meta(512, 256), meta(256, 1024)),
    "a product of oneDNN's": lambda: work(
        torch.ops.mkldnn._linear_pointwise.default, meta(512, 256), meta(1024, 256),
        meta(1024), "none", [], ""),
    "attention": lambda: attended(1024, [], backward=False),
    "attention of packed rows": lambda: attended(1024, [0, 1000, 1024], backward=False),
    "attention's gradients": lambda: attended(1024, [], backward=True),
    "a sum": lambda: work(ATEN.add.Tensor, meta(1, 2048, 512), meta(1, 2048, 512)),
    "an optimiser's step": lambda: adam([(3, 64), (2048, 128), (64,)]),
    "one of a large weight": lambda: adam([(8192, 128), (64,)]),
    "a loss": lambda: work(
        OWN.cross_entropy_.default, meta(512, 4096), meta(512, dtype=torch.int64), 1.0, 0.0),
}  # fmt: skip


def runs_here(operation: Work) -> bool:
    """Whether this processor has it in bfloat16: our kernels and oneDNN want more than AVX2."""
    library = operation.name.partition("::")[0]
    if library == "mkldnn":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return library != "lighten" or formats.available(torch.bfloat16)


@pytest.mark.parametrize("name", LARGE)
def test_what_is_large_is_timed_with_fewer_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "MOST_FLOPS", 2e7)
    monkeypatch.setattr(rates, "MOST_BYTES", 2**20)
    operation = LARGE[name]()
    smaller = rates._smaller(operation)
    assert rates.key_of(operation).startswith("lighten") is rates.key_of(smaller).startswith(
        "lighten"
    )
    amount, most = (smaller.flops, 2e7) if operation.flops else (smaller.bytes, 2**20)
    assert 0.1 * most < amount <= most
    if runs_here(operation):
        assert rates.timed(smaller) > 0.0


def test_packed_rows_become_one_and_are_counted_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "MOST_FLOPS", 1e6)
    operation = attended(1024, list(range(0, 1025, 128)), backward=False)
    smaller = rates._smaller(operation)
    tokens = smaller.operands[0].shape[2]
    assert smaller.flops == 2 * 2 * 4 * 32 * tokens * (tokens + 1) // 2
