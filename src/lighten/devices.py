"""Which device to plan for: a named one, by its datasheet, or this machine.

Memory is what a process can really take: PyTorch's `total_memory`, which drivers keep some hundred
MiB below the label. Rates are a datasheet's for dense matrices (NVIDIA prints twice of that, "with
sparsity", for most formats) and are reached by nobody: whoever predicts time with them says so.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import psutil

from lighten import containers
from lighten.errors import UserError
from lighten.hardware import Choice, choose_device, choose_dtype, formats

GIB = 2**30
T = 1e12
Format = Literal["float32", "tf32", "bfloat16", "float16", "int8", "float8"]


@dataclass(frozen=True)
class Device:
    """One device that a run could be planned for.

    Attributes:
        name: What to call it: `t4`, `a100-80`, `cpu`.
        label: Its full name.
        kind: `cuda` or `cpu`.
        memory_bytes: What a process can take; None where that is not known.
        bandwidth: Of its memory, in bytes per second; None where it has to be measured.
        flops: Dense matrix products by format, in operations per second; empty: to be measured.
        capability: CUDA's compute capability.
        host_link: To main memory, bytes per second one way.
        peer_link: To another such device of the same node, bytes per second one way: NVLink where
            it has it, else the same PCIe.
        node_link: To a device of another node, bytes per second one way, as commonly rented.
        source: Where the figures come from.
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

    @property
    def formats(self) -> Mapping[str, str]:
        """Number formats that it computes in, each with a word on how well."""
        if self.capability is None:
            return formats("cpu")
        return {
            "float32": "yes",
            "float16": "yes",
            "bfloat16": "yes" if self.capability >= (8, 0) else "emulated, slow",
            "float8": "yes" if self.capability >= (8, 9) else "no",
        }

    def dtype(self, requested: str = "auto") -> Choice:
        """The format of the frozen base on this device, with the reason.

        Args:
            requested: `auto`, or the format by name.
        """
        if requested != "auto" or self.capability is None:
            return choose_dtype(requested, self.kind)
        has = self.capability >= (8, 0)
        said = ".".join(map(str, self.capability))
        return Choice(
            "bfloat16" if has else "float16",
            f"compute capability {said} has {'' if has else 'no '}bfloat16 units",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def _nvidia(
    name: str, label: str, gib: float, bandwidth: float, capability: tuple[int, int],
    flops: Mapping[str, float], source: str, *, pcie: float, nvlink: float | None = None,
    network: float = 100e9 / 8,
) -> Device:  # fmt: skip
    return Device(
        name, label, "cuda", int(gib * GIB), bandwidth, {k: v * T for k, v in flops.items()},
        capability, pcie, nvlink or pcie, network, source,
    )  # fmt: skip


# PCIe ×16, one way, before its protocol's share: generation 3, 4 and 5.
_GEN3, _GEN4, _GEN5 = 16e9, 32e9, 64e9
# Memory: the "total capacity" that PyTorch's out-of-memory messages state for the card under
# recent drivers, the lowest of those found in public issues. Links between nodes: 100 Gbit/s
# Ethernet where clouds rent nothing more for the card, one InfiniBand port per GPU in DGX systems.
_LIST = (
    _nvidia(
        "t4", "NVIDIA T4", 14.56, 320e9, (7, 5),
        {"float32": 8.1, "float16": 65, "int8": 130},
        "NVIDIA T4 datasheet (nvidia.com/en-us/data-center/tesla-t4); no bfloat16", pcie=_GEN3,
    ),
    _nvidia(
        "l4", "NVIDIA L4", 22.03, 300e9, (8, 9),
        {"float32": 30.3, "tf32": 60, "bfloat16": 121, "float16": 121, "int8": 242,
         "float8": 242},
        "NVIDIA L4 datasheet (nvidia.com/en-us/data-center/l4), halved to dense", pcie=_GEN4,
    ),
    _nvidia(
        "a10", "NVIDIA A10", 22.06, 600e9, (8, 6),
        {"float32": 31.2, "tf32": 62.5, "bfloat16": 125, "float16": 125, "int8": 250},
        "NVIDIA A10 datasheet (nvidia.com/en-us/data-center/products/a10-gpu)", pcie=_GEN4,
    ),
    _nvidia(
        "rtx3060", "NVIDIA GeForce RTX 3060 12GB", 11.63, 360e9, (8, 6),
        {"float32": 12.7, "tf32": 12.7, "bfloat16": 25.5, "float16": 25.5, "int8": 102},
        "NVIDIA GA102 whitepaper's rates per multiprocessor, 28 of them at 1.78 GHz, float32 sums",
        pcie=_GEN4,
    ),
    _nvidia(
        "rtx3090", "NVIDIA GeForce RTX 3090", 23.56, 936e9, (8, 6),
        {"float32": 35.6, "tf32": 35.6, "bfloat16": 71, "float16": 71, "int8": 284},
        "NVIDIA GA102 whitepaper v2, table 9, float32 sums", pcie=_GEN4,
    ),
    _nvidia(
        "rtx4090", "NVIDIA GeForce RTX 4090", 23.52, 1008e9, (8, 9),
        {"float32": 82.6, "tf32": 82.6, "bfloat16": 165.2, "float16": 165.2, "int8": 660.6,
         "float8": 330.3},
        "NVIDIA Ada whitepaper v2, appendix A, float32 sums", pcie=_GEN4,
    ),
    _nvidia(
        "a100-40", "NVIDIA A100 40GB", 39.38, 1555e9, (8, 0),
        {"float32": 19.5, "tf32": 156, "bfloat16": 312, "float16": 312, "int8": 624},
        "NVIDIA A100 datasheet (nvidia.com/en-us/data-center/a100), SXM", pcie=_GEN4,
        nvlink=300e9, network=200e9 / 8,
    ),
    _nvidia(
        "a100-80", "NVIDIA A100 80GB", 79.14, 2039e9, (8, 0),
        {"float32": 19.5, "tf32": 156, "bfloat16": 312, "float16": 312, "int8": 624},
        "NVIDIA A100 datasheet (nvidia.com/en-us/data-center/a100), SXM", pcie=_GEN4,
        nvlink=300e9, network=200e9 / 8,
    ),
    _nvidia(
        "h100", "NVIDIA H100 80GB", 79.10, 3350e9, (9, 0),
        {"float32": 67, "tf32": 494.5, "bfloat16": 989.5, "float16": 989.5, "int8": 1979,
         "float8": 1979},
        "NVIDIA H100 datasheet (nvidia.com/en-us/data-center/h100), SXM, halved to dense",
        pcie=_GEN5, nvlink=450e9, network=400e9 / 8,
    ),
    _nvidia(
        "h200", "NVIDIA H200", 139.80, 4800e9, (9, 0),
        {"float32": 67, "tf32": 494.5, "bfloat16": 989.5, "float16": 989.5, "int8": 1979,
         "float8": 1979},
        "NVIDIA H200 datasheet (nvidia.com/en-us/data-center/h200), SXM, halved to dense",
        pcie=_GEN5, nvlink=450e9, network=400e9 / 8,
    ),
)  # fmt: skip
DEVICES = {device.name: device for device in _LIST}
# How the driver calls a listed card, where its label's words do not tell.
_DRIVER_NAMES = {
    "tesla t4": "t4", "a10g": "a10", "a100-sxm4-40gb": "a100-40", "a100-pcie-40gb": "a100-40",
    "a100-sxm4-80gb": "a100-80", "a100 80gb": "a100-80", "h100 80gb": "h100", "h200": "h200",
    "nvidia l4": "l4", "nvidia a10": "a10", "rtx 3060": "rtx3060", "rtx 3090": "rtx3090",
    "rtx 4090": "rtx4090",
}  # fmt: skip


def named(name: str | None = None) -> Device:
    """A device by its name; None or `this`: this machine, on the device a run would choose.

    Raises:
        UserError: No such device.
    """
    wanted = (name or "this").lower().replace("_", "-").replace(" ", "")
    if wanted in ("this", "here", "auto"):
        return here(choose_device().value)
    if wanted == "cpu":
        return here("cpu")
    if wanted in ("cuda", "gpu"):
        return here("cuda")
    for alias in (wanted, wanted.replace("-", ""), wanted.removesuffix("gb"), f"{wanted}-80"):
        if alias in DEVICES:
            return DEVICES[alias]
    near = difflib.get_close_matches(wanted, DEVICES, n=1, cutoff=0.5)
    mend = f"did you mean {near[0]}?" if near else "known"
    raise UserError(f"device: {name!r} is not known; {mend} (this, cpu, {', '.join(DEVICES)})")


def here(kind: str) -> Device:
    """This machine's processor or first GPU, with the memory that is free at this moment.

    Raises:
        UserError: A GPU is asked for and there is none.
    """
    if not kind.startswith("cuda"):
        return Device("cpu", "this machine's processor", "cpu", usable_memory_bytes(),
                      source="this machine")  # fmt: skip
    import torch

    if not torch.cuda.is_available():
        raise UserError("device: this machine has no CUDA device; name one, or use cpu")
    own = torch.cuda.get_device_properties(0)
    free, _ = torch.cuda.mem_get_info(0)
    known = _known(own.name)
    rates = DEVICES[known] if known else None
    return Device(
        "cuda", own.name, "cuda", int(free) + int(torch.cuda.memory_reserved(0)),
        rates.bandwidth if rates else None, rates.flops if rates else {},
        (own.major, own.minor), rates.host_link if rates else None,
        rates.peer_link if rates else None, rates.node_link if rates else None,
        rates.source if rates else "no datasheet of this GPU is listed",
    )  # fmt: skip


def _known(driver_name: str) -> str | None:
    # Whole words, and no relative of the card: an L40S is no L4, a 3060 Ti no 3060.
    said = driver_name.lower()
    for words, name in _DRIVER_NAMES.items():
        if re.search(rf"\b{re.escape(words)}\b(?! (ti|super|laptop|d)\b)", said):
            return name
    return None


def usable_memory_bytes() -> int:
    """Main memory that this process can still take without swapping, with what it holds now.

    A container's limit counts too (cgroup 2 and 1), and so does `ulimit -v`.
    """
    own = psutil.Process().memory_info()
    room = min(containers.free_memory_bytes() + own.rss, containers.memory_bytes())
    return min(room, _address_limit(own.vms) + own.rss)


def _address_limit(taken: int) -> int:
    """Bytes of address space left under `ulimit -v`; more than any machine has where unlimited."""
    if os.name != "posix":
        return 2**62
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return 2**62 if limit == resource.RLIM_INFINITY else max(0, limit - taken)
