"""Devices by name, as datasheets and public reports describe them.

Memory is what a process can really take: PyTorch's `total_memory`, which drivers keep some hundred
MiB below the label. Rates are a datasheet's for dense matrices (NVIDIA prints twice of that, "with
sparsity", for most formats) and are reached by nobody: whoever predicts time with them says so.

Of some devices only the memory is known. They are planned for memory alone: the format that they
are taken to compute in is said, and no time is predicted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lighten.machine.hardware import (
    Choice,
    choose_dtype,
    dtype_of_gpu,
    formats,
    formats_of_gpu,
)

GIB, MIB = 2**30, 2**20
T = 1e12


@dataclass(frozen=True)
class Device:
    """One device that a run could be planned for.

    Attributes:
        name: What to call it: `t4`, `a100-80`, `cpu`.
        label: Its full name.
        kind: `cuda` or `cpu`, as PyTorch calls what a run would compute on: an AMD card is `cuda`,
            and on a Mac a run computes on the processor.
        memory_bytes: What a process can take; None where that is not known.
        bandwidth: Of its memory, in bytes per second; None: not known, or to be measured here.
        flops: Dense matrix products by format, in operations per second; empty: not known, or to
            be measured here.
        capability: Compute capability, as PyTorch gives it.
        host_link: To main memory, bytes per second one way.
        peer_link: To another such device of the same node, bytes per second one way: NVLink where
            it has it, else the same PCIe.
        node_link: To a device of another node, bytes per second one way, as commonly rented.
        source: Where the figures come from.
        driver_words: Words of the driver's name for it that tell it from others.
    """

    name: str
    label: str
    kind: Literal["cuda", "cpu"]
    memory_bytes: int | None
    bandwidth: float | None = None
    flops: Mapping[str, float] = field(default_factory=dict)
    capability: tuple[int, int] | None = None
    host_link: float | None = None
    peer_link: float | None = None
    node_link: float | None = None
    source: str = ""
    driver_words: tuple[str, ...] = ()

    @property
    def is_here(self) -> bool:
        """Whether it is this machine's, so that what is not known of it can be measured."""
        return self.name in ("cpu", "cuda")

    @property
    def memory_alone(self) -> bool:
        """Whether neither datasheet nor measurement tells how fast it is."""
        return not self.is_here and not self.flops

    @property
    def formats(self) -> Mapping[str, str]:
        """Number formats that it computes in, each with a word on how well."""
        if self.capability is None:
            return formats("cpu") if self.is_here else {"float32": "assumed"}
        return formats_of_gpu(self.capability)

    def dtype(self, requested: str = "auto") -> Choice:
        """The format of the frozen base on this device, with the reason.

        Args:
            requested: `auto`, or the format by name.
        """
        if requested != "auto" or (self.capability is None and self.is_here):
            return choose_dtype(requested, self.kind)
        if self.capability is None:
            return Choice("float32", f"assumed: of {self.name} only the memory is known")
        return dtype_of_gpu(self.capability)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def _nvidia(
    name: str, label: str, gib: float, bandwidth: float, capability: tuple[int, int],
    flops: Mapping[str, float], source: str, words: tuple[str, ...], *, pcie: float,
    nvlink: float | None = None, network: float = 100e9 / 8,
) -> Device:  # fmt: skip
    return Device(
        name, label, "cuda", int(gib * GIB), bandwidth, {k: v * T for k, v in flops.items()},
        capability, pcie, nvlink or pcie, network, source, words,
    )  # fmt: skip


# PCIe ×16, one way, before its protocol's share: generation 3, 4 and 5.
_GEN3, _GEN4, _GEN5 = 16e9, 32e9, 64e9
# Memory: under Linux a driver keeps 380 to 450 MiB of a Turing, Ampere or Ada card to itself, 460
# to 500 of a Blackwell card, 570 where a card has 48 GB; under Windows next to nothing. These are
# figures under Linux, the lowest that public reports state ("total capacity" of PyTorch, "Max
# memory" of Unsloth, "VRAM" of llama.cpp); where there is none under recent drivers, what
# `nvidia-smi` states as the total less the most that is kept.
_REPORTED, _DERIVED = "public reports", "nvidia-smi's total less what the driver keeps of others"
# Links between nodes: 100 Gbit/s Ethernet where clouds rent nothing more for the card, one
# InfiniBand port per GPU in DGX systems.
_LIST = (
    _nvidia(
        "v100-16", "NVIDIA V100 16GB", 15.77, 900e9, (7, 0), {"float32": 15.7, "float16": 125},
        "NVIDIA V100 datasheet (nvidia.com/en-us/data-center/v100), SXM2; no bfloat16, and no "
        "PyTorch for CUDA 13", ("v100-sxm2-16gb",), pcie=_GEN3, nvlink=150e9,
    ),
    _nvidia(
        "v100-32", "NVIDIA V100 32GB", 31.73, 900e9, (7, 0), {"float32": 15.7, "float16": 125},
        "NVIDIA V100 datasheet (nvidia.com/en-us/data-center/v100), SXM2; no bfloat16, and no "
        "PyTorch for CUDA 13", ("v100-sxm2-32gb",), pcie=_GEN3, nvlink=150e9,
    ),
    _nvidia(
        "t4", "NVIDIA T4", 14.56, 320e9, (7, 5),
        {"float32": 8.1, "float16": 65, "int8": 130},
        "NVIDIA T4 datasheet (nvidia.com/en-us/data-center/tesla-t4); no bfloat16",
        ("tesla t4",), pcie=_GEN3,
    ),
    _nvidia(
        "l4", "NVIDIA L4", 22.03, 300e9, (8, 9),
        {"float32": 30.3, "tf32": 60, "bfloat16": 121, "float16": 121, "int8": 242,
         "float8": 242},
        "NVIDIA L4 datasheet (nvidia.com/en-us/data-center/l4), halved to dense",
        ("nvidia l4",), pcie=_GEN4,
    ),
    _nvidia(
        "l40s", "NVIDIA L40S", 44.39, 864e9, (8, 9),
        {"float32": 91.6, "tf32": 183, "bfloat16": 362, "float16": 362, "int8": 733,
         "float8": 733},
        "NVIDIA L40S datasheet (nvidia.com/en-us/data-center/l40s), halved to dense",
        ("l40s",), pcie=_GEN4,
    ),
    _nvidia(
        "a10", "NVIDIA A10", 22.06, 600e9, (8, 6),
        {"float32": 31.2, "tf32": 62.5, "bfloat16": 125, "float16": 125, "int8": 250},
        "NVIDIA A10 datasheet (nvidia.com/en-us/data-center/products/a10-gpu)",
        ("nvidia a10",), pcie=_GEN4,
    ),
    _nvidia(
        "a10g", "NVIDIA A10G", 22.06, 600e9, (8, 6),
        {"float32": 31.5, "tf32": 35, "bfloat16": 70, "float16": 70, "int8": 140},
        "NVIDIA A10G datasheet (of AWS's G5 instances): less of a tensor unit than an A10",
        ("a10g",), pcie=_GEN4,
    ),
    _nvidia(
        "a30", "NVIDIA A30", 23.53, 933e9, (8, 0),
        {"float32": 10.3, "tf32": 82, "bfloat16": 165, "float16": 165, "int8": 330},
        "NVIDIA A30 datasheet (nvidia.com/en-us/data-center/products/a30-gpu)",
        ("nvidia a30",), pcie=_GEN4, nvlink=100e9,
    ),
    _nvidia(
        "a40", "NVIDIA A40", 44.43, 696e9, (8, 6),
        {"float32": 37.4, "tf32": 74.8, "bfloat16": 149.7, "float16": 149.7, "int8": 299.3},
        "NVIDIA A40 datasheet (nvidia.com/en-us/data-center/a40); memory: as an RTX 6000 Ada's of "
        "the same size", ("nvidia a40",), pcie=_GEN4, nvlink=56.25e9,
    ),
    _nvidia(
        "a4000", "NVIDIA RTX A4000", 15.61, 448e9, (8, 6),
        {"float32": 19.2, "tf32": 38.3, "bfloat16": 76.7, "float16": 76.7, "int8": 153.4},
        "NVIDIA RTX A4000 datasheet, halved to dense", ("rtx a4000",), pcie=_GEN4,
    ),
    _nvidia(
        "a5000", "NVIDIA RTX A5000", 23.55, 768e9, (8, 6),
        {"float32": 27.8, "tf32": 55.6, "bfloat16": 111.1, "float16": 111.1, "int8": 222.2},
        f"NVIDIA RTX A5000 datasheet, halved to dense; memory: {_DERIVED}",
        ("rtx a5000",), pcie=_GEN4, nvlink=56.25e9,
    ),
    _nvidia(
        "a6000", "NVIDIA RTX A6000", 47.43, 768e9, (8, 6),
        {"float32": 38.7, "tf32": 77.4, "bfloat16": 154.8, "float16": 154.8, "int8": 309.7},
        f"NVIDIA GA102 whitepaper v2, RTX A6000; memory: {_DERIVED}",
        ("rtx a6000",), pcie=_GEN4, nvlink=56.25e9,
    ),
    _nvidia(
        "rtx6000ada", "NVIDIA RTX 6000 Ada", 44.43, 960e9, (8, 9),
        {"float32": 91.1, "tf32": 182.1, "bfloat16": 364.2, "float16": 364.2, "int8": 728.5,
         "float8": 728.5},
        "NVIDIA RTX 6000 Ada datasheet, halved to dense; memory: with error correction, 3 GiB more "
        "without", ("rtx 6000 ada",), pcie=_GEN4,
    ),
    _nvidia(
        "rtxpro6000", "NVIDIA RTX PRO 6000", 94.97, 1792e9, (12, 0),
        {"float32": 125, "tf32": 250, "bfloat16": 500, "float16": 500, "int8": 1000,
         "float8": 1000},
        "NVIDIA RTX PRO 6000 Blackwell Workstation datasheet: an eighth of what it gives for "
        "sparse 4 bits", ("rtx pro 6000 blackwell workstation",), pcie=_GEN5,
    ),
    _nvidia(
        "a100-40", "NVIDIA A100 40GB", 39.38, 1555e9, (8, 0),
        {"float32": 19.5, "tf32": 156, "bfloat16": 312, "float16": 312, "int8": 624},
        "NVIDIA A100 datasheet (nvidia.com/en-us/data-center/a100), SXM",
        ("a100-sxm4-40gb", "a100-pcie-40gb"), pcie=_GEN4, nvlink=300e9, network=200e9 / 8,
    ),
    _nvidia(
        "a100-80", "NVIDIA A100 80GB", 79.14, 2039e9, (8, 0),
        {"float32": 19.5, "tf32": 156, "bfloat16": 312, "float16": 312, "int8": 624},
        "NVIDIA A100 datasheet (nvidia.com/en-us/data-center/a100), SXM",
        ("a100-sxm4-80gb", "a100 80gb"), pcie=_GEN4, nvlink=300e9, network=200e9 / 8,
    ),
    _nvidia(
        "h100", "NVIDIA H100 80GB", 79.10, 3350e9, (9, 0),
        {"float32": 67, "tf32": 494.5, "bfloat16": 989.5, "float16": 989.5, "int8": 1979,
         "float8": 1979},
        "NVIDIA H100 datasheet (nvidia.com/en-us/data-center/h100), SXM, halved to dense",
        ("h100 80gb",), pcie=_GEN5, nvlink=450e9, network=400e9 / 8,
    ),
    _nvidia(
        "h200", "NVIDIA H200", 139.80, 4800e9, (9, 0),
        {"float32": 67, "tf32": 494.5, "bfloat16": 989.5, "float16": 989.5, "int8": 1979,
         "float8": 1979},
        "NVIDIA H200 datasheet (nvidia.com/en-us/data-center/h200), SXM, halved to dense",
        ("h200",), pcie=_GEN5, nvlink=450e9, network=400e9 / 8,
    ),
    _nvidia(
        "b200", "NVIDIA B200", 178.35, 7672e9, (10, 0),
        {"float32": 75, "tf32": 1100, "bfloat16": 2250, "float16": 2250, "int8": 4500,
         "float8": 4500},
        "NVIDIA HGX B200 datasheet (nvidia.com/en-us/data-center/hgx), an eighth, halved to dense",
        ("b200",), pcie=_GEN5, nvlink=900e9, network=400e9 / 8,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class _Generation:
    """Of GeForce cards: what each of their multiprocessors computes.

    Attributes:
        sheet: NVIDIA's document of its rates.
        capability: Compute capability.
        cores: Of a multiprocessor, each a product and a sum in float32 per clock.
        times: Rates of other formats, as multiples of that, sums in float32.
        pcie: Bytes per second one way of 16 lanes.
    """

    sheet: str
    capability: tuple[int, int]
    cores: int
    times: Mapping[str, int]
    pcie: float


_GENERATIONS = {
    "RTX 2": _Generation("Turing whitepaper, appendix A", (7, 5), 64,
                         {"float16": 4, "int8": 16}, _GEN3),
    "RTX 3": _Generation("GA102 whitepaper v2, table 9", (8, 6), 128,
                         {"tf32": 1, "bfloat16": 2, "float16": 2, "int8": 8}, _GEN4),
    "RTX 4": _Generation("Ada whitepaper v2, appendix A", (8, 9), 128,
                         {"tf32": 1, "bfloat16": 2, "float16": 2, "int8": 8, "float8": 4}, _GEN4),
    "RTX 5": _Generation("RTX Blackwell whitepaper, appendix A", (12, 0), 128,
                         {"tf32": 1, "bfloat16": 2, "float16": 2, "int8": 8, "float8": 4}, _GEN5),
}  # fmt: skip


def _geforce(
    name: str, label: str, gib: float, processors: int, ghz: float, bandwidth: float,
    memory_from: str, *, lanes: int = 16,
) -> Device:  # fmt: skip
    """A GeForce card: rates of its multiprocessors.

    Args:
        name: As of a device.
        label: As of a device.
        gib: What a process can take.
        processors: Streaming multiprocessors.
        ghz: Boost clock.
        bandwidth: Of its memory, bytes per second.
        memory_from: Where the memory comes from.
        lanes: Of PCIe.
    """
    generation = _GENERATIONS[label[:5]]
    rate = processors * ghz / 1e3 * 2 * generation.cores  # TFLOP/s
    rates = {"float32": rate, **{dtype: n * rate for dtype, n in generation.times.items()}}
    return _nvidia(
        name, f"NVIDIA GeForce {label}", gib, bandwidth, generation.capability, rates,
        f"NVIDIA {generation.sheet}: rates per multiprocessor, {processors} of them at {ghz} GHz, "
        f"float32 sums; memory: {memory_from}",
        (re.sub(r" \d+GB$", "", label).lower(),), pcie=generation.pcie * lanes / 16,
    )  # fmt: skip


_GEFORCE = (
    _geforce("rtx2060", "RTX 2060", 5.56, 30, 1.68, 336e9, _DERIVED),
    _geforce("rtx2070", "RTX 2070", 7.56, 36, 1.62, 448e9, _DERIVED),
    _geforce("rtx2070super", "RTX 2070 SUPER", 7.56, 40, 1.77, 448e9, _DERIVED),
    _geforce("rtx2080", "RTX 2080", 7.56, 46, 1.71, 448e9, _DERIVED),
    _geforce("rtx2080super", "RTX 2080 SUPER", 7.56, 48, 1.815, 496e9, _DERIVED),
    _geforce("rtx2080ti", "RTX 2080 Ti", 10.56, 68, 1.545, 616e9, _DERIVED),
    _geforce("rtx3050", "RTX 3050", 7.56, 20, 1.777, 224e9, _DERIVED, lanes=8),
    _geforce("rtx3060", "RTX 3060 12GB", 11.63, 28, 1.777, 360e9, _REPORTED),
    _geforce("rtx3060ti", "RTX 3060 Ti", 7.56, 38, 1.665, 448e9, _DERIVED),
    _geforce("rtx3070", "RTX 3070", 7.56, 46, 1.725, 448e9, _DERIVED),
    _geforce("rtx3070ti", "RTX 3070 Ti", 7.56, 48, 1.77, 608e9, _DERIVED),
    _geforce("rtx3080-10gb", "RTX 3080 10GB", 9.56, 68, 1.71, 760e9, _DERIVED),
    _geforce("rtx3080-12gb", "RTX 3080 12GB", 11.56, 70, 1.71, 912e9, _DERIVED),
    _geforce("rtx3080ti", "RTX 3080 Ti", 11.56, 80, 1.665, 912e9, _DERIVED),
    _geforce("rtx3090", "RTX 3090", 23.56, 82, 1.695, 936e9, _REPORTED),
    _geforce("rtx3090ti", "RTX 3090 Ti", 23.55, 84, 1.86, 1008e9, _DERIVED),
    _geforce("rtx4060", "RTX 4060", 7.60, 24, 2.46, 272e9, _REPORTED, lanes=8),
    _geforce("rtx4060ti-8gb", "RTX 4060 Ti 8GB", 7.56, 34, 2.54, 288e9, _DERIVED, lanes=8),
    _geforce("rtx4060ti-16gb", "RTX 4060 Ti 16GB", 15.57, 34, 2.54, 288e9, _REPORTED, lanes=8),
    _geforce("rtx4070", "RTX 4070", 11.58, 46, 2.48, 504e9, _REPORTED),
    _geforce("rtx4070super", "RTX 4070 SUPER", 11.56, 56, 2.48, 504e9, _DERIVED),
    _geforce("rtx4070ti", "RTX 4070 Ti", 11.56, 60, 2.61, 504e9, _DERIVED),
    _geforce("rtx4070tisuper", "RTX 4070 Ti SUPER", 15.56, 66, 2.61, 672e9, _DERIVED),
    _geforce("rtx4080", "RTX 4080", 15.56, 76, 2.51, 716.8e9, _DERIVED),
    _geforce("rtx4080super", "RTX 4080 SUPER", 15.56, 80, 2.55, 736e9, _REPORTED),
    _geforce("rtx4090", "RTX 4090", 23.52, 128, 2.52, 1008e9, _REPORTED),
    _geforce("rtx5060", "RTX 5060", 7.47, 30, 2.50, 448e9, _DERIVED, lanes=8),
    _geforce("rtx5060ti-8gb", "RTX 5060 Ti 8GB", 7.47, 36, 2.57, 448e9, _DERIVED, lanes=8),
    _geforce("rtx5060ti-16gb", "RTX 5060 Ti 16GB", 15.44, 36, 2.57, 448e9, _REPORTED, lanes=8),
    _geforce("rtx5070", "RTX 5070", 11.45, 48, 2.51, 672e9, _DERIVED),
    _geforce("rtx5070ti", "RTX 5070 Ti", 15.43, 70, 2.45, 896e9, _REPORTED),
    _geforce("rtx5080", "RTX 5080", 15.47, 84, 2.62, 960e9, _REPORTED),
    _geforce("rtx5090", "RTX 5090", 31.34, 170, 2.41, 1792e9, _REPORTED),
)  # fmt: skip


def _laptop(model: str, gib: float, memory_from: str) -> Device:
    """A laptop's GeForce card: its maker chooses power and clocks, so that no rates are known."""
    name = model.lower().replace(" ", "")
    return Device(
        f"{name}-laptop", f"NVIDIA GeForce {model} Laptop GPU", "cuda", int(gib * GIB),
        capability=(8, 9) if model.startswith("RTX 4") else (12, 0),
        source=f"memory: {memory_from}; clocks are the laptop maker's choice",
        driver_words=(f"{model.lower()} laptop",),
    )  # fmt: skip


_LAPTOPS = (
    _laptop("RTX 4060", 7.60, _REPORTED), _laptop("RTX 4070", 7.56, _DERIVED),
    _laptop("RTX 4080", 11.56, _DERIVED), _laptop("RTX 4090", 15.56, _DERIVED),
    _laptop("RTX 5060", 7.47, _DERIVED), _laptop("RTX 5070", 7.47, _DERIVED),
    _laptop("RTX 5070 Ti", 11.45, _DERIVED), _laptop("RTX 5080", 15.47, _REPORTED),
    _laptop("RTX 5090", 23.4, _DERIVED),
)  # fmt: skip

# Of an AMD card's time nothing is said: its kernels are others, and none of it was compared.
_AMD = (
    Device(
        "mi300x", "AMD Instinct MI300X", "cuda", int(191.69 * GIB), capability=(9, 4),
        source="memory: public reports (what PyTorch on ROCm states, 191.69 to 191.98 GiB)",
        driver_words=("mi300x",),
    ),
)  # fmt: skip


def _apple(label_gib: int) -> Device:
    """A Mac by its unified memory, of which a model may have two thirds or three quarters."""
    share = 2 / 3 if label_gib <= 36 else 3 / 4
    return Device(
        f"apple-{label_gib}gb", f"Apple silicon with {label_gib} GB", "cpu",
        int(share * label_gib * GIB),
        source="memory: Metal's recommended working set, as llama.cpp's logs state it (10.67 GiB "
               "of 16, 48 of 64); a run computes on the processor: lighten does not use Metal",
    )  # fmt: skip


_APPLE = tuple(_apple(gib) for gib in (8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512))
DEVICES = {device.name: device for device in (*_LIST, *_GEFORCE, *_LAPTOPS, *_AMD, *_APPLE)}
