"""Workers of pytest-xdist share the tests: none is lost, and a long file is one worker's."""

from __future__ import annotations

import pytest

from tests.shares import LONG, in_shares


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_every_test_is_in_one_share_and_a_long_file_is_not_cut(
    workers: int, request: pytest.FixtureRequest
) -> None:
    items = sorted(request.session.items, key=lambda item: item.nodeid)
    ordered = in_shares(items, workers)
    assert sorted(item.nodeid for item in ordered) == [item.nodeid for item in items]
    if workers == 1:
        assert ordered == items
    if len(items) < 4000:  # a part of the suite: its shares are too short for all of a file
        return
    start, left = 0, len(items)
    seen: dict[str, int] = {}
    for worker in range(workers):
        size = left // (workers - worker)
        for item in ordered[start : start + size]:
            file = item.path.stem
            if file in LONG:
                assert seen.setdefault(file, worker) == worker, item.nodeid
        start, left = start + size, left - size
