"""Which device to plan for: a named one, by its datasheet, or this machine."""

from __future__ import annotations

import difflib
import os
import re

import psutil

from lighten.errors import UserError
from lighten.machine import containers
from lighten.machine.datasheets import DEVICES, Device
from lighten.machine.hardware import choose_device

__all__ = ["DEVICES", "Device", "here", "named", "usable_memory_bytes"]


def named(name: str | None = None) -> Device:
    """A device by its name; None or `this`: this machine, on the device a run would choose.

    Raises:
        UserError: No such device.
    """
    query = re.sub(r"[\s_]+", "-", (name or "this").strip().lower())
    query = re.sub(r"(\d)-gb?$", r"\1gb", query)
    if query in ("this", "here", "auto"):
        return here(choose_device().value)
    if query == "cpu":
        return here("cpu")
    if query in ("cuda", "gpu"):
        return here("cuda")
    if (device := _listed(query)) is not None:
        return device
    card = re.sub(r"-\d+gb$", "", query)
    near = difflib.get_close_matches(_plain(card), [*_BY_PLAIN], n=1, cutoff=0.5)
    mend = f"did you mean {_BY_PLAIN[near[0]].name}? " if near else ""
    raise UserError(
        f"device: {name!r} is not known; {mend}lighten plan --help lists the known ones"
    )


def _plain(name: str) -> str:
    """A name as it is compared: without hyphens, maker and family."""
    short = re.sub(r"^(nvidia|amd|geforce|instinct|tesla|rtx|-)+", "", name)
    short = short.replace("-silicon-with", "")
    return re.sub(r"gpu$", "", short.replace("-", ""))


_BY_PLAIN = {_plain(device.name): device for device in DEVICES.values()}
# Chips of Macs, which all give their memory to whoever needs it.
_APPLE_CHIP = re.compile(r"(?:apple)?m\d(?:pro|max|ultra)?(?:(\d+)gb?)?")


def _listed(name: str) -> Device | None:
    """A listed device by what people call it.

    Raises:
        UserError: Its name leaves open how much memory it has.
    """
    plain = _plain(name)
    if plain in _BY_PLAIN:
        return _BY_PLAIN[plain]
    for alias in (plain.removesuffix("gb"), f"{plain}gb", f"{plain}80"):
        device = _BY_PLAIN.get(alias)
        # Where the last digits are a memory: 40 is no RTX 4080.
        if device is not None and re.search(r"-\d+(gb)?$", device.name):
            return device
    if chip := _APPLE_CHIP.fullmatch(plain):
        if chip[1] is None:
            raise UserError(f"device: of {name} only the memory counts; name it: apple-16gb, …")
        return _BY_PLAIN.get(f"apple{chip[1]}gb")
    sizes = [
        device
        for plain_name, device in _BY_PLAIN.items()
        if re.fullmatch(rf"{re.escape(plain)}\d+gb", plain_name)
    ]
    if plain and sizes:
        choices = " or ".join(device.name for device in sizes)
        raise UserError(f"device: {name} is sold with more than one memory; say {choices}")
    # With its memory behind its name, where there is but one: `T4 16GB`.
    if sized := re.fullmatch(r"(.+)-(\d+)gb?", name):
        card = _BY_PLAIN.get(_plain(sized[1]))
        if card and 0.88 < (card.memory_bytes or 0) / (int(sized[2]) * 1e9) < 1.08:
            return card
    return None


def here(device: str) -> Device:
    """This machine's processor or a GPU of it, with the memory that is free at this moment.

    Args:
        device: `cpu`; `cuda`, which is the GPU that `LIGHTEN_DEVICE` names or the first; `cuda:1`.

    Raises:
        UserError: A GPU is asked for and there is none.
    """
    if not device.startswith("cuda"):
        return Device("cpu", "this machine's processor", "cpu", usable_memory_bytes(),
                      source="this machine")  # fmt: skip
    import torch

    if not torch.cuda.is_available():
        raise UserError("device: this machine has no CUDA device; name one, or use cpu")
    gpu = torch.device(device)
    if gpu.index is None:
        # The one that a run takes, or CUDA's current one where the processor shall be used.
        chosen = torch.device(choose_device().value)
        current = torch.cuda.current_device()
        gpu = torch.device("cuda", current if chosen.index is None else chosen.index)
    properties = torch.cuda.get_device_properties(gpu)
    free, _ = torch.cuda.mem_get_info(gpu)
    rates = _listed_by_driver(properties.name, int(properties.total_memory))
    return Device(
        "cuda", properties.name, "cuda", int(free) + int(torch.cuda.memory_reserved(gpu)),
        rates.bandwidth if rates else None, rates.flops if rates else {},
        (properties.major, properties.minor), rates.host_link if rates else None,
        rates.peer_link if rates else None, rates.node_link if rates else None,
        rates.source if rates else "no datasheet of this GPU is listed",
    )  # fmt: skip


def _listed_by_driver(driver_name: str, memory_bytes: int) -> Device | None:
    """The listed device that a driver names; of two that it calls the same, the nearer in memory.

    Whole words, and no relative of the card: an L40S is no L4, a 3060 Ti no 3060, and none of a
    laptop (`with Max-Q Design`) its namesake. A slice of a
    card (MIG) has part of its rates alone, and which part is not known.
    """
    lowered = driver_name.lower()
    if re.search(r"\bmig\b", lowered):
        return None
    candidates = [
        device for device in DEVICES.values()
        if any(re.search(rf"\b{re.escape(words)}\b(?! (ti|super|laptop|d|with max-q)\b)", lowered)
               for words in device.driver_words)
    ]  # fmt: skip
    return min(candidates, key=lambda device: abs((device.memory_bytes or 0) - memory_bytes),
               default=None)  # fmt: skip


def usable_memory_bytes() -> int:
    """Main memory that this process can take without swapping, beside what it holds now.

    A plan counts the same: what comes on top of the process as it was before the model. A
    container's limit counts too (cgroup 2 and 1), and so does `ulimit -v`.
    """
    return min(containers.free_memory_bytes(), _address_limit(psutil.Process().memory_info().vms))


def _address_limit(used_bytes: int) -> int:
    """Bytes of address space left under `ulimit -v`; more than any machine has where unlimited."""
    if os.name != "posix":
        return 2**62
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return 2**62 if limit == resource.RLIM_INFINITY else max(0, limit - used_bytes)
