"""Devices by name: what a datasheet says, and what a process really gets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from lighten.api import plan_search, recipe_of
from lighten.cli import plan as cli_plan
from lighten.errors import UserError
from lighten.machine import devices, hardware
from lighten.machine.devices import DEVICES, named
from lighten.planning import predict, rates, text

GIB = 2**30


LABELS_GIB = {
    "t4": 16, "l4": 24, "l40s": 48, "a10": 24, "a10g": 24, "rtx3060": 12, "rtx3090": 24,
    "a100-40": 40, "a100-80": 80, "h100": 80, "h200": 141, "b200": 186, "mi300x": 192, "rtx4060": 8,
    "rtx4070": 12, "rtx4070super": 12, "rtx4070ti": 12, "rtx4070tisuper": 16, "rtx4080": 16,
    "rtx4080super": 16, "rtx4090": 24, "rtx5060": 8, "rtx5070": 12, "rtx5070ti": 16,
    "rtx5080": 16, "rtx5090": 32, "rtx4060-laptop": 8, "rtx4070-laptop": 8, "rtx4080-laptop": 12,
    "rtx4090-laptop": 16, "rtx5060-laptop": 8, "rtx5070-laptop": 8, "rtx5070ti-laptop": 12,
    "rtx5080-laptop": 16, "rtx5090-laptop": 24, "v100-16": 16, "v100-32": 32, "a30": 24, "a40": 48,
    "a4000": 16, "a5000": 24, "a6000": 48, "rtx6000ada": 48, "rtxpro6000": 96, "rtx2060": 6,
    "rtx2070": 8, "rtx2070super": 8, "rtx2080": 8, "rtx2080super": 8, "rtx2080ti": 11, "rtx3050": 8,
    "rtx3060ti": 8, "rtx3070": 8, "rtx3070ti": 8, "rtx3080ti": 12, "rtx3090ti": 24,
}  # fmt: skip
TIMED = [device for device in DEVICES.values() if not device.memory_alone]
MEMORY_ALONE = [device for device in DEVICES.values() if device.memory_alone]


def label_gib(device: devices.Device) -> int:
    """Of the box: what is listed above, or what the name says."""
    match = re.search(r"-(\d+)gb$", device.name)
    return LABELS_GIB[device.name] if match is None else int(match[1])


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_every_listed_device_has_less_memory_than_its_label(device: devices.Device) -> None:
    assert device.memory_bytes is not None
    share = device.memory_bytes / (label_gib(device) * GIB)
    least = 0.65 if device.name.startswith("apple") else 0.9
    assert least < share < 1
    assert device.source


@pytest.mark.parametrize("device", TIMED, ids=lambda device: device.name)
def test_a_device_with_rates_has_all_of_them(device: devices.Device) -> None:
    assert device.bandwidth is not None
    assert 200e9 < device.bandwidth < 1e13
    assert device.flops["float16"] > device.flops["float32"] > 5e12
    assert device.host_link is not None
    assert device.peer_link is not None
    assert device.host_link <= device.peer_link
    assert device.capability is not None
    assert ("bfloat16" in device.flops) == (device.capability >= (8, 0))
    assert "NVIDIA" in device.source


def test_rates_by_multiprocessor_are_those_that_datasheets_print() -> None:
    # NVIDIA's whitepapers: float32, float16 with float32 sums, and float8 so, or int8 before Ada.
    printed = {"rtx4090": (82.6, 165.2, 330.3), "rtx4080": (48.7, 97.5, 194.9),
               "rtx5090": (104.8, 209.5, 419.0), "rtx5070ti": (43.9, 87.9, 175.8),
               "rtx2080ti": (13.4, 53.8, 215.2), "rtx2080": (10.1, 40.3, 161.1),
               "rtx3090": (35.6, 71, 284), "rtx3080-10gb": (29.8, 59.5, 238)}  # fmt: skip
    for name, expected in printed.items():
        flops = DEVICES[name].flops
        last = "float8" if "float8" in flops else "int8"
        teraflops = [flops[dtype] / 1e12 for dtype in ("float32", "float16", last)]
        assert teraflops == pytest.approx(expected, rel=5e-3), name


@pytest.mark.parametrize("device", MEMORY_ALONE, ids=lambda device: device.name)
def test_of_a_device_known_for_memory_alone_nothing_is_measured_here(
    device: devices.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "processor_flags", lambda: frozenset({"amx_bf16"}))
    assert not device.is_here
    assert device.flops == {}
    dtype = device.dtype()
    assert dtype.value == ("float32" if device.kind == "cpu" else "bfloat16")
    assert "assumed" in dtype.reason or "compute capability" in dtype.reason
    assert device.dtype("float16").value == "float16"
    assert predict.machine_name(device) is None


@pytest.mark.parametrize("name", ["apple-16gb", "mi300x", "rtx4070-laptop"])
def test_a_plan_for_memory_alone_says_so_and_predicts_no_time(
    name: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates.Measured, "cached", lambda *_: pytest.fail("this machine was timed"))
    recipe = recipe_of(model_name_or_path=str(tiny_folder), dataset="", max_steps=2)
    plan = predict.plan(recipe, named(name), changes=False)
    assert plan.time is None
    assert plan.run_seconds is None
    assert plan.capacity == DEVICES[name].memory_bytes
    assert plan.fits() is True
    assert any("only the memory is known" in note for note in plan.notes)
    assert dict(text.fact_rows(plan)[:8])["time"].startswith("not predicted")
    assert ("assumed" in plan.choices["dtype"]) == (name == "apple-16gb")


def test_a_search_without_times_does_not_speak_of_the_fastest(tiny_folder: Path) -> None:
    outcome, _ = plan_search(model_name_or_path=str(tiny_folder), device="rtx4070-laptop",
                             max_length=32, batch_size=1, gradient_accumulation_steps=1,
                             method="lora")  # fmt: skip
    assert outcome.best is not None
    assert text.best_of(outcome.best) == "the first that fits, as no time is predicted"
    assert [candidate.why for candidate in outcome.tried].count(outcome.best.why) == 1
    assert "fastest" not in outcome.best.why


def test_the_help_lists_every_device() -> None:
    option = get_args(cli_plan._Device)[1]
    assert set(re.findall(r"[\w-]+", option.help)) >= set(DEVICES)


def test_a_t4_has_no_bfloat16_and_an_l4_has() -> None:
    assert "bfloat16" not in named("t4").flops
    assert named("t4").dtype().value == "float16"
    assert "no bfloat16" in named("t4").dtype().reason
    assert named("l4").dtype().value == "bfloat16"
    assert named("l4").formats["float8"] == "yes"
    assert named("a100-40").formats["float8"] == "no"
    assert named("t4").dtype("float32").value == "float32"


def test_names_are_taken_as_people_write_them() -> None:
    names = {
        "T4": "t4", "Tesla T4": "t4", "RTX 4090": "rtx4090", "rtx_3090": "rtx3090",
        "4090": "rtx4090",
        "A100-80GB": "a100-80", "a100-40gb": "a100-40", "a100": "a100-80", "H100": "h100",
        "NVIDIA GeForce RTX 4070 Ti SUPER": "rtx4070tisuper", "rtx4070-ti": "rtx4070ti",
        "RTX 4060 Ti 16GB": "rtx4060ti-16gb", "rtx5060ti-8gb": "rtx5060ti-8gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU": "rtx4090-laptop", "AMD Instinct MI300X": "mi300x",
        "m1-16gb": "apple-16gb", "M4 Pro 24GB": "apple-24gb", "m3-max-64gb": "apple-64gb",
        "apple-32": "apple-32gb", "t4-16gb": "t4", "h200-141gb": "h200", "rtx3060-12gb": "rtx3060",
        "T4 16GB": "t4", "H100 80GB": "h100", "RTX 3060 12GB": "rtx3060", "rtx 4060 8gb": "rtx4060",
        "l4 24gb": "l4", "4090 24gb": "rtx4090", "T4 16 GB": "t4", "A100 80 GB": "a100-80",
        "RTX A6000": "a6000", "A40 48GB": "a40", "RTX 3080 12GB": "rtx3080-12gb",
        "2080Ti": "rtx2080ti", "V100-32GB": "v100-32", "Tesla V100 16GB": "v100-16",
        "RTX 6000 Ada": "rtx6000ada",
    }  # fmt: skip
    assert {spelling: named(spelling).name for spelling in names} == names
    assert {name: named(name).name for name in DEVICES} == {name: name for name in DEVICES}
    labels = {device.label: name for name, device in DEVICES.items()}
    assert {label: named(label).name for label in labels} == labels


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rtx4091", "did you mean rtx4090"),
        ("apple-20gb", "did you mean apple-"),
        ("rtx 4090 48gb", "did you mean rtx4090"),
        ("tpu-v5", "not known"),
        ("rtx4060ti", "rtx4060ti-8gb or rtx4060ti-16gb"),
        ("m2", "apple-16gb"),
        ("rtx", "not known"),
        ("40", "not known"),
        ("rtx40", "not known"),
        ("4080gb", "not known"),
        ("4060 (x", "not known"),
    ],
)
def test_a_name_that_leaves_anything_open_is_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        named(name)


def test_the_driver_s_names_lead_to_the_listed_cards() -> None:
    names = {
        "Tesla T4": "t4", "NVIDIA L4": "l4", "NVIDIA A10G": "a10g", "NVIDIA A10": "a10",
        "NVIDIA H200": "h200",
        "NVIDIA A100-SXM4-80GB": "a100-80", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA B200": "b200",
        "NVIDIA GeForce RTX 4090": "rtx4090", "NVIDIA L40S": "l40s", "NVIDIA L40": None,
        "NVIDIA RTX A1000": None, "NVIDIA GeForce RTX 3060 Ti": "rtx3060ti",
        "Tesla V100-SXM2-32GB": "v100-32", "NVIDIA RTX A6000": "a6000", "NVIDIA A40": "a40",
        "NVIDIA RTX 6000 Ada Generation": "rtx6000ada", "NVIDIA GeForce RTX 3080 Ti": "rtx3080ti",
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": "rtxpro6000",
        "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": None,
        "NVIDIA GeForce RTX 2080 Super with Max-Q Design": None,
        "NVIDIA GeForce RTX 4070": "rtx4070", "NVIDIA GeForce RTX 4070 Ti": "rtx4070ti",
        "NVIDIA GeForce RTX 4070 SUPER": "rtx4070super",
        "NVIDIA GeForce RTX 4070 Ti SUPER": "rtx4070tisuper",
        "NVIDIA GeForce RTX 4070 Laptop GPU": "rtx4070-laptop",
        "NVIDIA GeForce RTX 5070 Ti Laptop GPU": "rtx5070ti-laptop",
        "NVIDIA GeForce RTX 4090 D": None, "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
        "AMD Instinct MI300X": "mi300x",
    }  # fmt: skip
    listed = {driver_name: devices._listed_by_driver(driver_name, 0) for driver_name in names}
    assert {driver_name: device and device.name for driver_name, device in listed.items()} == names


def test_of_two_cards_with_one_name_the_memory_tells() -> None:
    driver_name = "NVIDIA GeForce RTX 4060 Ti"
    for label, name in ((8, "rtx4060ti-8gb"), (16, "rtx4060ti-16gb")):
        device = devices._listed_by_driver(driver_name, int(0.97 * label * GIB))
        assert device is not None
        assert device.name == name


def test_this_machine_offers_what_is_free() -> None:
    device = named("cpu")
    assert device.kind == "cpu"
    assert device.memory_bytes is not None
    assert GIB / 4 < device.memory_bytes < 2**45
    assert device.flops == {}
    assert device.dtype().value in ("bfloat16", "float32")


def test_a_limit_on_address_space_counts() -> None:
    import subprocess
    import sys

    code = (
        "import resource, psutil\n"
        "from lighten.machine.devices import usable_memory_bytes\n"
        "own = psutil.Process().memory_info()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (own.vms + 2**28, resource.RLIM_INFINITY))\n"
        "room = usable_memory_bytes()\n"
        "assert 2**27 < room <= 2**28, room\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
