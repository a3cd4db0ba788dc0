"""Workers that are processes: the bits of threads, nothing left behind, no error lost."""

from __future__ import annotations

import gc
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator
from torch import nn

import lighten
from lighten.adapters import AdapterSpec, Cohort
from lighten.engine import forked, memory_errors
from lighten.engine.adapter_optimizer import AdapterOptimizer
from lighten.engine.forked import Forked
from lighten.engine.loss import Objective
from lighten.engine.scaling import LossScaler
from lighten.engine.step import AdapterStep, train_step
from lighten.engine.workers import Threads, Workers
from lighten.machine import forks
from lighten.machine.hardware import PeakMemory
from tests.test_train_step import (
    UNEVEN,
    cohort_of,
    in_blocks,
    micro_batches,
    random_spec,
    settings,
)

pytestmark = pytest.mark.skipif(not forked.possible(), reason="this system does not fork")
Make = Callable[[Objective, list[list[nn.Parameter]]], Workers]


def processes(count: int) -> Make:
    return lambda objective, groups: Forked(count, count, objective, groups)


def threads(count: int) -> Make:
    return lambda objective, groups: Threads(count, count)


@contextmanager
def at_work(
    make: Make, cohort: Cohort
) -> Iterator[tuple[Workers, Objective, list[AdapterOptimizer]]]:
    members = [AdapterOptimizer(name, cohort.parameters(name), settings()) for name in cohort.names]
    objective = Objective(cohort.model, cohort, packs=True)
    workers = make(objective, [[p for m in members for p in m.parameters.values()]])
    try:
        yield workers, objective, members
    finally:
        workers.close()


def trained(make: Make, steps: int = 3) -> tuple[list[dict[str, AdapterStep]], dict[str, Any]]:
    """Reports of some steps of two adapters, and where their weights are after them."""
    specs = (random_spec("a"), AdapterSpec("b", r=8, dropout=0.2, init_lora_weights=False, seed=3))
    cohort = in_blocks(cohort_of(*specs, arch="llama"))
    scaler = LossScaler(enabled=False)
    with at_work(make, cohort) as (workers, objective, members):
        batches = micro_batches(UNEVEN, list(cohort.names), 1, packed=True)
        reports = [
            train_step(batches, members, objective, Accelerator(cpu=True), scaler, workers)
            for _ in range(steps)
        ]
    return reports, {
        f"{m.name} {key}": value.detach().clone()
        for m in members
        for key, value in m.parameters.items()
    }


@pytest.mark.parametrize("count", [2, 3])
def test_processes_give_the_bits_of_threads(count: int) -> None:
    """Over several steps: a child that kept old weights would give the first step's gradients."""
    expected, expected_weights = trained(threads(count))
    actual, weights = trained(processes(count))
    assert expected[0] != expected[-1]
    assert actual == expected
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[key], expected_weights[key]) for key in expected_weights)


def test_held_out_losses_come_back_in_the_order_of_their_batches() -> None:
    cohort = in_blocks(cohort_of(random_spec("a"), arch="llama"))
    batches = micro_batches(UNEVEN, ["a"], 2, packed=True)
    with at_work(threads(2), cohort) as (workers, objective, _):
        expected = workers.measure(objective, batches)
    with at_work(processes(3), cohort) as (workers, objective, _):
        assert workers.measure(objective, batches) == expected
        assert workers.measure(objective, []) == []
        workers.give_back()
    assert [len(losses) for losses in expected] == [len(batch.items) for batch in batches]


@pytest.mark.parametrize("frozen", [True, False])
def test_what_somebody_froze_stays_frozen_and_nothing_is_added_to_it(frozen: bool) -> None:
    """Whoever keeps the search for garbage away from their objects does so for these alone."""
    gc.unfreeze()
    if frozen:
        gc.freeze()
    theirs = gc.get_freeze_count()

    def stays() -> bool:
        return 0.9 * theirs <= gc.get_freeze_count() <= theirs  # a frozen object may be deleted

    cohort = in_blocks(cohort_of(random_spec("a"), arch="llama"))
    with at_work(processes(2), cohort):
        assert stays() if frozen else gc.get_freeze_count() > 0
    assert stays()
    for place, piece in enumerate(forks.in_order(lambda piece: piece, 3, 2, 30.0)):
        assert place == piece
        assert stays() if frozen else gc.get_freeze_count() > 0
    assert stays()
    gc.freeze()  # as it was


def test_an_error_of_a_child_is_raised_here_and_the_next_step_goes_well() -> None:
    cohort = in_blocks(cohort_of(random_spec("a"), arch="llama"))
    parent_pid, fails = os.getpid(), torch.zeros(1).share_memory_()

    def broken(*_: object) -> None:
        if fails[0] and os.getpid() != parent_pid:
            raise ValueError("in the middle of a layer")

    cohort.model.base_model.register_forward_pre_hook(broken)
    batches = micro_batches(UNEVEN, ["a"], 2, packed=True)
    with at_work(processes(2), cohort) as (workers, objective, members):
        parameters = list(members[0].parameters.values())
        fails[0] = 1
        with pytest.raises(ValueError, match="in the middle of a layer"):
            workers.learn(objective, batches, parameters, {"a": 1.0}, {"a": 1.0})
        fails[0] = 0
        assert len(workers.learn(objective, batches, parameters, {"a": 1.0}, {"a": 1.0})) == len(
            batches
        )


def test_an_error_that_cannot_travel_says_what_it_was() -> None:
    class Stubborn(Exception):
        def __init__(self, prefix: str, suffix: str) -> None:
            super().__init__(prefix + suffix)

    error = forked._portable(Stubborn("no ", "way"))
    assert isinstance(error, RuntimeError)
    assert str(error) == "Stubborn: no way"


def test_a_killed_child_is_memory_that_ran_out() -> None:
    cohort = in_blocks(cohort_of(random_spec("a"), arch="llama"))
    before = set(psutil.Process().children())
    with at_work(processes(2), cohort) as (workers, objective, members):
        (child,) = set(psutil.Process().children()) - before
        parameters = list(members[0].parameters.values())
        batches = micro_batches(UNEVEN, ["a"], 2, packed=True)
        child.send_signal(signal.SIGTERM)  # the parent alone answers to signals
        workers.learn(objective, batches, parameters, {"a": 1.0}, {"a": 1.0})
        child.kill()
        with pytest.raises(MemoryError, match="killed") as caught:
            workers.learn(objective, batches, parameters, {"a": 1.0}, {"a": 1.0})
        assert memory_errors.ran_out(caught.value)
    assert set(psutil.Process().children()) <= before


def run(folder: Path, base: Path, data: Path, **changes: Any) -> lighten.Run:
    return lighten.train(
        model_name_or_path=str(base), dataset=str(data), max_steps=4, dtype="float32",
        output_dir=str(folder), workers=2, lora_dropout=0.1, per_device_train_batch_size=4,
        progress=False, **changes,
    )  # fmt: skip


def test_a_run_whose_lane_is_killed_makes_the_step_again(
    tmp_path: Path, tiny_folder: Path, chat_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(psutil.Process().children())
    undisturbed = run(tmp_path / "whole", tiny_folder, chat_file)
    assert set(psutil.Process().children()) <= before
    original_learn = Forked.learn
    calls = []

    def deadly(self: Forked, *args: Any) -> Any:
        calls.append(len(self._children))
        if len(calls) == 2:
            os.kill(self._children[0]._pid, signal.SIGKILL)
        return original_learn(self, *args)

    monkeypatch.setattr(Forked, "learn", deadly)
    hurt = run(tmp_path / "hurt", tiny_folder, chat_file)
    assert calls == [1] * 5
    assert [retry["step"] for retry in hurt.info()["retries"]] == [2]
    losses = [line["loss"] for line in hurt.metrics() if line["kind"] == "train"]
    expected = [line["loss"] for line in undisturbed.metrics() if line["kind"] == "train"]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert set(psutil.Process().children()) <= before


def test_where_no_process_can_be_made_lanes_are_threads(
    tmp_path: Path, tiny_folder: Path, chat_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(tmp_path / "whole", tiny_folder, chat_file).metrics()

    def refused() -> int:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(os, "fork", refused)
    threaded = run(tmp_path / "threads", tiny_folder, chat_file).metrics()
    assert [line["loss"] for line in threaded] == [line["loss"] for line in expected]


def test_a_child_that_cannot_compute_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(*_: object) -> None:
        signal.pause()

    monkeypatch.setattr(forked, "START_S", 0.2)
    monkeypatch.setattr(forked, "_answer_all", stuck)
    before = set(psutil.Process().children())
    cohort = in_blocks(cohort_of(random_spec("a"), arch="llama"))
    with pytest.raises(OSError, match="does not compute"), at_work(processes(3), cohort):
        pass
    assert set(psutil.Process().children()) <= before


def test_what_a_child_holds_alone_is_counted() -> None:
    cohort = in_blocks(cohort_of(random_spec("a"), arch="llama"))
    child_tensors: list[torch.Tensor] = []
    parent_pid = os.getpid()
    size = 256 * 2**20

    def holds(*_: object) -> None:
        if os.getpid() != parent_pid:
            child_tensors.append(torch.ones(size // 4))

    shared = torch.ones(size // 4)  # which both have, and is counted in this process alone
    batches = micro_batches(UNEVEN, ["a"], 2, packed=True)
    with at_work(processes(2), cohort) as (workers, objective, members):
        assert isinstance(workers, Forked)
        parameters = list(members[0].parameters.values())
        workers.learn(objective, batches, parameters, {"a": 1.0}, {"a": 1.0})
        assert 0 < workers.unshared_bytes < 0.5 * size
    handle = cohort.model.base_model.register_forward_pre_hook(holds)
    with at_work(processes(2), cohort) as (workers, objective, members):
        assert isinstance(workers, Forked)
        workers.learn(
            objective, batches, list(members[0].parameters.values()), {"a": 1.0}, {"a": 1.0}
        )
        assert size < workers.unshared_bytes < 2.5 * size
    handle.remove()
    assert float(shared[0]) == 1.0
    assert not child_tensors


def test_peak_memory_adds_what_is_held_beside_only_while_it_is() -> None:
    def touched(size: int) -> mmap.mmap:
        """Fresh memory: the heap may hold pages that are free and resident."""
        pages = mmap.mmap(-1, size)
        for start in range(0, size, mmap.PAGESIZE):
            pages[start] = 1
        return pages

    memory = PeakMemory()
    if memory.method != "kernel high-water mark":
        pytest.skip("peaks are sampled here, and a short one may be missed")
    mib = 2**20
    touched(600 * mib).close()
    memory.beside(100 * mib)
    later = touched(200 * mib)
    assert 590 * mib <= memory.read()["peak_bytes"] < 640 * mib
    memory.beside(700 * mib)
    assert 890 * mib <= memory.read()["peak_bytes"] < 980 * mib
    memory.beside(0)
    later.close()
    touched(300 * mib).close()
    assert 890 * mib <= memory.read()["peak_bytes"] < 980 * mib
