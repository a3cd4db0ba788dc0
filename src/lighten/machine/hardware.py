"""Which machine this is, what it computes in, and how much memory a process really took."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from lighten.errors import UserError
from lighten.machine import containers, forks
from lighten.machine.gpu_support import unused_gpu

# Extra of the package by the module that it brings: those that this version uses, no others.
EXTRAS = {
    "bitsandbytes": "quant", "torchao": "quantize", "auto_round": "quantize",
    "gguf": "gguf", "xllamacpp": "gguf", "pyarrow": "parquet",
    "wandb": "track", "tensorboard": "track", "trackio": "track", "optuna": "search", "ray": "ray",
    "executorch": "phone",
    "starlette": "serve", "uvicorn": "serve", "llguidance": "serve", "lm_eval": "lm-eval",
}  # fmt: skip
# Instruction sets with products of the format; the last ones are ARM's.
BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")
# What oneDNN uses at most if `ONEDNN_MAX_CPU_ISA` says so, by how its value begins: the beginnings
# of the instruction sets that it then leaves alone.
ISA_WITHOUT = {
    "SSE41": ("avx", "amx"), "AVX512_CORE_AMX": (), "AVX512_CORE_FP16": ("amx",),
    "AVX512_CORE_BF16": ("amx", "avx512_fp16"),
    "AVX512_CORE": ("amx", "avx512_fp16", "avx512_bf16"), "AVX2": ("amx", "avx512"),
    "AVX": ("amx", "avx512", "avx2"),
}  # fmt: skip
BFLOAT16_UNITS = (8, 0)  # compute capability from which a GPU has them
INT8 = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})
CORE = (
    "lighten", "torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers",
    "pydantic", "sacrebleu", "numpy",
)  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """Something chosen for the machine, and why."""

    value: str
    reason: str


@dataclass(frozen=True)
class Gpu:
    """One accelerator."""

    name: str
    memory_bytes: int
    capability: str

    @property
    def capability_numbers(self) -> tuple[int, int]:
        """Its compute capability, to be compared."""
        major, _, minor = self.capability.partition(".")
        return int(major), int(minor or 0)


@dataclass(frozen=True)
class Machine:
    """This computer.

    Attributes:
        processor: Its name as the system gives it.
        cores: Processor cores this process may use.
        memory_bytes: Main memory, or the container's share of it.
        gpus: CUDA devices.
        system: Operating system and Python.
    """

    processor: str
    cores: int
    memory_bytes: int
    gpus: tuple[Gpu, ...]
    system: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def machine() -> Machine:
    """Look at this computer (imports torch, to see the GPUs)."""
    import torch

    return Machine(
        processor=processor_name(),
        cores=containers.cores(),
        memory_bytes=containers.memory_bytes(),
        gpus=tuple(map(_gpu, range(torch.cuda.device_count()))),
        system=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    )


def _gpu(index: int) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return Gpu(
        properties.name, properties.total_memory, f"{properties.major}.{properties.minor}"
    )  # fmt: skip


def chosen_gpu() -> Gpu | None:
    """The GPU of `choose_device`; None: it is the processor.

    Raises:
        UserError: `LIGHTEN_DEVICE` names none of this machine's.
    """
    import torch

    device = torch.device(choose_device().value)
    if device.type != "cuda":
        return None
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


def choose_device() -> Choice:
    """The device to compute on; `LIGHTEN_DEVICE` overrides.

    A GPU by its number becomes CUDA's current one: PyTorch, Accelerate and every measurement of
    memory mean that where they say `cuda`.

    A container's quota of processor time is no part of what OpenMP looks at: with a thread for each
    core of the host, every one would wait for those that the quota halts. So they are limited here,
    where everything begins that computes, unless `OMP_NUM_THREADS` says how many; ranks share them.

    Raises:
        UserError: `LIGHTEN_DEVICE` names none of this machine's.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > forks.processors():
        torch.set_num_threads(forks.processors())
    if named := os.environ.get("LIGHTEN_DEVICE"):
        return Choice(_use(named), "LIGHTEN_DEVICE says so")
    if (why := unused_gpu()) is not None:
        return Choice("cpu", why)
    if torch.cuda.is_available():
        return Choice("cuda", f"{torch.cuda.get_device_name()} is there")
    return Choice("cpu", "no CUDA device")


def take(kind: str) -> None:
    """Compute on a kind of device in this process: of GPUs on the one that `choose_device` names.

    CUDA's current device is not passed on to other processes, nor to threads.

    Args:
        kind: `cpu`, `cuda`, or a GPU by its number, which says all.

    Raises:
        UserError: `LIGHTEN_DEVICE` names none of this machine's.
    """
    if kind == "cuda":
        choose_device()


def _use(named: str) -> str:
    """Take the named device for everything from here on; its name as PyTorch writes it."""
    import torch

    try:
        device = torch.device(named.strip().lower())
    except RuntimeError as error:
        raise UserError(
            f"LIGHTEN_DEVICE: {named!r} is no device; write cpu, cuda, or a GPU by its number, as "
            "cuda:1"
        ) from error
    if device.type == "cpu":
        return "cpu"
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if count <= (device.index or 0):
            available = "no CUDA device" if count == 0 else f"cuda:0 to cuda:{count - 1} alone"
            raise UserError(f"LIGHTEN_DEVICE: {named} is not there; this machine has {available}")
        if device.index is not None:
            torch.cuda.set_device(device)
    return str(device)


def choose_dtype(requested: str, device: str) -> Choice:
    """The format of the frozen base, with the reason.

    Args:
        requested: `auto`, or the format by name.
        device: `cpu` or a CUDA device.
    """
    if requested != "auto":
        return Choice(requested, "dtype of the recipe")
    if device.startswith("cuda"):
        import torch

        return dtype_of_gpu(torch.cuda.get_device_capability(torch.device(device)))
    flags = processor_flags()
    for flag in BFLOAT16:
        if flag in flags:
            return Choice("bfloat16", f"the processor computes in bfloat16 ({flag})")
    return Choice("float32", "the processor has no bfloat16 arithmetic")


def dtype_of_gpu(capability: tuple[int, int]) -> Choice:
    """What `auto` means on a GPU of this compute capability."""
    number, has = ".".join(map(str, capability)), capability >= BFLOAT16_UNITS
    return Choice(
        "bfloat16" if has else "float16",
        f"compute capability {number} has {'' if has else 'no '}bfloat16 units",
    )


def slow_format(
    requested: str, formats: Mapping[str, str], name: str, device_type: str
) -> str | None:
    """Why another format would be much faster than the one a recipe names, or None.

    Args:
        requested: `auto`, or the format by name.
        formats: Of the device, as `formats` gives them.
        name: What to call the device.
        device_type: `cpu` or `cuda`.
    """
    if not formats.get(requested, "").startswith("emulated"):
        return None
    better = "float32" if device_type == "cpu" else "float16"
    return (
        f"dtype: {requested} is not computed by {name} itself but emulated, which takes several "
        f"times as long; {better} is faster: --dtype {better} (or auto, which looks at the machine)"
    )


def processor_flags() -> frozenset[str]:
    """Instruction sets of the processor, as Linux lists them (ARM: Features); empty elsewhere.

    Those that `ONEDNN_MAX_CPU_ISA` keeps PyTorch's products from using are left out.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    without = next((prefixes for isa, prefixes in ISA_WITHOUT.items() if limit.startswith(isa)), ())
    for line in lines:
        if line.startswith(("flags", "Features")):
            every = line.partition(":")[2].split()
            return frozenset(flag for flag in every if not flag.startswith(without))
    return frozenset()


def processor_name() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Version of each core package."""
    return {name: version for name in CORE if (version := version_of(name)) is not None}


@functools.cache  # reading it takes milliseconds, and every result file wants ten of them
def version_of(name: str) -> str | None:
    """Version of an installed package; None where it is not installed."""
    try:
        return importlib.metadata.version(name.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return None


def cache_folder() -> Path:
    """Where models, kernels and rates are kept: `LIGHTEN_CACHE`, else `~/.cache/lighten`."""
    named = os.environ.get("LIGHTEN_CACHE")
    folder = Path(named).expanduser() if named else Path.home() / ".cache" / "lighten"
    return folder.absolute()  # compilers work in another folder


def commit() -> tuple[str | None, bool | None]:
    """Commit of the checkout that this package runs from, and whether its tree is clean."""
    where = Path(__file__).parents[1]  # the package's folder
    if not any((parent / "pyproject.toml").is_file() for parent in where.parents[:2]):
        return None, None  # installed into an environment that lies in somebody else's checkout
    try:
        status = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(where), "status", "--porcelain", "--branch",
             "--untracked-files=no"],
            capture_output=True, text=True, check=True, timeout=10,
        ).stdout.splitlines()  # fmt: skip
        head = subprocess.run(
            ["git", "-C", str(where), "rev-parse", "HEAD"],
            capture_output=True, text=True, check=True, timeout=10,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None, None
    return head, len(status) <= 1


def doctor() -> dict[str, Any]:
    """What `lighten doctor` shows: machine, formats, versions, extras and how to get the rest."""
    device = choose_device()
    dtype = choose_dtype("auto", device.value)
    extras: dict[str, dict[str, Any]] = {}
    for module, extra in EXTRAS.items():
        entry = extras.setdefault(
            extra, {"installed": {}, "missing": [], "install": f"pip install 'lighten[{extra}]'"}
        )
        if importlib.util.find_spec(module) is None:
            entry["missing"].append(module)
        else:
            entry["installed"][module] = version_of(module)
    return {
        "machine": machine().to_dict(),
        "device": asdict(device),
        "dtype": asdict(dtype),
        "free_memory_bytes": containers.free_memory_bytes(),
        "free_disk_bytes": psutil.disk_usage(".").free,
        "formats": formats(device.value),
        "versions": versions(),
        "extras": extras,
    }


def formats(device: str) -> Mapping[str, str]:
    """Which number formats the device computes in, each with a word on how well."""
    if device.startswith("cuda"):
        import torch

        return formats_of_gpu(torch.cuda.get_device_capability(torch.device(device)))
    flags = processor_flags()
    native = not flags.isdisjoint(BFLOAT16)
    return {
        "float32": "yes",
        "bfloat16": "yes" if native else "emulated, slow",
        "float16": "yes" if flags & {"avx512_fp16", "asimdhp"} else "emulated, slow",
        "int8": "yes" if flags & INT8 else "emulated, slow",
    }


def formats_of_gpu(capability: tuple[int, int]) -> Mapping[str, str]:
    """`formats` of a GPU of this compute capability."""
    return {
        "float32": "yes",
        "float16": "yes",
        "bfloat16": "yes" if capability >= BFLOAT16_UNITS else "emulated, slow",
        "float8": "yes" if capability >= (8, 9) else "no",
    }


class PeakMemory:
    """Peak memory above what the process held when this was made.

    On a CPU it is the resident set: the kernel's own high-water mark where it can be reset
    (Linux, `/proc/self/clear_refs`), else samples every few milliseconds, which may miss a short
    peak. On a GPU it is the allocator's `max_memory_allocated` and `max_memory_reserved`.

    Args:
        device: `cpu` or a CUDA device.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._highest = self._earlier = self._beside = 0
        self._sampler: threading.Thread | None = None
        if device.startswith("cuda"):
            import torch

            torch.cuda.reset_peak_memory_stats()
            self._base, self.method = 0, "cuda allocator"
        else:
            self.method = "kernel high-water mark" if _reset_high_water() else "samples of 5 ms"
            self._base = psutil.Process().memory_info().rss
            if self.method.startswith("samples"):
                self._sampler = threading.Thread(
                    target=_sample, args=(weakref.ref(self),), daemon=True
                )
                self._sampler.start()

    def restart(self) -> None:
        """Forget the peak so far; what the process held at first stays the baseline."""
        self._earlier = self._beside = 0
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.reset_peak_memory_stats()
        elif self._sampler is None:
            _reset_high_water()
        else:
            self._highest = 0

    def beside(self, held: int) -> None:
        """Other processes of the run held this much at most, beside what they share with this one.

        It is added to this process's own peak since it was last 0.

        Args:
            held: In bytes; 0: there are none (any more).
        """
        if self.device.startswith("cuda") or bool(held) == bool(self._beside):
            self._beside = max(held, self._beside)
            return
        before = self._earlier, self._together()
        self.restart()
        self._earlier, self._beside = max(before), held

    def read(self) -> dict[str, Any]:
        """`peak_bytes` since the start and how it was measured; on a GPU `reserved_bytes` too."""
        if self.device.startswith("cuda"):
            import torch

            return {
                "peak_bytes": torch.cuda.max_memory_allocated(),
                "reserved_bytes": torch.cuda.max_memory_reserved(),
                "method": self.method,
            }
        highest = max(self._earlier, self._together())
        return {"peak_bytes": max(0, highest - self._base), "method": self.method}

    def _together(self) -> int:
        return self._beside + (self._highest if self._sampler else high_water())

    def _note(self, held: int) -> None:
        self._highest = max(self._highest, held)


def _sample(measurement: weakref.ref[PeakMemory]) -> None:
    """Look every few milliseconds for as long as somebody holds the measurement."""
    process = psutil.Process()
    while (peak := measurement()) is not None:
        peak._note(process.memory_info().rss)
        del peak
        time.sleep(0.005)


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return high_water() > 0


def high_water() -> int:
    """The most that this process held since that was reset: Linux's VmHWM in bytes, else 0."""
    try:
        # Bytes: the process's name is there, too, which may be a script's in any script.
        for line in Path("/proc/self/status").read_bytes().splitlines():
            if line.startswith(b"VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
