"""Plan a recipe: what its own steps, traced without data, take on a device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from lighten.adapters.spec import OWN_INITS
from lighten.cpu import allocator
from lighten.errors import UserError
from lighten.machine.hardware import Choice
from lighten.models import gguf
from lighten.models.load import weight_files
from lighten.models.quantized import Storage
from lighten.models.stored import stored_as
from lighten.planning import memory, offloaded, streamed
from lighten.planning.build import config_of, storage_of, stored_dtype
from lighten.planning.process_overhead import context_of
from lighten.planning.result import Plan, States
from lighten.planning.step_time import Timed, time_of, workers_of
from lighten.planning.steps import Traced, follow_recipe
from lighten.recipe import Recipe
from lighten.reporting.text import size
from lighten.wording import first_line

# What a process that trains on a GPU holds in main memory beside the base: the interpreter, PyTorch
# and CUDA's libraries. Taken to be so, not measured.
HOST_OF_CUDA_BYTES = 3 * 2**30
# Architectures, and what of them, benchmarks/plan_accuracy.py has compared with measurements.
TESTED, TESTED_GPUS = ("llama", "gemma3_text"), ("h100",)
TESTED_TOKENS = 2048
FILE_COPIES = 3  # of an adapter, while safetensors makes the bytes of its file (0.8)
STATE_TENSORS = {"sgd": 0, "adafactor": 1, "lion_8bit": 1, "lion_32bit": 1, "paged_lion_8bit": 1,
                 "paged_lion_32bit": 1}  # fmt: skip
# Of one number of them: 8 bits, and a float32 per 256 for their scale.
STATE_BYTES_8 = 1 + 4 / 256


class Device(Timed, Protocol):
    """What a plan asks of a device."""

    @property
    def memory_bytes(self) -> int | None:
        """What a process can take; None where that is not known."""

    def dtype(self, requested: str) -> Choice:
        """The format of the base on it, and why."""


def plan_recipe(
    recipe: Recipe,
    device: Device,
    *,
    rows_tokens: tuple[int, int] | Sequence[int] | None = None,
    supervised: float = 1.0,
    ranks: int = 1,
) -> Plan:
    """Predict the peak memory and the time of a step, from the base's configuration alone.

    Args:
        recipe: What would be trained.
        device: Where; `lighten.machine.devices` knows some by name.
        rows_tokens: (examples of each adapter in a step, tokens of each), or the lengths of the
            data's rows in a list; None: batch size and `max_length` of the recipe.
        supervised: Share of the rows' tokens that are supervised; all of them is the worst case.
        ranks: That would train it, of which this is the plan of one, all states on it.

    Raises:
        UserError: No such model, or it cannot be traced.
    """
    config, source, path = config_of(recipe)
    storage = storage_of(recipe, config)
    dtype = device.dtype(recipe.compute_dtype)
    stored = stored_dtype(config)
    converts = _converts(recipe, path, dtype, storage, stored)
    try:
        traced = follow_recipe(
            recipe, config, dtype, device.kind, rows_tokens=rows_tokens, supervised=supervised,
            capability=getattr(device, "capability", None), ranks=ranks,
        )  # fmt: skip
    except UserError:
        raise
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{recipe.model_name_or_path} cannot be planned: its step cannot be traced "
            f"({first_line(error)})"
        ) from error
    outside = tuple(_outside(recipe, config, device, storage))
    margin = memory.BEYOND if outside else memory.WITHIN
    feed, files = traced.setup.base.feed, sum(f.stat().st_size for f in weight_files(path))
    in_files = files or traced.setup.base.file_bytes or 0
    loading = memory.loading_of(source, path, traced.weights, in_files if converts else 0)
    if feed is not None:
        loading = replace(loading, files=0, copies=0)
    timeline, states = traced.timeline, _states_of(traced)
    moved = offloaded.places(recipe, device.kind)
    if "optimizer" in moved:
        timeline = offloaded.without_state(timeline)
    if "param" in moved:
        timeline = offloaded.without_weights(timeline, states, _layers(config), device.kind)
    host_bytes, disk_bytes = offloaded.bytes_elsewhere(
        recipe, device.kind, states, _pinned(traced)
    )  # fmt: skip
    optimizer, paged = traced.setup.choices["optimizer"].value, 0
    if device.kind == "cuda" and optimizer.startswith("paged_"):
        timeline, paged = offloaded.without_paged_state(timeline, optimizer)
        states = replace(states, optimiser=states.optimiser - paged, paged=paged)
    read_from = gguf.converted_already(path) if source == "gguf" else path
    if read_from is None:  # the copy in float32, which is made first
        disk_bytes += gguf.conversion_bytes(path)[0]
    workers = workers_of(traced)
    arena = device.is_here and allocator.has_arena()
    time = time_of(traced, device)
    notes: tuple[str, ...] = ()
    link = getattr(device, "host_link", None)
    if feed is not None and time is not None:
        time, note = streamed.with_reading(
            time, feed, len(traced.batches), read_from, where=recipe.offload_base, stored=stored,
            is_here=device.is_here, on_gpu=device.kind != "cpu", link=link,
        )  # fmt: skip
        notes = (note,)
    if moved:
        time, note = offloaded.with_moving(
            time, recipe, moved, states, len(traced.batches), link
        )  # fmt: skip
        notes += (note,)
    if device.kind == "cpu":
        verified = _verified(traced, whole_base=recipe.method == "full")
        context = context_of(quantised=storage is not None)
        if recipe.method == "full":
            context = replace(context, saving_bytes=0)
        peak = memory.processor_memory(
            timeline, loading, context=context,
            verified=verified, workers=workers, sums=traced.further_sums(workers), arena=arena,
            margin=margin,
        )  # fmt: skip
        host = peak.expected
    else:
        peak = memory.cuda_memory(
            timeline, capability=getattr(device, "capability", None), margin=margin
        )
        waits = feed.base_bytes if recipe.offload_base == "cpu" else 0
        host = HOST_OF_CUDA_BYTES + traced.weights + waits + host_bytes + paged
    if getattr(config, "quantization_config", None) and storage is None:
        # Counted dense, they may also stay as few bytes as their files have.
        fewer = traced.weights - (traced.setup.base.file_bytes or 0)
        peak = replace(peak, low=max(0, peak.low - max(0, fewer)))
    if paged:
        notes += (
            f"{optimizer} keeps {size(paged)} of state where the GPU has room, and in main memory "
            "where it has not: it is counted there, and the time to move it is not in a step's",
        )
    if recipe.save_total_limit is None:
        each = size(_checkpoint(traced))
        notes += (f"save_total_limit: null keeps every checkpoint, {each} each; disk counts two",)
    download = 0 if files or source not in ("hub", "known") else in_files
    allocator.trim()  # what the trace took must not look like room for whoever trains next
    return Plan(
        model=recipe.model_name_or_path,
        device=device.name,
        method=_method(recipe, storage),
        shape=traced.shape(workers),
        memory=peak,
        time=time,
        capacity=device.memory_bytes,
        host_bytes=host,
        disk_bytes=download + _written(traced, recipe, dtype) + disk_bytes,
        download_bytes=download,
        choices=_choices(traced, dtype, loading) | offloaded.choices(recipe, device.kind),
        outside=outside,
        step_tokens=traced.step_tokens,
        states=states,
        fullest=memory.fullest_moment(timeline),
        notes=notes,
    )


def _states_of(traced: Traced) -> States:
    """Weights, gradients and optimiser state of all layers, whatever is alive at the peak."""
    learning = [p for adapter in traced.setup.adapters for p in adapter.parameters.values()]
    timeline = traced.timeline
    alive = timeline.alive_at(len(timeline.events) - 1)  # after the last optimiser's step
    trained = sum(p.numel() * p.element_size() for p in learning)
    return States(
        frozen=traced.frozen,
        trained=trained,
        gradients=sum(4 * p.numel() for p in learning),  # float32, as the weights that learn
        optimiser=alive.get("optimiser", 0),
        packed=traced.packed,
        adapters=0 if traced.setup.recipe.method == "full" else trained,
        layers=traced.in_layers,
    )


def _layers(config: Any) -> int:
    return int(getattr(config.get_text_config(), "num_hidden_layers", 1))


def _pinned(traced: Traced) -> float:
    """How many times its bytes a weight takes in pinned memory: the next power of two of them."""
    learning = [p for m in traced.setup.adapters for p in m.parameters.values()]
    sizes = [4 * p.numel() for p in learning if p.numel()]
    return sum(1 << (size - 1).bit_length() for size in sizes) / max(1, sum(sizes))


def _method(recipe: Recipe, storage: Storage | None) -> str:
    if recipe.method == "full":
        return "full" if recipe.last_layers is None else "last_layers"
    if recipe.peft is not None:
        return str(recipe.peft.get("peft_type", "peft")).lower()
    name = "dora" if any(options.use_dora for options in recipe.cohort()) else "lora"
    return name if storage is None else f"q{name}"


def _converts(
    recipe: Recipe, path: Path, dtype: Choice, storage: Storage | None, stored: torch.dtype
) -> bool:
    """Whether weights change their format when they are read."""
    trains_all = recipe.method == "full" and recipe.last_layers is None
    target = "float32" if trains_all else dtype.value
    if storage is not None:
        return path.is_dir() and stored_as(path) is None
    return str(stored).removeprefix("torch.") != target


def _written(traced: Traced, recipe: Recipe, dtype: Choice) -> int:
    """Bytes of the run's files: checkpoints with weights and optimiser state, and the result.

    Each adapter's best may be older than those that the limit keeps, and stays beside them.
    """
    limit = recipe.save_total_limit
    best = len(traced.setup.adapters) if limit is not None and recipe.load_best_model_at_end else 0
    result = _numbers(traced) * 4
    if recipe.method == "full":  # the whole model, in the format of the products
        result = traced.frozen + _numbers(traced) * getattr(torch, dtype.value).itemsize
    return _checkpoint(traced) * ((limit or 1) + best + 1) + result


def _checkpoint(traced: Traced) -> int:
    """Bytes of one checkpoint: what learns in float32, and the optimiser's state of it."""
    optimizer = traced.setup.choices["optimizer"].value
    each = STATE_BYTES_8 if optimizer.endswith("8bit") else 4
    return int(_numbers(traced) * (4 + each * STATE_TENSORS.get(optimizer, 2)))


def _numbers(traced: Traced) -> int:
    """How many numbers learn."""
    return sum(p.numel() for m in traced.setup.adapters for p in m.parameters.values())


def _verified(traced: Traced, *, whole_base: bool) -> int:
    """Bytes of saved files that are in memory at once: of a base one weight's, to be verified.

    An adapter's file is made there: safetensors has its numbers as bytes, the file that it puts
    together of them, and that file as Python's bytes.
    """
    size = _numbers(traced) * 4
    if not whole_base:
        adapters = [m.parameters.values() for m in traced.setup.adapters]
        return max(size, FILE_COPIES * 4 * max(sum(p.numel() for p in a) for a in adapters))
    numbers = [p.numel() for m in traced.setup.adapters for p in m.parameters.values()]
    return min(size, 4 * max(numbers))


def _choices(traced: Traced, dtype: Choice, loading: memory.Loading) -> dict[str, str]:
    choices = {
        name: f"{choice.value}: {choice.reason}"
        for name, choice in traced.setup.choices.items()
        if name not in ("template", "compilation")
    }
    choices["dtype"] = f"{dtype.value}: {dtype.reason}"
    if loading.files:
        choices["loading"] = (
            f"{size(loading.files)} of weight files are mapped while they are converted; the "
            "system takes these pages back where memory is short"
        )
    return choices


def _outside(recipe: Recipe, config: Any, device: Device, storage: Storage | None) -> Iterator[str]:
    """In what way a question is outside of what was compared with measurements."""
    if device.kind != "cpu" and not any(gpu in device.label.lower() for gpu in TESTED_GPUS):
        name = device.label if device.is_here else device.name
        yield f"of GPUs {', '.join(TESTED_GPUS)} has been compared, not {name}"
    if device.kind == "cpu" and not device.is_here:
        yield f"{device.name} is traced as this machine's processor would compute, not compared"
    elif device.kind == "cpu" and not allocator.has_arena():
        yield "tensors lie in glibc's heap here, without an arena, and that has not been compared"
    if (kind := getattr(config, "model_type", "")) not in TESTED:
        yield f"architecture {kind} has not been compared; {', '.join(TESTED)} have"
    if getattr(config, "quantization_config", None) and storage is None:
        yield "its files are quantised, and its weights are counted as if they were dense"
    if recipe.torch_compile is True:
        yield "layers are traced as they are, but torch_compile fuses what they do"
    if recipe.activation_offload:
        yield "activation_offload is not traced: activations are counted as if they stayed"
    if recipe.peft is not None or any(
        options.use_dora or options.init_lora_weights not in OWN_INITS
        for options in recipe.cohort()
    ):
        yield "PEFT's own modules have not been compared"
    if recipe.optim not in ("adamw_torch", "adamw_torch_fused"):
        yield f"optim {recipe.optim} has not been compared"
    if device.kind == "cpu" and recipe.attn_implementation != "sdpa":
        yield f"attention {recipe.attn_implementation} has not been compared"
    if recipe.max_length > TESTED_TOKENS:
        yield f"rows of more than {TESTED_TOKENS} tokens have not been compared"
