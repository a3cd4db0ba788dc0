"""What our engine does where memory runs out: an answer that wants it ends, and no other."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lighten.generation.attention import SlotCache
from lighten.generation.engine import Engine
from tests.processes import Forked
from tests.test_serve_cohort import ask, finished
from tests.tiny import tiny_model


def test_a_cache_that_found_no_memory_has_the_room_that_it_had() -> None:
    cache = SlotCache(2, 2**60)
    cache.reserve(10)
    key, value = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    for index in range(2):
        cache.layer(index, key, value)[0][0, :, :3] = key[0]
    before = cache.capacity
    with pytest.raises(RuntimeError, match=r"memory|too large|overflow"):
        cache.reserve(2**50)
    assert cache.capacity == before
    cache.reserve(before + 1)
    for index in range(2):
        keys, values = cache.layer(index, key, value)
        assert keys.shape == values.shape
        assert keys.shape[2] == cache.capacity > before
        assert torch.equal(keys[0, :, :3], key[0])


@contextmanager
def little_memory(more_bytes: int) -> Iterator[None]:
    """The process gets only so much more of addresses."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is limited on Linux")
def test_an_answer_that_memory_has_no_room_for_ends_and_others_go_on() -> None:
    """In a process of its own: what earlier tests have let go of would be room."""
    process = Forked(run_out_of_memory, ())
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def run_out_of_memory() -> None:
    engine = Engine(tiny_model("llama"), max_sequences=2**12, max_tokens=520)  # 64 MiB a tensor
    short = finished(ask(engine, [5, 6, 7], None, count=4)).tokens
    with little_memory(60 * 2**20):
        beside = [ask(engine, [5, 6, 7], None, count=40) for _ in range(2)]
        long = ask(engine, [5] * 300, None)
        with pytest.raises(MemoryError, match="keys and values of 300 tokens"):
            finished(long)
        assert [finished(answer).tokens[:4] for answer in beside] == [short] * 2
    assert len(finished(ask(engine, [5] * 300, None)).tokens) == 6
    engine.close(10)
