"""Cores and memory that a container leaves, read from trees of control groups."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
import torch

from lighten.machine import containers, devices, forks, hardware
from lighten.quantization import llamacpp

GIB = 2**30


@pytest.fixture(autouse=True)
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host has sixteen, whatever this one has."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a fake tree; tests write files into it."""
    root = tmp_path / "cgroup"
    root.mkdir()
    monkeypatch.setattr(containers, "ROOT", root)
    monkeypatch.setattr(containers, "MEMBERSHIP", tmp_path / "membership")
    return root


def member_of(root: Path, *lines: str) -> None:
    (root.parent / "membership").write_text("\n".join(lines) + "\n")


def write_files(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def test_without_control_groups_the_machine_counts(group: Path) -> None:
    assert containers.cores() == 16
    assert containers.memory_limit() is None
    assert containers.memory_bytes() == psutil.virtual_memory().total
    assert containers.free_memory_bytes() > 0


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("200000 100000", 2), ("max 100000", 16), ("50000 100000", 1), ("350000 100000", 3),
     ("25000 10000", 2), ("9900000 100000", 16), ("", 16)],
)  # fmt: skip
def test_a_quota_of_version_2_limits_cores(group: Path, quota: str, cores: int) -> None:
    member_of(group, "0::/")
    write_files(group, cpu__max=quota)
    assert containers.cores() == cores


def test_the_tightest_group_on_the_way_up_counts(group: Path) -> None:
    member_of(group, "0::/kubepods/pod1/main")
    write_files(group / "kubepods", cpu__max="max 100000", memory__max="max")
    write_files(group / "kubepods" / "pod1", cpu__max="400000 100000", memory__max=3 * GIB,
        memory__current=GIB)  # fmt: skip
    write_files(group / "kubepods" / "pod1" / "main", cpu__max="800000 100000", memory__max=8 * GIB,
        memory__current=GIB // 2)  # fmt: skip
    assert containers.cores() == 4
    assert containers.memory_limit() == 3 * GIB
    assert containers.free_memory_bytes() <= 2 * GIB


def test_a_cpuset_limits_cores_in_both_versions(group: Path) -> None:
    member_of(group, "0::/a")
    write_files(group / "a", cpuset__cpus__effective="0-2,8,10-11")
    assert containers.cores() == 6
    write_files(group / "a", cpu__max="200000 100000")
    assert containers.cores() == 2
    member_of(group, "3:cpuset:/b")
    write_files(group / "cpuset" / "b", cpuset__cpus="4-6")
    assert containers.cores() == 3


def test_version_1_with_joint_controllers(group: Path) -> None:
    member_of(group, "4:memory:/docker/abc", "2:cpu,cpuacct:/docker/abc", "0::/")
    write_files(group / "cpu,cpuacct" / "docker" / "abc", cpu__cfs_quota_us=300000,
        cpu__cfs_period_us=100000)  # fmt: skip
    write_files(group / "memory", memory__limit_in_bytes=9223372036854771712)
    write_files(group / "memory" / "docker" / "abc", memory__limit_in_bytes=2 * GIB,
        memory__usage_in_bytes=GIB)  # fmt: skip
    assert containers.cores() == 3
    assert containers.memory_limit() == 2 * GIB
    assert containers.free_memory_bytes() <= GIB


def test_version_1_whose_membership_names_the_hosts_path(group: Path) -> None:
    member_of(group, "4:memory:/docker/abc", "2:cpu:/docker/abc")
    write_files(group / "cpu", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    write_files(group / "memory", memory__limit_in_bytes=GIB, memory__usage_in_bytes=GIB // 4)
    assert containers.cores() == 16
    assert containers.memory_bytes() == GIB
    assert containers.free_memory_bytes() <= 3 * GIB // 4


@pytest.mark.parametrize("of_version", ["", "total_"])
def test_contents_of_files_are_room_those_that_were_read_again_too(
    of_version: str, group: Path
) -> None:
    """Of a model that was loaded twice the kernel calls the pages active."""
    member_of(group, "0::/")
    stat = f"{of_version}inactive_file {GIB // 2}\n{of_version}active_file {GIB // 4}"
    write_files(group, memory__max=GIB, memory__current=GIB, memory__stat=f"anon 5\n{stat}")
    assert containers.free_memory_bytes() == 3 * GIB // 4


def test_everything_that_counts_cores_or_memory_goes_by_them(
    group: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    member_of(group, "0::/")
    write_files(group, cpu__max="300000 100000", memory__max=GIB, memory__current=GIB // 4)
    assert forks.processors() == llamacpp.available_threads() == 3
    machine = hardware.machine()
    assert (machine.cores, machine.memory_bytes) == (3, GIB)
    report = hardware.doctor()
    assert report["machine"]["cores"] == 3
    assert report["free_memory_bytes"] <= 3 * GIB // 4
    # What this process holds already is no room for a model.
    assert devices.usable_memory_bytes() <= 3 * GIB // 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert forks.processors() == 1
    # SLURM's tasks share the node's, unless each is bound to its own.
    monkeypatch.setenv(forks.TRANSLATED, "srun")
    for on_node, share in (("3", 1), ("12", 3)):
        monkeypatch.setenv("SLURM_CPUS_ON_NODE", on_node)
        assert forks.processors() == share


def test_products_use_no_more_threads_than_the_quota_feeds(
    group: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    member_of(group, "0::/")
    write_files(group, cpu__max="200000 100000")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        hardware.choose_device()
        assert torch.get_num_threads() == 5  # OMP_NUM_THREADS says how many
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        hardware.choose_device()
        assert torch.get_num_threads() == 2
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        hardware.choose_device()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
