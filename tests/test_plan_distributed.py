"""Memory and communication of many ranks, against the figures that the papers print."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from lighten.machine.devices import DEVICES
from lighten.planning.distributed import (
    States,
    Volume,
    all_gather,
    all_reduce,
    link_seconds,
    offloaded,
    reduce_scatter,
    spread,
    states_per_rank,
    volume_per_rank,
)
from lighten.planning.result import Memory, MemoryPart, Plan, Shape, StepTime
from lighten.planning.text import spread_rows
from tests.test_plan_trace import folder_of, follow, recipe_of

GB = 1e9


def mixed(parameters: float) -> States:
    """Adam in mixed precision: 2 + 2 + 12 bytes per parameter (arXiv 1910.02054, section 3.1)."""
    return States(0.0, 2 * parameters, 2 * parameters, 12 * parameters)


@pytest.mark.parametrize(
    ("strategy", "gb"), [("ddp", 120), ("zero1", 31.4), ("zero2", 16.6), ("zero3", 1.9)]
)
def test_figure_1_of_the_zero_paper(strategy: str, gb: float) -> None:
    """7.5 billion parameters over 64 ranks: 120, 31.4, 16.6 and 1.9 GB."""
    per_rank = states_per_rank(mixed(7.5e9), strategy, 64)  # type: ignore[arg-type]
    assert per_rank.total / GB == pytest.approx(gb, abs=0.06)


@pytest.mark.parametrize(
    ("ranks", "parameters", "expected"),
    [
        (4, 7.5e9, (52.5, 41.3, 30)), (1024, 7.5e9, (30.1, 15.1, 0.12)),
        (16, 128e9, (608, 368, 128)), (256, 1e12, (4046, 2054, 62.5)),
    ],
)  # fmt: skip
def test_table_1_of_the_zero_paper(
    ranks: int, parameters: float, expected: tuple[float, float, float]
) -> None:
    """Model states per rank in GB for ZeRO 1, 2 and 3, as the paper rounds them."""
    for strategy, gb in zip(("zero1", "zero2", "zero3"), expected, strict=True):
        per_rank = states_per_rank(mixed(parameters), strategy, ranks)  # type: ignore[arg-type]
        assert per_rank.total / GB == pytest.approx(gb, rel=0.025), strategy


def test_ring_collectives_by_hand() -> None:
    # Four ranks, 8 bytes: three chunks of 2 bytes are sent on in each of the two phases.
    assert reduce_scatter(8, 4) == all_gather(8, 4) == 6
    assert all_reduce(8, 4) == 12
    assert all_reduce(8, 1) == 0


def test_section_7_of_the_zero_paper() -> None:
    """Volume over many ranks: 2 Psi for DDP and ZeRO 2, and 3 Psi for ZeRO 3.

    ZeRO 1 is 2 Psi there; `parallel/` sums whole gradients before it hands rows out. On processors
    gloo scatters by reducing all.
    """
    parameters, ranks = 1e9, 10_000
    psi = 2 * parameters
    for strategy, times, on_processors in (
        ("ddp", 2, 2), ("zero1", 3, 3), ("zero2", 2, 3), ("zero3", 3, 4), ("fsdp", 3, 4)
    ):  # fmt: skip
        for gloo, expected in ((False, times), (True, on_processors)):
            volume = volume_per_rank(mixed(parameters), strategy, ranks, gloo=gloo)  # type: ignore[arg-type]
            assert volume.network / psi == pytest.approx(expected, rel=1e-3), strategy


def test_whole_gradients_are_summed_once_per_step_and_layers_come_with_each_micro_batch() -> None:
    three = {"ranks": 8, "micro_batches": 3}
    base = mixed(1e9)
    adapters = States(frozen=2e9, trained=8e6, gradients=8e6, optimiser=16e6, adapters=8e6)
    for strategy, of_base, of_adapters in (
        ("ddp", (0, 2), (0, 2)), ("zero1", (1, 2), (1, 2)), ("zero2", (3, 3), (1, 1)),
    ):  # fmt: skip
        for states, times in ((base, of_base), (adapters, of_adapters)):
            volume = volume_per_rank(states, strategy, **three)  # type: ignore[arg-type]
            sent = [part / (states.gradients * 7 / 8) for part in (volume.gather, volume.reduce)]
            assert sent == pytest.approx(times), strategy


def test_what_learns_outside_of_layers_is_gathered_once() -> None:
    """A quarter of the weights is embedding and head; there are four layers."""
    share = 7 / 8
    full = States(0.0, 4e9, 4e9, 8e9, layers=3e9)
    assert volume_per_rank(full, "zero3", 8, layers=4).gather == pytest.approx(7e9 * share)
    # Two layers learn; of the two below them one is gathered for nothing.
    last = States(2.5e9, 1.5e9, 1.5e9, 3e9, layers=3e9)
    gathered = 2 * 1.5e9 + 1.5e9 + 0.75e9
    assert volume_per_rank(last, "zero3", 8, layers=4).gather == pytest.approx(gathered * share)
    assert states_per_rank(last, "zero3", 8).frozen == pytest.approx(1e9 + 1.5e9 / 8)
    # Two of four packed layers are still there at each turn.
    packed = States(2e9, 8e6, 8e6, 16e6, packed=1e9, adapters=8e6, layers=1.1e9)
    assert volume_per_rank(packed, "zero3", 8, layers=4).gather == pytest.approx(1e9 * share)


def test_frozen_weights_are_gathered_but_never_reduced() -> None:
    states = States(
        frozen=18e9, trained=40e6, gradients=40e6, optimiser=80e6, adapters=40e6, layers=16e9
    )
    assert volume_per_rank(states, "ddp", 8).network == pytest.approx(2 * 40e6 * 7 / 8)
    volume = volume_per_rank(states, "zero3", 8, micro_batches=4)
    assert volume.gather == pytest.approx(4 * 2 * 16e9 * 7 / 8)
    assert volume.reduce == pytest.approx(2 * 40e6 * 7 / 8)
    # ZeRO 1 and 2 leave a frozen base whole on every rank, ZeRO 3 embedding, head and adapters.
    assert states_per_rank(states, "zero2", 8).frozen == 18e9
    of_rank = states_per_rank(states, "zero3", 8)
    assert (of_rank.frozen, of_rank.total) == (4e9, 4e9 + 160e6)


def test_hybrid_sharding_stays_inside_a_node() -> None:
    states = mixed(8e9)
    per_rank = states_per_rank(states, "fsdp_hybrid", 32, ranks_per_node=8)
    assert per_rank.total == pytest.approx(16 * 8e9 / 8)
    volume = volume_per_rank(states, "fsdp_hybrid", 32, ranks_per_node=8)
    assert volume.gather == pytest.approx(2 * 16e9 * 7 / 8)
    assert volume.across == pytest.approx(2 * (16e9 / 8) * 3 / 4)  # 4 nodes, a shard of 1/8


def test_hybrid_sharding_gathers_a_base_with_adapters_over_the_link_inside_of_a_node() -> None:
    """No rank shards adapters, so that nothing goes `across`: their gradients cross nodes whole."""
    h100 = DEVICES["h100"]
    assert h100.peer_link is not None
    assert h100.node_link is not None
    states = States(16 * GB, 0.1 * GB, 0.1 * GB, 0.2 * GB, adapters=0.1 * GB)
    volume = volume_per_rank(states, "fsdp_hybrid", 16, ranks_per_node=8, layers=32)
    assert volume.across == 0.0
    assert link_seconds(volume, h100, 2, hybrid=True) == pytest.approx(
        volume.gather / h100.peer_link + volume.reduce / h100.node_link
    )
    whole = Volume(8 * GB, 4 * GB, across=2 * GB)
    assert link_seconds(whole, h100, 2, hybrid=True) == pytest.approx(
        12 * GB / h100.peer_link + 2 * GB / h100.node_link
    )


def test_offload_moves_what_it_says() -> None:
    per_rank = states_per_rank(mixed(8e9), "zero2", 8)
    remaining, host, link = offloaded(per_rank, ("optimizer",))
    assert remaining.optimiser == 0
    assert remaining.trained == 16e9
    assert host == pytest.approx(12e9 + 2e9)  # 96 GB of moments and 16 GB of gradients, over 8
    assert link == pytest.approx(2e9 + 16e9)
    remaining, host, link = offloaded(states_per_rank(mixed(8e9), "zero3", 8),
                                      ("optimizer", "param"), micro_batches=2)  # fmt: skip
    assert remaining.total == 0
    assert host == pytest.approx((96e9 + 16e9 + 16e9) / 8)
    assert link == pytest.approx(2 * (2 * 16e9 + 16e9) / 8)


def test_adapters_stay_on_the_device_whatever_of_the_base_waits_elsewhere() -> None:
    with_lora = States(frozen=16e9, trained=4e8, gradients=4e8, optimiser=8e8, adapters=4e8)
    remaining, host, link = offloaded(with_lora, ("param",), micro_batches=2)
    assert remaining == dataclasses.replace(with_lora, frozen=0.0)
    assert (host, link) == (16e9, 2 * 2 * 16e9)
    remaining, host, _ = offloaded(with_lora, ("optimizer", "param"))
    assert (remaining.optimiser, remaining.gradients) == (0.0, 4e8)
    assert host == 16e9 + 8e8 + 4e8


def test_what_waits_on_a_disk_beside_gpus_has_no_time_and_is_no_main_memory() -> None:
    alone = a_plan()
    settings: dict[str, Any] = {"gpus": 8, "layers": 32, "offload": ("optimizer", "param")}
    in_memory = spread(alone, DEVICES["h100"], "zero3", **settings)
    in_files = spread(alone, DEVICES["h100"], "zero3", **settings, on_disk=True)
    assert in_memory.step_s is not None
    assert in_files.step_s is None
    assert in_files.device_bytes == in_memory.device_bytes
    assert [row[0] for row in spread_rows(in_memory)][1] == "main memory"
    assert [row[0] for row in spread_rows(in_files)][1] == "main memory and files"


def test_a_ring_runs_at_its_slowest_link() -> None:
    h100 = DEVICES["h100"]
    volume = Volume(gather=45e9, reduce=0.0)
    assert link_seconds(volume, h100, 1) == pytest.approx(0.1)  # 450 GB/s of NVLink
    assert link_seconds(volume, h100, 2) == pytest.approx(0.9)  # 400 Gbit/s of InfiniBand
    assert link_seconds(Volume(0, 0, host=64e9), h100, 1) == pytest.approx(1.0)  # PCIe 5


def a_plan(method: str = "full") -> Plan:
    """Eight billion parameters of mixed-precision Adam and 10 GB besides."""
    parts = (
        MemoryPart("base weights", int(16e9)), MemoryPart("gradients", int(16e9)),
        MemoryPart("optimiser", int(96e9)), MemoryPart("activations: linear", int(10e9)),
    )  # fmt: skip
    memory = Memory(parts, int(136e9), int(138e9), int(140e9), "backward", None)
    time = StepTime(1.0, 0.9, 1.1, 1e15, 1e12, "datasheet")
    shape = Shape(4, 2048, 1)
    return Plan("m", "h100", method, shape, memory, time, int(79e9), 0, 0, None, {}, ())


def test_a_plan_spreads_over_ranks() -> None:
    alone = a_plan()
    assert alone.fits() is False
    sharded = spread(alone, DEVICES["h100"], "zero3", gpus=8, nodes=4, layers=32)
    # An eighth of a quarter of the states, two gathered layers of 32, and the activations.
    assert sharded.device_bytes == pytest.approx(128e9 / 32 + 16e9 * 2 / 32 + 10e9, rel=1e-6)
    assert sharded.fits() is True
    assert sharded.step_s is not None
    assert sharded.step_s[0] < sharded.step_s[1]
    assert spread(alone, DEVICES["h100"], "ddp", gpus=8, layers=32).fits() is False
    thousands = spread(alone, DEVICES["h100"], "zero3", gpus=8, nodes=1000, layers=32)
    assert thousands.device_bytes == pytest.approx(11e9, rel=0.01)
    with_host = spread(alone, DEVICES["h100"], "zero2", gpus=8, layers=32, offload=("optimizer",))
    # Weights, and this rank's rows that they are gathered from; activations. A layer's gradients
    # come as its weights go.
    assert with_host.device_bytes == pytest.approx(16e9 + 2e9 + 10e9, rel=1e-6)
    assert with_host.host_bytes == pytest.approx(14e9, rel=1e-6)


def test_gradients_of_an_earlier_micro_batch_are_there_beside_whole_weights() -> None:
    """Of eight ranks under zero2: 16 GB of weights, 2 of rows of them, and 12 of moments."""
    twice = dataclasses.replace(a_plan(), shape=Shape(4, 2048, 2))
    settings: dict[str, Any] = {"gpus": 8, "layers": 32}
    one, two = (spread(p, DEVICES["h100"], "zero2", **settings) for p in (a_plan(), twice))
    assert one.device_bytes == pytest.approx(16e9 + 2e9 + 12e9 + 10e9, rel=1e-6)
    assert two.device_bytes == pytest.approx(one.device_bytes + 2e9, rel=1e-6)


def test_a_process_reads_and_spreads_a_base_layer_by_layer() -> None:
    """One that is rounded as it is read is whole first: where its states wait, that is its peak."""
    settings: dict[str, Any] = {"gpus": 8, "layers": 32, "offload": ("optimizer",)}
    gpu = spread(a_plan(), DEVICES["h100"], "zero3", **settings)
    cpu = dataclasses.replace(DEVICES["h100"], kind="cpu")
    processor = spread(a_plan(), cpu, "zero3", **settings)
    assert gpu.device_bytes == pytest.approx(16e9 / 4 + 16e9 * 2 / 32 + 10e9, rel=1e-6)
    assert processor.device_bytes == gpu.device_bytes
    choices = {"dtype": "bfloat16: wanted", "loading": "files are mapped while they are converted"}
    frozen = dataclasses.replace(
        a_plan(), method="lora", states=States(14e9, 2e9, 16e9, 96e9), choices=choices
    )
    rounded = spread(frozen, cpu, "zero3", **settings)
    assert rounded.device_bytes == pytest.approx(16e9, rel=1e-6)
    for changed in ({"dtype": "float32: wanted"}, {"loading": None}):
        kept = {key: value for key, value in {**choices, **changed}.items() if value}
        by_layer = spread(dataclasses.replace(frozen, choices=kept), cpu, "zero3", **settings)
        assert by_layer.device_bytes < rounded.device_bytes
    # The moments alone are elsewhere, and each step reads and writes them.
    assert processor.host_bytes == pytest.approx(96e9 / 8)
    assert processor.volume.host == pytest.approx(2 * 96e9 / 8)


def test_one_rank_needs_nothing_of_the_others() -> None:
    plan = spread(a_plan(), DEVICES["h100"], "ddp", gpus=1, layers=32)
    assert plan.volume.network == 0
    assert plan.device_bytes == pytest.approx(138e9)


@pytest.mark.parametrize(("strategy", "ranks", "rows"), [("zero3", 1, 2), ("zero3", 2, 6),
                                                         ("zero2", 2, 2)])  # fmt: skip
def test_a_rank_that_gathers_layers_is_planned_with_rows_of_all_adapters(
    tmp_path: Path, strategy: str, ranks: int, rows: int
) -> None:
    recipe = recipe_of(
        folder_of(tmp_path), strategy=strategy, lora_r=[1, 2, 3], per_device_train_batch_size=2
    )
    traced = follow(recipe, (2, 32), ranks=ranks)
    assert max(map(len, traced.batches)) == rows
