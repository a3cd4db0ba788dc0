"""Devices by name: what a datasheet says, and what a process really gets."""

from __future__ import annotations

import pytest

from lighten import devices
from lighten.devices import DEVICES, named
from lighten.errors import UserError

GIB = 2**30


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_every_listed_device_is_whole(device: devices.Device) -> None:
    label_gib = {"t4": 16, "l4": 24, "a10": 24, "rtx3060": 12, "rtx3090": 24, "rtx4090": 24,
                 "a100-40": 40, "a100-80": 80, "h100": 80, "h200": 141}[device.name]  # fmt: skip
    assert device.memory_bytes is not None
    # Less than the label says, and not by much.
    assert 0.88 * label_gib * 1e9 < device.memory_bytes < label_gib * GIB
    assert device.bandwidth is not None
    assert 200e9 < device.bandwidth < 5e12
    assert device.flops["float16"] > device.flops["float32"] > 5e12
    assert device.host_link is not None
    assert device.peer_link is not None
    assert device.host_link <= device.peer_link
    assert "NVIDIA" in device.source


def test_a_t4_has_no_bfloat16_and_an_l4_has() -> None:
    assert "bfloat16" not in named("t4").flops
    assert named("t4").dtype().value == "float16"
    assert "no bfloat16" in named("t4").dtype().reason
    assert named("l4").dtype().value == "bfloat16"
    assert named("l4").formats["float8"] == "yes"
    assert named("a100-40").formats["float8"] == "no"
    assert named("t4").dtype("float32").value == "float32"


def test_names_are_taken_as_people_write_them() -> None:
    names = {"T4": "t4", "RTX 4090": "rtx4090", "rtx_3090": "rtx3090", "A100-80GB": "a100-80",
             "a100": "a100-80", "H100": "h100"}  # fmt: skip
    assert {said: named(said).name for said in names} == names
    with pytest.raises(UserError, match="did you mean rtx4090"):
        named("rtx5090")
    with pytest.raises(UserError, match="known"):
        named("tpu-v5")


def test_the_driver_s_names_lead_to_the_listed_cards() -> None:
    names = {
        "Tesla T4": "t4", "NVIDIA L4": "l4", "NVIDIA A10G": "a10", "NVIDIA H200": "h200",
        "NVIDIA A100-SXM4-80GB": "a100-80", "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA GeForce RTX 4090": "rtx4090", "NVIDIA L40S": None, "NVIDIA RTX A1000": None,
        "NVIDIA GeForce RTX 3060 Ti": None,
    }  # fmt: skip
    assert {said: devices._known(said) for said in names} == names


def test_this_machine_offers_what_is_free() -> None:
    found = named("cpu")
    assert found.kind == "cpu"
    assert found.memory_bytes is not None
    assert GIB / 4 < found.memory_bytes < 2**45
    assert found.flops == {}
    assert found.dtype().value in ("bfloat16", "float32")


def test_a_limit_on_address_space_counts() -> None:
    import subprocess
    import sys

    code = (
        "import resource, psutil\n"
        "from lighten.devices import usable_memory_bytes\n"
        "own = psutil.Process().memory_info()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (own.vms + 2**28, resource.RLIM_INFINITY))\n"
        "room = usable_memory_bytes() - psutil.Process().memory_info().rss\n"
        "assert 2**27 < room <= 2**28, room\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
