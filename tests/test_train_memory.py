"""What saves memory in a training pass: it must save, and change nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lighten.train import allocator

GLIBC = allocator._glibc() is not None
# Blocks of growing size, written and freed as activations are: how many pages had to be fetched?
WORK = """
import resource, sys
from lighten.train import allocator
import torch
if sys.argv[1] == "kept":
    print(allocator.keep_pages("cpu").value)
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    blocks = [torch.ones(size * 2**18) for size in (35, 48, 40)]
for _ in range(6): work()
before = faults()
for _ in range(3): work()
print(faults() - before)
import psutil
held = psutil.Process().memory_info().rss
allocator.trim()
print(held - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
def test_pages_of_freed_activations_are_kept_and_given_back_when_asked() -> None:
    def run(how: str) -> list[str]:
        return subprocess.run(
            [sys.executable, "-c", WORK, how], capture_output=True, text=True, check=True
        ).stdout.split("\n")

    plain, kept = run("plain"), run("kept")
    assert kept[0] == "glibc, pages kept"
    assert int(plain[0]) > 10 * max(1, int(kept[1]))
    assert int(kept[2]) > 100 * 2**20
    assert int(plain[1]) < 20 * 2**20


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "1"),
        ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
        ("LD_PRELOAD", "/usr/lib/libjemalloc.so.2"),
    ],
)
@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
def test_an_allocator_that_the_user_arranged_is_left_alone(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    choice = allocator.keep_pages("cpu")
    assert choice.value == "as it is"
    assert name in choice.reason


def test_other_systems_and_gpus_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert allocator.keep_pages("cuda").value == "as it is"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "not glibc" in allocator.keep_pages("cpu").reason
    assert allocator.trim() is False
