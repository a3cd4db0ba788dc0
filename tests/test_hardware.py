"""What the machine is said to be, and memory that is really measured."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lighten
from lighten.errors import DiskFull, UserError
from lighten.machine import devices, disk, hardware

MIB = 2**20


def test_a_kept_copy_leaves_room_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = shutil.disk_usage(tmp_path)._replace(free=2**30 + 5)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: left)
    disk.require_cache_room(tmp_path / "not" / "there", 5, "a copy")
    says = rf"a copy needs 1\.07 GB in {tmp_path} and .*; set LIGHTEN_CACHE"
    with pytest.raises(UserError, match=says):
        disk.require_cache_room(tmp_path / "not" / "there", 6, "a copy")
    disk.require_room(tmp_path, 2**30 + 5, "all of it")
    with pytest.raises(DiskFull, match="choose another --output_dir"):
        disk.require_room(tmp_path, 2**30 + 6, "all of it")


def peak_memory_of(mib: int) -> dict[str, float]:
    """Peak memory of a fresh process that takes and frees so much."""
    code = (
        "import json, numpy\n"
        "from lighten.machine.hardware import PeakMemory\n"
        "peak = PeakMemory()\n"
        f"block = numpy.ones({mib} * 2**20, dtype=numpy.uint8) if {mib} else None\n"
        "del block\n"
        "print(json.dumps(peak.read()))\n"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    peaks: dict[str, float] = json.loads(completed.stdout)
    return peaks


def test_trap50_a_known_allocation_is_reported_within_one_percent() -> None:
    for mib in (200, 800):
        assert peak_memory_of(mib)["peak_bytes"] == pytest.approx(mib * MIB, rel=0.01)
    assert peak_memory_of(0)["peak_bytes"] < 2 * MIB


def test_trap50_the_measure_starts_anew() -> None:
    import numpy as np

    block = np.ones(300 * MIB, dtype=np.uint8)
    del block
    peak = hardware.PeakMemory()
    assert peak.read()["peak_bytes"] < 20 * MIB


def test_doctor_is_json_and_names_what_is_missing() -> None:
    report = json.loads(json.dumps(hardware.doctor()))
    assert report["machine"]["cores"] >= 1
    assert report["machine"]["memory_bytes"] > 2**30
    assert report["versions"]["torch"]
    for name, extra in report["extras"].items():
        assert extra["install"] == f"pip install 'lighten[{name}]'"
        assert extra["missing"] or extra["installed"]


def test_a_choice_comes_with_its_reason() -> None:
    auto = hardware.choose_dtype("auto", "cpu")
    assert auto.value in ("bfloat16", "float32")
    assert ("bf16" in auto.reason) == (auto.value == "bfloat16")
    assert hardware.choose_dtype("float16", "cpu").reason == "dtype of the recipe"


def test_the_device_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTEN_DEVICE", "cpu")
    assert hardware.choose_device().reason == "LIGHTEN_DEVICE says so"


@pytest.mark.parametrize("device_name", [" CPU", "cpu:0", "cpu"])
def test_a_devices_name_is_read_as_pytorch_writes_it(
    device_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTEN_DEVICE", device_name)
    assert hardware.choose_device().value == "cpu"


@pytest.mark.parametrize(
    ("device_name", "message"),
    [("gpu", "'gpu' is no device; write cpu, cuda"), ("cuda:x", "is no device"),
     ("cuda:99", "cuda:99 is not there; this machine has"), ("cuda:-1", "is no device")],
)  # fmt: skip
def test_a_device_that_is_not_there_is_told(
    device_name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTEN_DEVICE", device_name)
    with pytest.raises(UserError, match=f"LIGHTEN_DEVICE: .*{message}"):
        hardware.choose_device()


@pytest.mark.gpu
def test_the_named_gpu_is_trained_on_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from lighten.machine import devices

    AcceleratorState._reset_state(reset_partial_state=True)  # of tests on the processor
    last_index = torch.cuda.device_count() - 1
    monkeypatch.setenv("LIGHTEN_DEVICE", f"cuda:{last_index}")
    try:
        assert hardware.choose_device().value == f"cuda:{last_index}"
        assert torch.cuda.current_device() == last_index
        peak = hardware.PeakMemory("cuda")
        block = torch.ones(256 * MIB, dtype=torch.uint8, device=Accelerator().device)
        assert block.device.index == last_index
        assert peak.read()["peak_bytes"] == pytest.approx(256 * MIB, rel=0.01)
        assert devices.here("cuda").label == torch.cuda.get_device_name(last_index)
        assert hardware.formats(f"cuda:{last_index}") == devices.here("cuda").formats
    finally:
        torch.cuda.set_device(0)


@pytest.mark.gpu
def test_trap50_gpu_memory_is_the_allocators() -> None:
    import torch

    peak = hardware.PeakMemory("cuda")
    block = torch.ones(256 * MIB, dtype=torch.uint8, device="cuda")
    assert peak.read()["peak_bytes"] == pytest.approx(256 * MIB, rel=0.01)
    assert peak.read()["reserved_bytes"] >= peak.read()["peak_bytes"]
    del block


@pytest.mark.parametrize(
    ("limit", "removed", "remaining"),
    [
        (
            "AVX2",
            {"avx512f", "avx512_bf16", "amx_bf16", "avx512_vnni"},
            {"avx2", "fma", "avx_vnni"},
        ),
        ("avx2_vnni", {"avx512f", "amx_bf16"}, {"avx2", "avx_vnni"}),
        ("AVX512_CORE", {"avx512_bf16", "amx_bf16"}, {"avx512f", "avx512_vnni"}),
        ("AVX512_CORE_BF16", {"amx_bf16"}, {"avx512_bf16"}),
        ("AVX512_CORE_AMX", set(), {"amx_bf16"}),
        ("", set(), {"amx_bf16", "avx512f"}),
    ],
)
def test_instruction_sets_that_onednn_is_kept_from_are_left_out(
    limit: str, removed: set[str], remaining: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    all_flags = "fma avx avx2 avx_vnni avx512f avx512_vnni avx512_bf16 amx_bf16"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"flags : {all_flags}\n")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    flags = hardware.processor_flags()
    assert remaining <= flags
    assert not removed & flags
    dtype = hardware.choose_dtype("auto", "cpu").value
    assert dtype == ("bfloat16" if {"avx512_bf16", "amx_bf16"} & flags else "float32")


def test_a_format_that_is_emulated_is_warned_of_with_the_better_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hardware, "processor_flags", lambda: frozenset({"avx2"}))
    formats = hardware.formats("cpu")
    warning = hardware.slow_format("bfloat16", formats, "this processor", "cpu")
    assert warning is not None
    assert "--dtype float32" in warning
    for dtype in ("auto", "float32"):
        assert hardware.slow_format(dtype, formats, "this processor", "cpu") is None
    old, new = (devices.named(name).formats for name in ("t4", "l4"))
    assert "--dtype float16" in str(hardware.slow_format("bfloat16", old, "T4", "cuda"))
    assert hardware.slow_format("bfloat16", new, "L4", "cuda") is None


def test_a_checkout_says_its_commit() -> None:
    """Runs and results record it: of the package's checkout, wherever in it the code lies."""
    root = Path(lighten.__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("not a checkout")
    head = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert hardware.commit()[0] == head


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux lists it so")
def test_a_process_may_be_called_anything_and_map_any_file(tmp_path: Path) -> None:
    """Linux cuts a script's name to 15 bytes, here within a sign; the file's is Korean in EUC."""
    script = tmp_path / "a학습시키는중.py"
    script.write_text(
        f"#!{sys.executable}\n"
        "import mmap, os, sys\n"
        f"sys.path.insert(0, {str(Path(lighten.__file__).parents[1])!r})\n"
        f"path = os.path.join({os.fsencode(tmp_path)!r}, b'\\xb0\\xa1.bin')\n"
        "file = open(path, 'w+b')\n"
        "file.write(b'0' * 4096)\n"
        "file.flush()\n"
        "mapped = mmap.mmap(file.fileno(), 4096)\n"
        "name = open('/proc/self/comm', 'rb').read()\n"
        "assert '\\ufffd' in name.decode('utf-8', 'replace'), name\n"
        "from lighten import forked_jobs, job_server\n"
        "from lighten.machine import hardware, heap\n"
        "assert hardware.high_water() > 4096\n"
        "assert forked_jobs._inherited() == forked_jobs._inherited()\n"
        "assert list(job_server._looked_at())\n"
        "heap.drop_mapped_weights()\n",
        encoding="utf-8",
    )
    script.chmod(0o755)
    completed = subprocess.run([script], capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
