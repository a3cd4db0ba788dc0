"""The allocators' models: rounding, splitting, joining, and what the real ones do with the same."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lighten.cpu import allocator
from lighten.machine import heap
from lighten.planning import process_overhead
from lighten.planning.allocators import (
    MIB,
    Arena,
    CachingAllocator,
    Course,
    Held,
    counted,
    replay,
    rounded,
    segment_size,
)
from lighten.planning.process_overhead import Context

GLIBC = heap.glibc() is not None


@pytest.mark.parametrize(
    ("size", "block"), [(1, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)]
)
def test_sizes_are_rounded_to_512_bytes(size: int, block: int) -> None:
    assert rounded(size) == block


@pytest.mark.parametrize(
    ("block", "segment"),
    [(512, 2 * MIB), (MIB, 2 * MIB), (MIB + 512, 20 * MIB), (10 * MIB - 512, 20 * MIB),
     (10 * MIB, 10 * MIB), (10 * MIB + 512, 12 * MIB), (33 * MIB, 34 * MIB)],
)  # fmt: skip
def test_segments_follow_the_size(block: int, segment: int) -> None:
    assert segment_size(block) == segment
    caching = CachingAllocator()
    caching.take(block)
    assert caching.held == segment


def test_a_small_rest_is_split_off_and_a_large_one_only_beyond_one_mib() -> None:
    small = CachingAllocator()
    small.take(MIB)
    small.take(MIB - 512)
    assert small.held == 2 * MIB
    small.take(512)
    assert small.held == 2 * MIB, "the last 512 bytes of the segment are a block"
    large = CachingAllocator()
    large.take(19 * MIB // 2)
    large.take(19 * MIB // 2)  # what is left, one MiB, is not split off
    assert (large.held, large.allocated) == (20 * MIB, 20 * MIB)


def test_free_neighbours_are_joined_and_small_and_large_never_share() -> None:
    caching = CachingAllocator()
    blocks = [caching.take(4 * MIB) for _ in range(5)]
    assert caching.held == 20 * MIB
    for block in (blocks[0], blocks[2], blocks[1]):
        caching.give(block)
    caching.take(12 * MIB - 512)
    assert caching.held == 20 * MIB, "three neighbours became one"
    caching.take(1024)
    assert caching.held == 22 * MIB


def test_the_best_fit_is_taken() -> None:
    caching = CachingAllocator()
    large, small = caching.take(40 * MIB), caching.take(14 * MIB)
    caching.give(large)
    caching.give(small)
    assert caching.take(13 * MIB) is small


def test_replay_tells_the_peak_and_where_it_was() -> None:
    events = [(1, True, 30 * MIB), (2, True, 10 * MIB), (1, False, 30 * MIB), (3, True, MIB)]
    course = replay(CachingAllocator(), events)
    assert course.most() == Held(42 * MIB, 1, 40 * MIB)
    assert course.most(1, 3) == Held(40 * MIB, 1, 40 * MIB)
    assert course.most(2, 2) == course.most(4) == Held(0, 0, 0), "a stretch without events"
    assert max(course.allocated) == 40 * MIB
    assert len(course.held) == 4
    assert course.held == sorted(course.held), "segments are kept"


def test_of_a_heap_blocks_are_counted_and_a_share_of_them() -> None:
    events = [(1, True, 30 * MIB), (2, True, MIB), (1, False, 30 * MIB), (3, True, 0)]
    allocated = [30 * MIB, 31 * MIB, MIB, MIB]
    assert counted(events) == Course(allocated, allocated)
    assert counted(events, 0.25) == Course([size * 5 // 4 for size in allocated], allocated)


BLOCKS = st.lists(st.tuples(st.integers(1, 40 * MIB), st.integers(0, 6)), min_size=1, max_size=60)


@given(BLOCKS)
@settings(deadline=None)
def test_allocators_hold_at_least_what_is_in_use_and_lose_nothing(
    plan: list[tuple[int, int]],
) -> None:
    for simulated in (CachingAllocator(), Arena()):
        live: list[tuple[object, int]] = []
        for size, keep in plan:
            live.append((simulated.take(size), size))
            while len(live) > keep + 1:
                simulated.give(live.pop(0)[0])
            assert simulated.held >= simulated.allocated >= sum(size for _, size in live)
            assert simulated.highest >= simulated.held
        for block, _ in live:
            simulated.give(block)
        assert simulated.allocated == 0
        highest_before = simulated.highest
        simulated.take(plan[-1][0])
        assert simulated.highest == highest_before, "what was given back is used again"


def test_blocks_of_the_arena_never_overlap() -> None:
    arena_model, chance = Arena(), random.Random(0)
    live: dict[int, tuple[int, int, int]] = {}
    for number in range(3000):
        live[number] = arena_model.take(int(2 ** chance.uniform(3, 22)))
        while len(live) > 80 or (live and chance.random() < 0.4):
            arena_model.give(live.pop(chance.choice(list(live))))
        spans = sorted((start, start + size) for start, size, _ in live.values())
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


@pytest.mark.skipif(shutil.which("g++") is None or not GLIBC, reason="no g++, or no glibc")
def test_where_there_is_a_compiler_there_is_an_arena() -> None:
    """Without it every other test of the arena is skipped."""
    code = "from lighten.cpu import allocator; print(allocator.keep_pages('cpu'))"
    completed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "arena, pages kept" in completed.stdout, completed.stdout


# What is resident of the arena after each event; a fork and a thread in between must not matter.
IN_ARENA = """
import json, os, sys, threading
from pathlib import Path
import torch
from lighten.cpu import allocator
from lighten.cpu.allocator import arena
torch.set_num_threads(1)
print(allocator.keep_pages("cpu").value)
start = f"{arena.opened():x}-"
def resident():
    lines = Path("/proc/self/smaps").read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith(start))
    return next(int(line.split()[1]) * 1024 for line in lines[place:] if line.startswith("Rss:"))
blocks, found = {}, []
for number, born, size in json.loads(sys.stdin.read()):
    if size == 0:
        allocator.trim()
    elif born:
        blocks[number] = torch.ones(size, dtype=torch.uint8)
    elif number % 2:
        given = [blocks.pop(number)]
        thread = threading.Thread(target=given.clear)
        thread.start()
        thread.join()
    else:
        del blocks[number]
    found.append(resident())
child = os.fork()
if child == 0:
    blocks.clear()
    torch.ones(2**20)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(json.dumps(found))
"""


@pytest.mark.skipif(not allocator.has_arena(), reason="no arena here")
@pytest.mark.parametrize("seed", range(3))
def test_the_arena_holds_what_its_model_says(seed: int) -> None:
    chance, live = random.Random(seed), dict[int, int]()
    events: list[tuple[int, bool, int]] = []
    for number in range(400):
        live[number] = int(2 ** chance.uniform(16, 22))
        events.append((number, True, live[number]))
        while len(live) > 30 or (live and chance.random() < 0.4):
            freed = chance.choice(list(live))
            events.append((freed, False, live.pop(freed)))
        if number % 100 == 99:
            events.append((0, False, 0))
    completed = subprocess.run(
        [sys.executable, "-c", IN_ARENA], input=json.dumps(events), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    description, resident_json = completed.stdout.splitlines()
    assert description == "arena, pages kept"
    course = replay(Arena(), events, [i for i, event in enumerate(events) if not event[2]])
    # A block's last line is never written: its page may be missing, in a few of the blocks.
    differences = [
        held - real for held, real in zip(course.held, json.loads(resident_json), strict=True)
    ]
    assert max(map(abs, differences)) <= 10 * 4096
    assert max(course.held) > 2 * 10**7


@pytest.mark.skipif(not allocator.has_arena(), reason="no arena here")
@pytest.mark.parametrize(
    ("prefix", "message"),
    [("CXX=/bin/false", "made nothing of allocator"),
     ("ulimit -v 40000000;", "a limit on address space")],
)  # fmt: skip
def test_without_an_arena_the_reason_is_said(prefix: str, message: str, tmp_path: Path) -> None:
    code = "from lighten.cpu import allocator; print(allocator.keep_pages('cpu'))"
    command = f'LIGHTEN_CACHE={tmp_path} {sys.executable} -c "{code}"'
    completed = subprocess.run(
        f"{prefix} {command}", shell=True, capture_output=True, text=True, check=True
    )
    assert "glibc, pages kept" in completed.stdout
    assert message in completed.stdout


def test_pages_that_were_given_back_count_again_once_they_are_written() -> None:
    arena_model = Arena()
    blocks = [arena_model.take(4 * MIB) for _ in range(4)]
    for place in (0, 2):
        arena_model.give(blocks[place])
    assert arena_model.held >= 16 * MIB
    arena_model.trim()
    assert arena_model.held == pytest.approx(8 * MIB, abs=64 * 1024), "two of four blocks are left"
    arena_model.take(2 * MIB)
    assert arena_model.held == pytest.approx(10 * MIB, abs=64 * 1024), (
        "half a hole is written again"
    )
    arena_model.take(8 * MIB)
    assert arena_model.held == pytest.approx(18 * MIB, abs=64 * 1024), "no hole is that large"
    arena_model.give(blocks[1])
    arena_model.trim()
    assert arena_model.held == pytest.approx(14 * MIB, abs=64 * 1024)


def test_the_context_is_measured_once_for_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    context_json = '{"bytes": 90000000, "worker_bytes": 50000000, "saving_bytes": 7}'

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 0, f"a warning\n{context_json}\n", "")

    monkeypatch.setattr(process_overhead.subprocess, "run", run)
    path = tmp_path / "new" / "context.json"
    assert (
        process_overhead.context_of(path)
        == process_overhead.context_of(path)
        == Context(90_000_000, 50_000_000, 7)
    )
    assert len(calls) == 1
    monkeypatch.setattr(process_overhead, "processor_name", lambda: "another")
    process_overhead.context_of(path)
    assert len(calls) == 2, "another processor is another context"
    monkeypatch.setattr(process_overhead.sys, "prefix", "/another/environment")
    process_overhead.context_of(path)
    assert len(calls) == 3, "other files of the same libraries are another context"
    path.write_text("{", encoding="ascii")

    def fails(command: list[str], **_: Any) -> None:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(process_overhead.subprocess, "run", fails)
    assert process_overhead.context_of(path) == process_overhead.UNMEASURED


def test_a_quantised_base_brings_what_bitsandbytes_imports(tmp_path: Path) -> None:
    """Measured: some 40 MB that a plan of NF4 was low by."""
    dense, quantised = (
        process_overhead.context_of(tmp_path / f"{quantised}.json", quantised=quantised)
        for quantised in (False, True)
    )
    assert quantised.bytes - dense.bytes > 15 * 2**20
    assert quantised.bytes - dense.bytes < 150 * 2**20
    # PEFT, which comes with the first adapter that is saved, imports it too.
    assert 0 < quantised.saving_bytes < dense.saving_bytes - 15 * 2**20 < 150 * 2**20


def test_a_process_that_a_rank_measures_takes_no_rank_s_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the other ranks met it, and ended when it did."""
    of_rank = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": "1", "OMPI_COMM_WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true",
               }  # fmt: skip
    for name, value in of_rank.items():
        monkeypatch.setenv(name, value)
    context_json = '{"bytes": 90000000, "worker_bytes": 50000000, "saving_bytes": 7}'
    code = f"from accelerate import Accelerator; Accelerator(cpu=True); print('{context_json}')"
    run = subprocess.run

    def meets(_command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return run([sys.executable, "-c", code], **{**options, "timeout": 60})

    monkeypatch.setattr(process_overhead.subprocess, "run", meets)
    context = process_overhead.context_of(tmp_path / "context.json")
    assert context == Context(90_000_000, 50_000_000, 7)
