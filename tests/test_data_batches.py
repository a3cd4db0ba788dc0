"""Steps, micro-batches and padding: what is in them, never what order they happen to have."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lighten.data.batches import Item, collate, layout, steps_of_epoch


@dataclass
class Row:
    input_ids: list[int]
    supervised: list[bool]


lengths = st.lists(st.integers(1, 60), min_size=1, max_size=80)


@given(lengths, st.integers(1, 16), st.integers(0, 3), st.booleans())
@settings(deadline=None)
def test_an_epoch_holds_every_row_once_and_only_its_last_step_is_partial(
    lengths: list[int], per_step: int, epoch: int, grouped: bool
) -> None:
    steps = steps_of_epoch(lengths, per_step, seed=1, epoch=epoch, group_by_length=grouped)
    assert sorted(row for step in steps for row in step) == list(range(len(lengths)))
    assert all(len(step) == per_step for step in steps[:-1])


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return steps_of_epoch(list(range(1, 65)), 4, seed=seed, epoch=epoch)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(2, 0)
    assert order(1, 0) != order(1, 1)


def test_grouping_by_length_saves_padding() -> None:
    lengths = [(7 * i) % 101 + 1 for i in range(256)]

    def padding(grouped: bool) -> int:
        steps = steps_of_epoch(lengths, 8, seed=0, epoch=0, group_by_length=grouped)
        return sum(len(s) * max(lengths[r] for r in s) - sum(lengths[r] for r in s) for s in steps)

    assert padding(True) < padding(False) / 3


@given(lengths, st.integers(1, 9), st.one_of(st.none(), st.integers(1, 200)), st.integers(1, 3))
@settings(deadline=None)
def test_a_layout_keeps_every_row_within_its_budgets(
    lengths: list[int], max_rows: int, max_tokens: int | None, workers: int
) -> None:
    items = [Item("a", row, 0) for row in range(len(lengths))]
    parts = layout(items, lengths, max_rows=max_rows, max_tokens=max_tokens, workers=workers)
    assert sorted(item.row for part in parts for item in part) == list(range(len(lengths)))
    for part in parts:
        padded = len(part) * max(lengths[item.row] for item in part)
        assert len(part) <= max_rows
        assert max_tokens is None or padded <= max_tokens or len(part) == 1


def test_collate_pads_right_orders_by_adapter_and_points_at_the_token_before() -> None:
    rows = [Row([5, 6, 7], [False, False, True]), Row([1, 2, 3, 4], [False, True, False, True])]
    batch = collate([Item("b", 1, 0), Item("a", 0, 0)], rows, ["a", "b"])
    assert batch.input_ids.tolist() == [[5, 6, 7, 0], [1, 2, 3, 4]]
    assert batch.lengths == (3, 4)
    assert batch.labels.tolist() == [7, 2, 4]
    assert batch.positions.tolist() == [1, 4, 6]
    assert batch.supervised_before == (0, 1, 3)
    assert (batch.tokens, batch.supervised_in(1, 2)) == (7, 2)


@pytest.mark.parametrize("packed", [False, True])
def test_a_row_by_itself_and_a_thinned_batch_point_at_the_same_tokens(packed: bool) -> None:
    sizes = range(5)
    rows = [Row([10 * i + t for t in range(1, 4 + i)], [False] + [True] * (2 + i)) for i in sizes]
    rows[3] = Row(rows[3].input_ids, [False] * len(rows[3].input_ids))
    batch = collate([Item("a", i, 0) for i in range(5)], rows, ["a"], packed=packed)
    for i, row in enumerate(rows):
        single = batch.alone(i)
        assert single.input_ids.tolist() == [row.input_ids]
        assert [row.input_ids[p + 1] for p in single.positions.tolist()] == single.labels.tolist()
        assert len(single.labels) == sum(row.supervised[1:]) == single.supervised_in(0, 1)
    thinned = batch.thinned(2, 3)
    counts = [thinned.supervised_in(i, i + 1) for i in range(5)]
    assert counts == [2, 0, 3, 0, 0], "of the four rows with an answer every second keeps three"
    following = dict(zip(batch.positions.tolist(), batch.labels.tolist(), strict=True))
    assert all(following[p] == label for p, label in
               zip(thinned.positions.tolist(), thinned.labels.tolist(), strict=True))  # fmt: skip
    unthinned = batch.thinned(99, 99)
    assert unthinned.positions.tolist() == batch.positions.tolist()
    assert unthinned.supervised_before == batch.supervised_before


def test_trap11_a_pad_token_equal_to_eos_is_supervised_where_it_ends_the_answer() -> None:
    eos = 0
    rows = [Row([5, 6, eos], [False, True, True]), Row([5, 6, 7, 8, eos], [False] * 4 + [True])]
    batch = collate([Item("a", 0, 0), Item("a", 1, 0)], rows, ["a"])
    assert batch.labels.tolist() == [6, eos, eos]
    assert batch.input_ids[0].tolist() == [5, 6, eos, eos, eos]


def test_the_first_token_is_never_a_target() -> None:
    batch = collate([Item("a", 0, 0)], [Row([3, 4], [True, True])], ["a"])
    assert batch.labels.tolist() == [4]


@pytest.mark.parametrize("per_step", [1, 3])
def test_more_steps_than_rows_is_no_error(per_step: int) -> None:
    assert steps_of_epoch([4], per_step, seed=0, epoch=0) == [[0]]


def _even_by_definition(
    lengths: list[int], max_rows: int, room: int, workers: int
) -> list[list[int]]:
    """Each row where the fewest tokens are, with ever more micro-batches until all fit."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    count = -(-sum(lengths) // room)
    while True:
        count += -count % workers
        parts: list[list[int]] = [[] for _ in range(count)]
        tokens = [0] * count
        fits = True
        for row in order:
            places = [place for place in range(count) if len(parts[place]) < max_rows]
            if not places:
                fits = False
                break
            place = min(places, key=lambda place: tokens[place])
            fits &= not parts[place] or tokens[place] + lengths[row] <= room
            parts[place].append(row)
            tokens[place] += lengths[row]
        if fits:
            return [parts[p] for p in sorted(range(count), key=lambda p: -tokens[p]) if parts[p]]
        count += 1


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 8), st.integers(1, 90),
    st.integers(1, 3),
)  # fmt: skip
@settings(deadline=None)
def test_packed_layouts_are_those_of_the_rule(
    lengths: list[int], max_rows: int, room: int, workers: int
) -> None:
    items = [Item("a", row, row) for row in range(len(lengths))]
    batches = layout(
        items, lengths, max_rows=max_rows, max_tokens=room, packed=True, workers=workers
    )  # fmt: skip
    assert [[item.row for item in part] for part in batches] == _even_by_definition(
        lengths, max_rows, room, workers
    )


def test_very_many_rows_are_laid_out_in_seconds() -> None:
    lengths = [1024 - row % 700 for row in range(40_000)]
    items = [Item("a", row, row) for row in range(len(lengths))]
    began = time.perf_counter()
    batches = layout(items, lengths, max_rows=40_000, max_tokens=1024, packed=True)
    assert sum(map(len, batches)) == len(items)
    assert all(sum(lengths[item.row] for item in part) <= 1024 for part in batches)
    assert time.perf_counter() - began < 60  # it was an hour
