"""How large what a server holds is, engine by engine: no weight is read, nothing is started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lighten import models
from lighten.errors import UserError
from lighten.generation.segments import numbers_of
from lighten.machine.hardware import Choice, choose_device, choose_dtype
from lighten.models.load import locate
from lighten.models.stored import loaded_bytes, stored_in, written_by_bitsandbytes
from lighten.peft_config import FACTOR, WEIGHTS
from lighten.quantization.gguf_model import plan_gguf
from lighten.quantization.gguf_source import Weight
from lighten.quantization.gguf_source import read_weights as read_headers
from lighten.serving import adapters
from lighten.serving.engine import Adapter
from lighten.serving.engines import choose_here
from lighten.serving.options import (
    STORAGE,
    STORED,
    STORED_BY_VLLM,
    Options,
    context_of,
    require_valid,
)
from lighten.wording import counted

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Sizes:
    """What a server will hold.

    Attributes:
        model: The base, as models are named.
        engine: Which one answers, and why.
        storage: How it holds the base: `q8_0` and others in llama.cpp, bitsandbytes' where it wrote
            the files, else a format of PyTorch's.
        adapters: How many.
        rank: Of the largest adapter; 0: there are none.
        context: Tokens of a prompt with its answer.
        slots: Answers made at the same time.
        base_bytes: Of the base's tensors.
        adapter_bytes: Of all adapters; None: as many as there are, each of `rank` in 16 bits.
        cache_number_bytes: Of one number of the keys and values.
        cache_has_windows: Whether layers with a window keep no more than that.
        device: Where it computes: `cpu`, or `this` for the device that a run would take.
    """

    model: str
    engine: Choice
    storage: str
    adapters: int
    rank: int
    context: int
    slots: int
    base_bytes: int
    adapter_bytes: int | None
    cache_number_bytes: int
    cache_has_windows: bool
    device: str

    def sentence(self) -> str:
        """What is planned for, in words."""
        rank = f" of rank {self.rank} at most" if self.adapters else ""
        return (
            f"engine: {self.engine.value}, {self.engine.reason}; the base as {self.storage}; "
            f"{counted(self.adapters, 'adapter')}{rank}; {counted(self.slots, 'answer')} at once, "
            f"each of {self.context} tokens with its prompt"
        )


def sizes(name: str, options: Options) -> Sizes:
    """What `lighten serve` would hold with these settings.

    Args:
        name: The base, as of `lighten serve`; only its configuration is fetched.
        options: How it is served.

    Raises:
        UserError: It cannot be served so.
    """
    require_valid(options)
    run = adapters.run_of(name)
    if run is not None and run.model() is not None:
        name = str(run.model())
    source, path = locate(name, revision=options.revision, weights=False)
    shape = models.skeleton(name, revision=options.revision)
    folders = adapters.resolve(options.adapters, options.most_adapters)
    served = [Adapter(key, folder) for key, folder in folders.items()]
    engine = choose_here(options, served, shape.config, gguf=source == "gguf", shape=lambda: shape)
    factors = [factor for adapter in served for factor in _factors(adapter.folder)]
    rank = max((ranks for _, ranks, _ in factors), default=0)
    numbers = sum(ranks * columns for _, ranks, columns in factors)
    common: dict[str, Any] = {
        "model": name, "engine": engine, "adapters": len(served), "rank": rank,
        "context": context_of(options, shape.config, name), "slots": options.slots,
    }  # fmt: skip
    if engine.value == "llamacpp":
        base = path.stat().st_size if source == "gguf" else _gguf_bytes(path, shape, options)
        storage = f"the file {path.name}" if source == "gguf" else options.storage
        return Sizes(
            **common, storage=storage, base_bytes=base, adapter_bytes=4 * numbers,
            cache_number_bytes=4 if options.storage == "f32" else 2, cache_has_windows=True,
            device="cpu",
        )  # fmt: skip
    compute = choose_dtype("auto", choose_device().value).value
    held = written_by_bitsandbytes(stored_in(shape.config))
    if engine.value == "vllm":
        storage = STORED_BY_VLLM.get(options.storage, compute)
        return Sizes(
            **common, storage=str(held or storage), adapter_bytes=None,
            base_bytes=loaded_bytes(shape, _BYTES[storage]), cache_number_bytes=_BYTES[storage],
            cache_has_windows=True, device="this",
        )  # fmt: skip
    storage = STORED[options.storage] if options.storage != STORAGE else compute
    if choose_device().value == "cpu":
        numbers = sum(numbers_of(*factor) for factor in factors)
    return Sizes(
        **common, storage=str(held or storage), adapter_bytes=2 * numbers,
        base_bytes=loaded_bytes(shape, _BYTES[storage]), cache_number_bytes=_BYTES[storage],
        cache_has_windows=False, device="this",
    )  # fmt: skip


def _factors(folder: Path) -> list[tuple[str, int, int]]:
    """An adapter's factors: `A` or `B`, and its shape as [r, in] or [r, out]."""
    from safetensors import SafetensorError, safe_open

    shapes = []
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # it is no dictionary
                if (match := FACTOR.match(key)) is not None:
                    rows, columns = file.get_slice(key).get_shape()
                    ranks, others = (rows, columns) if match["factor"] == "A" else (columns, rows)
                    shapes.append((match["factor"], ranks, others))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read: {error}; fetch it again") from error
    return shapes


def _gguf_bytes(folder: Path, shape: Any, options: Options) -> int:
    """Bytes of the base's tensors as llama.cpp holds them."""
    weights: Mapping[str, Weight]
    if any(folder.glob("*.safetensors")):
        weights = read_headers(folder)
    else:
        weights = {
            name: Weight(folder, "BF16", tuple(tensor.shape), 0)
            for name, tensor in shape.state_dict().items()
        }
    return plan_gguf(folder, options.storage, weights=weights).bytes
