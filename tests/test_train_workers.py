"""Workers: micro-batches side by side give what they give one after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from random import Random

import pytest
import torch
from accelerate import Accelerator

import lighten
from lighten.adapters import AdapterSpec, Cohort
from lighten.data.batches import START_TOKENS, Item, MicroBatch, even_shares, layout
from lighten.engine.adapter_optimizer import AdapterOptimizer
from lighten.engine.checkpointing import checkpoint_layers
from lighten.engine.loss import Objective
from lighten.engine.scaling import LossScaler
from lighten.engine.step import AdapterStep, TrainingDiverged, train_step
from lighten.engine.workers import Threads, Workers, choose, shared_out
from tests.test_train_step import (
    UNEVEN,
    assert_close,
    cohort_of,
    gradients,
    in_blocks,
    micro_batches,
    random_spec,
    settings,
)
from tests.tiny import ARCHITECTURES


def step_in(
    workers: Workers | None, cohort: Cohort, *, packed: bool = False, max_rows: int = 2
) -> tuple[dict[str, AdapterStep], list[AdapterOptimizer]]:
    members = [AdapterOptimizer(name, cohort.parameters(name), settings()) for name in cohort.names]
    report = train_step(
        micro_batches(UNEVEN, list(cohort.names), max_rows, packed=packed),
        members,
        Objective(cohort.model, cohort, packs=packed),
        Accelerator(cpu=True),
        LossScaler(enabled=False),
        workers,
    )
    return report, members


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_lanes_change_neither_loss_nor_gradients(arch: str, count: int) -> None:
    spec = AdapterSpec("a", r=4, dropout=0.2, init_lora_weights=False, seed=3)
    alone_report, alone = step_in(None, cohort_of(spec, arch=arch))
    report, members = step_in(Threads(count, 2), cohort_of(spec, arch=arch))
    assert report["a"].loss == pytest.approx(alone_report["a"].loss, rel=1e-6)
    assert report["a"].grad_norm == pytest.approx(alone_report["a"].grad_norm, rel=1e-5)
    assert_close(gradients(members[0]), gradients(alone[0]))


@pytest.mark.parametrize("recomputed", [False, True])
def test_lanes_of_packed_rows_of_several_adapters(recomputed: bool) -> None:
    def cohort() -> Cohort:
        new_cohort = in_blocks(cohort_of(random_spec("a"), random_spec("b", r=8), arch="llama"))
        if recomputed:
            checkpoint_layers(new_cohort.model)
        return new_cohort

    alone_report, alone = step_in(None, cohort(), packed=True, max_rows=3)
    report, members = step_in(Threads(2, 2), cohort(), packed=True, max_rows=3)
    for name, member, lone_member in zip("ab", members, alone, strict=True):
        assert report[name].loss == pytest.approx(alone_report[name].loss, rel=1e-6)
        assert_close(gradients(member), gradients(lone_member))


def test_lanes_give_the_same_bits_however_fast_each_thread_is() -> None:
    runs = []
    for _ in range(4):
        _, members = step_in(Threads(3, 3), cohort_of(random_spec(), arch="qwen2"), max_rows=1)
        runs.append(gradients(members[0]))
    for repeated in runs[1:]:
        assert all(torch.equal(runs[0][key], repeated[key]) for key in runs[0])


def test_gradients_lie_in_memory_as_their_parameters_do() -> None:
    """A fused optimiser reads both in the order of memory; a product's may be transposed."""
    cohort = cohort_of(random_spec())
    same_strides: list[bool] = []
    members = [AdapterOptimizer("a", cohort.parameters("a"), settings())]
    step = members[0].optimizer.step

    def watched_step(*args: object) -> object:
        for parameter in members[0].parameters.values():
            assert parameter.grad is not None
            same_strides.append(parameter.grad.stride() == parameter.stride())
        return step()

    members[0].optimizer.step = watched_step  # type: ignore[method-assign,assignment]
    train_step(
        micro_batches(UNEVEN, ["a"], 2), members, Objective(cohort.model, cohort),
        Accelerator(cpu=True), LossScaler(enabled=False), Threads(2, 2),
    )  # fmt: skip
    assert same_strides
    assert all(same_strides)


def test_an_error_in_a_lane_is_raised_where_the_step_was_called() -> None:
    cohort = cohort_of(random_spec())
    for parameter in cohort.parameters("a").values():
        parameter.data.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="adapter 'a'"):
        step_in(Threads(2, 2), cohort)

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("in the middle of a layer")

    cohort.model.register_forward_pre_hook(broken)
    cohort.model.base_model.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="in the middle of a layer"):
        step_in(Threads(2, 2), cohort)


def test_every_micro_batch_goes_to_the_lane_with_the_fewest_tokens() -> None:
    def batch(tokens: int) -> MicroBatch:
        empty = torch.zeros(0, dtype=torch.long)
        ids = torch.zeros(1, tokens, dtype=torch.long)
        return MicroBatch((Item("a", 0, 0),), ids, (tokens,), empty, empty, (0, 0))

    workers = shared_out([batch(n) for n in (3, 9, 5, 4)], 2)
    assert [[b.tokens for b in worker] for worker in workers] == [[9, 3], [5, 4]]
    assert [len(worker) for worker in shared_out([batch(3)], 2)] == [1]


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_is_cut_for_its_lanes(packed: bool) -> None:
    lengths = [100, 90, 80, 70, 60, 50, 40, 30]
    items = [Item("a", i, i) for i in range(8)]
    parts = layout(items, lengths, max_rows=8, packed=packed, workers=2)
    sizes = [sum(lengths[item.row] for item in part) for part in parts]
    assert sorted(item.row for part in parts for item in part) == list(range(8))
    assert len(parts) >= 2
    if packed:
        assert len(parts) == 2
        assert max(sizes) - min(sizes) <= 20
        assert len(layout(items, lengths, max_rows=8, max_tokens=200, packed=True, workers=2)) == 4


def _slowest(tokens: Sequence[int], workers: int) -> int:
    """What the fullest worker does, a micro-batch's own cost included, in tokens."""
    return max(
        sum(tokens[place] + START_TOKENS for place in share)
        for share in even_shares(tokens, workers)
    )


@pytest.mark.parametrize("workers", [2, 3])
def test_padded_rows_are_cut_nearly_as_well_for_their_lanes_as_can_be(workers: int) -> None:
    random, ratios = Random(0), []
    for _ in range(60):
        rows = sorted((random.randint(100, 512) for _ in range(8)), reverse=True)
        items = [Item("a", row, row) for row in range(8)]
        parts = layout(items, rows, max_rows=8, max_tokens=1536, workers=workers)
        every = [
            [(stop - start) * rows[start] for start, stop in pairwise((0, *cuts, 8))]
            for count in range(8)
            for cuts in combinations(range(1, 8), count)
        ]
        best = min(_slowest(tokens, workers) for tokens in every if max(tokens) <= 1536)
        ratios.append(_slowest([len(part) * rows[part[0].row] for part in parts], workers) / best)
    assert min(ratios) >= 1.0
    assert sum(ratios) / len(ratios) < 1.05  # rows of one text: 1.013 at random, 1.001 grouped


def test_eight_rows_of_like_length_are_four_for_each_of_two_lanes() -> None:
    rows = [143, 142, 142, 140, 139, 137, 137, 134]
    items = [Item("a", row, row) for row in range(8)]
    parts = layout(items, rows, max_rows=8, max_tokens=1536, workers=2)
    assert [len(part) for part in parts] == [4, 4]
    assert layout([], rows, max_rows=8, workers=2) == []


def test_auto_gives_a_lane_enough_tokens_to_fill_its_products() -> None:
    cohort = cohort_of(random_spec())

    def chosen(workers: int | str = "auto", **changes: object) -> tuple[str, str]:
        arguments: dict[str, object] = {"rows": 8, "tokens": 2300, "device": "cpu", "threads": 2}
        choice = choose(workers, cohort, **{**arguments, **changes})  # type: ignore[arg-type]
        return choice.value, choice.reason

    assert chosen()[0] == "2"
    assert chosen(threads=8)[0] == "4"
    assert chosen(threads=6)[0] == "3"
    assert chosen(threads=1)[0] == "1"
    assert chosen(tokens=700) == ("1", "2 threads share a step of about 700 tokens")
    assert chosen(3)[0] == "3"
    assert chosen(3, rows=2)[0] == "2"
    assert chosen(3, rows=0)[0] == "1"  # a rank of more than a step has rows
    assert chosen(device="cuda")[0] == "1"
    saved = cohort_of(AdapterSpec("a", r=4, modules_to_save=("lm_head",)))
    choice = choose("auto", saved, rows=8, tokens=9000, device="cpu", threads=2)
    assert choice.value == "1"
    assert "modules_to_save" in choice.reason


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As many as workers; the tests have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_a_run_in_lanes_trains_and_says_so(
    tmp_path: Path, tiny_folder: Path, chat_file: Path
) -> None:
    def losses(workers: int) -> list[float]:
        run = lighten.train(
            model_name_or_path=str(tiny_folder), dataset=str(chat_file), max_steps=3,
            dtype="float32", output_dir=str(tmp_path / str(workers)), workers=workers,
            progress=False,
        )  # fmt: skip
        choices = {choice["what"]: choice["value"] for choice in run.info()["choices"]}
        assert choices["workers"] == str(workers)
        return [line["loss"] for line in run.metrics()]

    assert losses(2) == pytest.approx(losses(1), rel=1e-5)
