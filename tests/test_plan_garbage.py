"""Garbage is looked for less often, and never given up."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from lighten.planning.gc_pause import spared, unsearched


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    """As a process begins; what tests have imported is frozen again afterwards."""
    gc.unfreeze()
    yield
    gc.collect()
    gc.freeze()


class Ring:
    """Garbage that only a search finds."""

    def __init__(self) -> None:
        self.myself = self


def test_what_is_made_meanwhile_is_still_found() -> None:
    gc.collect()  # so that none comes by itself
    frozen_before = gc.get_freeze_count()
    old = weakref.ref(Ring())
    with spared():
        new = weakref.ref(Ring())
        gc.collect()
        assert old() is not None, "it was there before, and waits"
        assert new() is None
    assert gc.get_freeze_count() == frozen_before
    gc.collect()
    assert old() is None


def test_what_somebody_froze_stays_frozen() -> None:
    gc.freeze()
    try:
        with spared():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_searching_is_as_it_was_afterwards() -> None:
    with unsearched():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with unsearched():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
