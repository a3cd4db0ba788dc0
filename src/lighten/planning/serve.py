"""`lighten plan serve` and `lighten plan quantize`: what a base needs to answer, and to shrink."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lighten.errors import UserError
from lighten.machine.devices import Device
from lighten.models import quantized, skeleton
from lighten.models.load import locate, weight_files
from lighten.models.stored import loaded_bytes
from lighten.planning import serving
from lighten.planning.serving import Serving
from lighten.wording import counted

# Weights of the sample that the rate of quantising is measured on: a matrix of some MiB.
SAMPLE = (2048, 2048)


@dataclass(frozen=True)
class Quantizing:
    """What quantising a base needs.

    Attributes:
        model: The base.
        storage: What its linear layers become.
        peak_bytes: Main memory: what is made, and one layer in its old form.
        result_bytes: What is made.
        dense_bytes: The base as its files have it.
        seconds: Of processor time, by a rate measured now on a sample.
        capacity: Main memory that is free.
    """

    model: str
    storage: str
    peak_bytes: int
    result_bytes: int
    dense_bytes: int
    seconds: float
    capacity: int | None

    def fits(self) -> bool | None:
        """Whether main memory is large enough."""
        return None if self.capacity is None else self.peak_bytes <= self.capacity

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "fits": self.fits()}


@dataclass(frozen=True)
class Sizes:
    """Weights of a base.

    Attributes:
        linear: (in, out) of its linear layers without the head.
        rest: How many all others have.
        experts: How many of both are of experts of which a token passes through some.
    """

    linear: list[tuple[int, int]]
    rest: int
    experts: int = 0

    @property
    def linear_numbers(self) -> int:
        """How many the linear layers have."""
        return sum(inside * outside for inside, outside in self.linear)


def serve(
    model: str,
    device: Device,
    *,
    adapters: int = 0,
    rank: int = 16,
    context: int = 4096,
    concurrency: int = 1,
    storage: str | None = None,
    cache_bytes: float = 2.0,
    weight_bytes: int | None = None,
    adapter_bytes: int | None = None,
    windows: bool = True,
    revision: str | None = None,
) -> Serving:
    """Memory of a server with one base and many adapters.

    Args:
        model: As for `models.load`; only its configuration is read.
        device: Where.
        adapters: Held at once.
        rank: Of the largest; engines pad the others to it.
        context: Tokens of a sequence, prompt and answer.
        concurrency: Sequences at once.
        storage: One of `serving.BYTES_PER_WEIGHT`; default as its files are quantised, else the
            device's own 16 bits.
        cache_bytes: Of one number in the KV cache.
        weight_bytes: Of the base, where that is known; None: by `storage`.
        adapter_bytes: Of all adapters, where that is known; None: by `rank`.
        windows: Whether layers with a window keep no more than that of a sequence.
        revision: Of a hub model.

    Raises:
        UserError: No such model, no such storage, or a number that is none.
    """
    compute = device.dtype().value
    chosen = storage or compute
    _require_known(chosen, serving.BYTES_PER_WEIGHT)
    for name, value, least in (
        ("adapters", adapters, 0), ("rank", rank, 1 if adapters else 0), ("context", context, 1),
        ("concurrency", concurrency, 1),
    ):  # fmt: skip
        if type(value) is not int or value < least:
            raise UserError(f"--{name} {value}: give a whole number from {least}")
    if isinstance(cache_bytes, bool | str) or not 0 < cache_bytes < math.inf:
        raise UserError(f"--cache_bytes {cache_bytes}: give a number above 0, 2 for 16 bits")
    shape = skeleton(model, revision=revision)
    config = shape.config.get_text_config()
    sizes = sizes_of(shape)
    caches = caches_of(shape)
    if not windows:
        caches = [replace(layer, window=None) for layer in caches]
    number = serving.BYTES_PER_WEIGHT[compute]
    if weight_bytes is None and storage is None:
        _, path = locate(model, revision=revision, weights=False)
        weight_bytes = loaded_bytes(shape, number, weight_files(path))
    elif weight_bytes is None:
        weight_bytes = serving.weight_bytes(sizes.linear_numbers, sizes.rest, chosen, compute)
    if adapter_bytes is None:
        adapter_bytes = adapters * serving.adapter_bytes(sizes.linear, rank, number_bytes=number)
    fixed = {
        "base weights": weight_bytes,
        "adapters": adapter_bytes,
        "workspace": serving.workspace_bytes(
            config.hidden_size,
            serving.widest(config, "intermediate_size") or 4 * config.hidden_size,
            config.vocab_size,
            concurrency,
            number_bytes=number,
        ),
    }  # fmt: skip
    cache = serving.kv_cache_bytes(caches, context, concurrency, number_bytes=cache_bytes)
    states = serving.state_bytes(caches, concurrency, number_bytes=number)
    per_sequence = serving.kv_cache_bytes(caches, context, 1, number_bytes=cache_bytes)
    per_sequence += serving.state_bytes(caches, 1, number_bytes=number)
    capacity = device.memory_bytes
    if capacity is not None and device.kind == "cuda":
        capacity = int(capacity * serving.SHARE)
    most, unknown = None, sum(not layer.state_known for layer in caches)
    if capacity is not None and per_sequence and not unknown:
        most = max(0, (capacity - sum(fixed.values())) // per_sequence)
    rate = None
    if device.bandwidth:
        read = fixed["base weights"] * _share_read(config, sizes, concurrency)
        read += fixed["adapters"] * min(1.0, concurrency / max(1, adapters))
        rate = concurrency * device.bandwidth / (read + cache + states)
    what = f"the state of {counted(unknown, 'layer')}: of {config.model_type} it is not known"
    return Serving(
        model, device.name, {**fixed, "KV cache": cache, "recurrent states": states}, capacity,
        concurrency, context, most, rate, (what,) if unknown else (),
    )  # fmt: skip


def _share_read(config: Any, sizes: Sizes, sequences: int) -> float:
    """Share of the weights that a step reads: all of them but experts that no sequence chose."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((n for name in names if (n := serving.widest(config, name))), None)
    names = ("num_experts_per_tok", "top_k_experts", "moe_topk")
    chosen = next((n for name in names if (n := serving.widest(config, name))), None)
    if experts is None or chosen is None:
        return 1.0
    share = sizes.experts / (sizes.linear_numbers + sizes.rest)
    return 1.0 - share * (1.0 - serving.share_read(experts, chosen, sequences))


def quantize(
    model: str,
    *,
    storage: str = "nf4",
    double: bool = False,
    capacity: int | None = None,
    revision: str | None = None,
) -> Quantizing:
    """Main memory and time to quantise a base on this machine's processor.

    The weights are quantised as they are read, one after another: what is dense at the same time is
    one layer, in its file's format and in float32. The time is that of a sample, quantised now,
    times the number of weights; reading the files is left out.

    Args:
        model: As for `models.load`; only its configuration is read.
        storage: `nf4`, `fp4` or `int8`.
        double: Quantise the scales, too (4 bits).
        capacity: Main memory that is free.
        revision: Of a hub model.

    Raises:
        UserError: No such model, or no such storage.
        MissingExtra: bitsandbytes is not installed.
    """
    _require_known(storage, ("nf4", "fp4", "int8"))
    if type(double) is not bool or (double and storage == "int8"):
        raise UserError(f"--double {double}: true or false, and of 4 bits alone")
    kind = quantized.Storage(storage, double)
    shape = skeleton(model, revision=revision)
    sizes = sizes_of(shape)
    name = "int8" if storage == "int8" else "nf4 double" if double else "nf4"
    # The layers that stay dense are in the format that this machine computes in.
    compute = Device("cpu", "", "cpu", None).dtype().value
    result = serving.weight_bytes(sizes.linear_numbers, sizes.rest, name, compute)
    in_files = _file_bytes(shape, model, revision)
    per_number = in_files / (sizes.linear_numbers + sizes.rest)
    largest = max((inside * outside for inside, outside in sizes.linear), default=0)
    return Quantizing(
        model=model,
        storage=str(kind),
        peak_bytes=round(result + largest * (per_number + 4)),
        result_bytes=result,
        dense_bytes=in_files,
        seconds=sizes.linear_numbers * _seconds_per_weight(kind),
        capacity=capacity,
    )


def _require_known(storage: object, known: Collection[str]) -> None:
    if not isinstance(storage, str) or storage not in known:
        raise UserError(f"--storage {storage}: it is not known; use {', '.join(known)}")


def caches_of(shape: PreTrainedModel) -> list[serving.LayerCache]:
    """What each layer of a base keeps of a sequence.

    What grows with the tokens is told by the configuration, and a state by the sizes of the layer:
    there are many names for them in configurations, and few in layers.

    Args:
        shape: A base, whose weights may be on the meta device.

    Raises:
        UserError: Its configuration does not say how many layers it has.
    """
    config = shape.config.get_text_config()
    caches = serving.layer_caches(config)
    kinds = getattr(config, "layer_types", None) or [None] * len(caches)
    for module in shape.modules():
        place = getattr(module, "layer_idx", None)
        convolution = next((c for c in module.children() if isinstance(c, nn.Conv1d)), None)
        if not isinstance(place, int) or convolution is None or place >= len(caches):
            continue
        if caches[place].state_known:
            continue
        recurrent = 0 if kinds[place] == "conv" else _recurrent_numbers(module)
        if recurrent is not None:
            caches[place] = replace(
                caches[place], convolution=convolution.weight.numel(), recurrent=recurrent,
                state_known=True,
            )  # fmt: skip
    return caches


def _recurrent_numbers(layer: Any) -> int | None:
    """Numbers of a layer's state that runs over the tokens; None: it is not known."""
    if hasattr(layer, "ssm_state_size"):  # Mamba 1 and 2: a vector for each channel
        return int(layer.intermediate_size * layer.ssm_state_size)
    if hasattr(layer, "head_k_dim"):  # the gated delta rule: a matrix for each head
        return int(layer.num_v_heads * layer.head_k_dim * layer.head_v_dim)
    return None


def sizes_of(shape: PreTrainedModel) -> Sizes:
    """Weights of a base whose own may be on the meta device."""
    head = shape.get_output_embeddings()
    linear: list[tuple[int, int]] = []
    for module in shape.modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            rows, columns = module.weight.shape
            in_out = (rows, columns) if isinstance(module, Conv1D) else (columns, rows)
            linear.append((int(in_out[0]), int(in_out[1])))
    total = sum(parameter.numel() for parameter in shape.parameters())
    experts = sum(p.numel() for name, p in shape.named_parameters() if ".experts." in name)
    return Sizes(linear, total - sum(inside * outside for inside, outside in linear), experts)


def _file_bytes(shape: PreTrainedModel, model: str, revision: str | None) -> int:
    """What the base's files hold, by their sizes or by their configuration's format."""
    _, path = locate(model, revision=revision, weights=False)
    if stored_bytes := sum(file.stat().st_size for file in weight_files(path)):
        return stored_bytes
    stated = getattr(shape.config, "dtype", None) or torch.bfloat16
    size = torch.empty(0, dtype=stated).element_size()
    return size * sum(parameter.numel() for parameter in shape.parameters())


def _seconds_per_weight(kind: quantized.Storage) -> float:
    """Measured now: the better of two, since the first one loads the library."""
    layer = nn.Linear(SAMPLE[1], SAMPLE[0], bias=False).requires_grad_(False)
    times = []
    for _ in range(2):
        model = _Holder(nn.Linear(SAMPLE[1], SAMPLE[0], bias=False, device="meta"))
        model.layer = nn.Linear(SAMPLE[1], SAMPLE[0], bias=False)
        model.layer.weight.data.copy_(layer.weight)
        began = time.perf_counter()
        quantized.finish(model, kind, torch.float32, "cpu")  # type: ignore[arg-type]
        times.append(time.perf_counter() - began)
    return min(times) / (SAMPLE[0] * SAMPLE[1])


class _Holder(nn.Module):
    """A model of one layer, as much of one as quantising asks for."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def get_output_embeddings(self) -> None:
        """It has no head."""
