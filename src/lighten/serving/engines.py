"""Which engine answers, and why; and each of them over what is served, not started yet."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lighten import models
from lighten.errors import UserError
from lighten.generation.engine import require_taken
from lighten.machine import hardware
from lighten.machine.hardware import Choice, Gpu, cache_folder
from lighten.peft_config import FACTOR, WEIGHTS, tensor_shapes
from lighten.serving import adapters, vllm, wire
from lighten.serving.adapters import Base
from lighten.serving.engine import Adapter, Engine
from lighten.serving.options import ALL_LAYERS, STORAGE, STORED, STORED_BY_VLLM, Options
from lighten.serving.registry import Registry
from lighten.whole_files import scratch_folder

# Of a GPU; older ones vLLM does not compute on (its documentation, "GPU: requirements").
_CAPABILITY_OF_VLLM = (7, 0)


def choose_engine(
    options: Options,
    adapters: Sequence[Adapter],
    *,
    gguf: bool = False,
    tied: bool = False,
    quantized: bool = False,
    obstacle_of_ours: Callable[[], str | None] = lambda: None,
    gpu: Gpu | None = None,
    program: str | None = None,
    unix_sockets: bool = True,
) -> Choice:
    """Which engine answers, and why.

    On a GPU vLLM. llama.cpp takes the least memory and answers one adapter after another; ours
    computes the tokens of all adapters together.

    Args:
        options: How it is served.
        adapters: Served from the start.
        gguf: Whether the base is a GGUF file.
        tied: Whether the base shares its head with its word embeddings.
        quantized: Whether the base is stored in a quantised format of transformers'.
        obstacle_of_ours: Says why ours does not take the base; None: it does.
        gpu: The one that is computed on; None: the processor is.
        program: vLLM's command; None: it is not installed.
        unix_sockets: Whether the system has those by which other engines' processes are asked.
    """
    if options.engine != "auto":
        return Choice(options.engine, "as wanted")
    if options.engine_flags or options.storage != STORAGE or options.gpu_layers != ALL_LAYERS:
        return Choice("llamacpp", "whose settings were given")
    without_vllm = ""
    if gpu is not None:
        obstacle = _obstacle_of_vllm(adapters, gguf, gpu, program)
        if obstacle is None:
            return Choice("vllm", f"which is installed and computes on the {gpu.name}")
        without_vllm = f" (not vLLM, for the {gpu.name}: {obstacle})"
    if quantized:
        return Choice(
            "lighten", f"which takes a base that is quantised already, as it is{without_vllm}"
        )
    if tied and any(_changes_head(adapter.folder) for adapter in adapters):
        return Choice(
            "lighten",
            f"which applies LoRA to the head and not to the word embeddings, too{without_vllm}",
        )
    if not unix_sockets:
        return Choice("lighten", "since llama.cpp is asked at a Unix socket, which is not here")
    more = options.adapter_dir is not None and options.most_adapters > 1
    if len(adapters) < 2 and not more:
        return Choice("llamacpp", f"the embedded one, which takes the least memory{without_vllm}")
    if (obstacle := obstacle_of_ours()) is not None:
        return Choice("llamacpp", f"since ours does not take this base: {obstacle}{without_vllm}")
    which = "adapters together, those that are loaded later too"
    if not more:
        which = f"{len(adapters)} adapters together"
    return Choice("lighten", f"which computes the tokens of all {which}{without_vllm}")


def _obstacle_of_vllm(
    adapters: Sequence[Adapter], gguf: bool, gpu: Gpu, program: str | None
) -> str | None:
    """Why vLLM does not serve this here, or None."""
    if program is None:
        return "it is not installed; `make vllm VLLM=vllm` does that"
    if gpu.capability_numbers < _CAPABILITY_OF_VLLM:
        return (
            f"it needs compute capability {_CAPABILITY_OF_VLLM[0]}.0, and this has {gpu.capability}"
        )
    if gguf:
        return "the base is a GGUF file"
    try:
        for adapter in adapters:
            vllm.require_servable(adapter.folder)
    except UserError as error:
        return str(error)
    return None


def _changes_head(folder: Path) -> bool:
    """Whether an adapter has a low-rank update of the head."""
    matches = map(FACTOR.match, tensor_shapes(folder / WEIGHTS))
    return any(match is not None and match["path"].endswith("lm_head") for match in matches)


def choose_here(
    options: Options, adapters: Sequence[Adapter], config: Any, *, gguf: bool,
    shape: Callable[[], PreTrainedModel],
) -> Choice:  # fmt: skip
    """Which engine answers on this machine, and why.

    Args:
        options: How it is served.
        adapters: Served from the start.
        config: Of the base.
        gguf: Whether the base is a GGUF file.
        shape: Makes the base, of whose weights it needs no numbers.

    Raises:
        UserError: `LIGHTEN_VLLM` or `LIGHTEN_DEVICE` names what is not there.
    """
    gpu = hardware.chosen_gpu() if options.engine == "auto" else None
    return choose_engine(
        options, adapters, gguf=gguf, tied=bool(getattr(config, "tie_word_embeddings", False)),
        quantized=_is_quantized(config), gpu=gpu, program=None if gpu is None else vllm.installed(),
        obstacle_of_ours=lambda: _obstacle_of_ours(shape()), unix_sockets=wire.available(),
    )  # fmt: skip


def _obstacle_of_ours(model: PreTrainedModel) -> str | None:
    try:
        require_taken(model)
    except UserError as error:
        return str(error)
    return None


def _is_quantized(config: Any) -> bool:
    return getattr(config, "quantization_config", None) is not None


def engine_of(
    engine: str, registry: Registry, options: Options, context: int, log: Callable[[str], None]
) -> Engine:
    """An engine over what is served; it tells what it does to the base.

    Args:
        engine: One of `ENGINES`.
        registry: What is served.
        options: How.
        context: Tokens of a prompt with its answer.
        log: Hears of it.

    Raises:
        UserError: It cannot serve this.
    """
    if engine != "lighten" and not wire.available():
        raise UserError(
            f"--engine {engine} is asked at a Unix socket, which this system's Python has not; "
            "use --engine lighten, or Linux (WSL)"
        )
    return _BUILDERS[engine](registry, options, context, log)


def _cohort(
    registry: Registry, options: Options, context: int, log: Callable[[str], None]
) -> Engine:
    from lighten.serving.cohort import CohortEngine

    shape = models.skeleton(registry.base.name, revision=options.revision)
    if (obstacle := _obstacle_of_ours(shape)) is not None:
        raise UserError(f"our engine does not take this base: {obstacle}; use --engine llamacpp")
    log("base: transformers' model in this process")
    return CohortEngine(
        registry.base.name, context=context, slots=options.slots, revision=options.revision,
        dtype=STORED[options.storage] if options.storage != STORAGE else "auto",
        threads=options.threads, prefix_caching=options.prefix_caching,
    )  # fmt: skip


def _llamacpp(
    registry: Registry, options: Options, context: int, log: Callable[[str], None]
) -> Engine:
    from lighten.serving.llamacpp import LlamaCpp

    base = registry.base
    model, origin = base_as_gguf(base, options.storage)
    log(f"base: {model.stat().st_size / 1e6:,.0f} MB, {origin}")
    for adapter in registry.adapters:  # refused here, with the reason, and not while it serves
        adapters.adapter_as_gguf(adapter, base)
    return LlamaCpp(
        model, base.asking.tokenizer, lambda adapter: adapters.adapter_as_gguf(adapter, base),
        context=context, slots=options.slots, threads=options.threads,
        gpu_layers=options.gpu_layers, cache="f32" if options.storage == "f32" else "f16",
        flags=dict(options.engine_flags), prefix_caching=options.prefix_caching,
    )  # fmt: skip


def _vllm(registry: Registry, options: Options, context: int, log: Callable[[str], None]) -> Engine:
    base = registry.base
    if base.gguf is not None:
        raise UserError(f"--engine vllm does not serve the GGUF file {base.gguf}; give its folder")
    for adapter in registry.adapters:
        vllm.require_servable(adapter.folder)
    named = options.engine_flags.get("dtype") or STORED_BY_VLLM.get(options.storage)
    dtype = (
        vllm.choose_dtype(quantized=_is_quantized(base.config)) if named is None
        else Choice(str(named), "as wanted")
    )  # fmt: skip
    told = "" if dtype.value == "auto" else f"{dtype.value}, "
    log(f"base: {told}{dtype.reason}, in {vllm.program()}")
    return vllm.Vllm(
        base.folder, base.asking.tokenizer, context=context, slots=options.slots,
        most_adapters=options.most_adapters, flags=dict(options.engine_flags),
        dtype=dtype.value, prefix_caching=options.prefix_caching,
    )  # fmt: skip


_BUILDERS: dict[str, Callable[[Registry, Options, int, Callable[[str], None]], Engine]] = {
    "llamacpp": _llamacpp,
    "lighten": _cohort,
    "vllm": _vllm,
}


def base_as_gguf(base: Base, storage: str) -> tuple[Path, str]:
    """The base as GGUF, from the cache or written there; and what was done.

    Raises:
        UserError: It has no GGUF form.
    """
    from lighten.quantization.gguf_model import write_gguf

    if base.gguf is not None:
        return base.gguf, "the GGUF file as it is"
    if _is_quantized(base.config):
        raise UserError(
            f"{base.name} is quantised already, and llama.cpp's file is made from original "
            "weights: serve it by --engine lighten, or a GGUF file of the model it was made from"
        )
    key = base.contents()
    target = cache_folder() / "serve" / "bases" / f"{key[:32]}-{storage}-{adapters.LAYOUT}.gguf"
    if target.is_file():
        return target, f"{storage}, converted before"
    began = time.perf_counter()
    # Of its own: containers that share a cache have processes of the same number.
    with scratch_folder(target.parent, "convert") as scratch:
        write_gguf(base.folder, scratch / target.name, storage, name=base.name)
        os.replace(scratch / target.name, target)
    return target, f"converted to {storage} in {time.perf_counter() - began:.1f} s"
