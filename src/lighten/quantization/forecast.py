"""`lighten plan quantize … --to`: what quantising will write, take and need, before it begins."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lighten.artifacts import open_source
from lighten.errors import MissingExtra
from lighten.machine.disk import free_bytes, size_text
from lighten.quantization.gguf_source import Weight
from lighten.quantization.gguf_types import gguf_merge_dtype
from lighten.quantization.room import described, tensor_bytes
from lighten.quantization.targets import (
    DYNAMIC,
    Target,
    dynamic_group_size,
    missing_tools,
    parse,
)
from lighten.runs import Run

SAMPLE_ROWS = 256  # of the matrix that a rate is measured on
PREDICTION_BYTES = 4  # of a reference score that is kept while formats are measured


@dataclass(frozen=True)
class Format:
    """What one format will be.

    Attributes:
        name: As `--to` has it.
        file_bytes: Of its weights; None where a package is missing that knows.
        peak_bytes: Main memory while it is made, beside the interpreter and its libraries; None
            where that is not known.
        seconds: Of rounding on this machine, by a rate measured now on a sample; reading and
            writing files is left out. None where that was not measured or is not known.
        missing: The command that installs what is missing, or None.
        note: What has to be said of it.
    """

    name: str
    file_bytes: int | None
    peak_bytes: int | None
    seconds: float | None
    missing: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Forecast:
    """What quantising a model will take.

    Attributes:
        model: Which.
        weight_bytes: Of the model in 16 bits, whatever its files hold, as `quantize` compares.
        formats: One for each of `--to`.
        folder: Where they will be.
        disk_bytes: That all formats need there.
        temporary_bytes: That are needed there meanwhile: a merged model, and the reference's
            scores.
        free_bytes: Of `folder`'s disk.
        memory_bytes: Free main memory.
    """

    model: str
    weight_bytes: int
    formats: list[Format]
    folder: str
    disk_bytes: int
    temporary_bytes: int
    free_bytes: int
    memory_bytes: int | None = None

    def fits(self) -> bool | None:
        """Whether disk and memory are enough and nothing is missing; None where one is unknown."""
        peaks = [entry.peak_bytes for entry in self.formats]
        needed = self.disk_bytes + self.temporary_bytes
        if needed > self.free_bytes or any(entry.missing for entry in self.formats):
            return False
        if self.memory_bytes is None or None in peaks:
            return None
        return max(peak for peak in peaks if peak is not None) <= self.memory_bytes

    def sentence(self) -> str:
        """What it needs of disks, in a line."""
        meanwhile = f"; meanwhile {size_text(self.temporary_bytes)} more"
        return (
            f"{self.model}: {size_text(self.disk_bytes)} in {self.folder}, where "
            f"{size_text(self.free_bytes)} are free{meanwhile if self.temporary_bytes else ''}"
        )

    def rows(self) -> list[list[str]]:
        """A row for each format; a dash where something is not known."""
        return [
            [
                entry.name,
                "–" if entry.file_bytes is None else f"{entry.file_bytes / 1e6:,.1f}",
                "–" if entry.file_bytes is None else f"{entry.file_bytes / self.weight_bytes:.2f}",
                "–" if entry.peak_bytes is None else f"{entry.peak_bytes / 1e6:,.1f}",
                "–" if entry.seconds is None else f"{entry.seconds:.2g}",
            ]
            for entry in self.formats
        ]

    def notes(self) -> list[str]:
        """What is missing, and what has to be said of formats."""
        return [
            f"{entry.name}: {line}"
            for entry in self.formats
            for line in (entry.missing, entry.note)
            if line
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "fits": self.fits()}


def forecast(
    source: str | Run,
    to: Sequence[str] | str,
    *,
    adapter: str | None = None,
    output_dir: Path | None = None,
    tokens: int = 2048,
    memory_bytes: int | None = None,
    timed: bool = True,
) -> Forecast:
    """What `quantize` will write and need; headers and configuration are read, no weights.

    Args:
        source: As of `quantize`.
        to: Formats.
        adapter: As of `quantize`.
        output_dir: As of `quantize`.
        tokens: As of `quantize`: the reference's scores are kept for so many.
        memory_bytes: Free main memory.
        timed: Measure rates on samples.

    Raises:
        UserError: There is no such model or format, or it is quantised already.
    """
    from lighten.quantization.model_source import refuse_quantized

    targets = parse(to)
    artefact = open_source(source, adapter=adapter)
    refuse_quantized(artefact.base, artefact.base_folder)
    with described(artefact) as (folder, weights):
        model = _Source(artefact.name, folder, weights, dynamic_group_size(artefact.run))
        formats = [_format(target, model, timed) for target in targets]
        vocabulary_size = _vocabulary_size(folder)
    merged = sum(weight.numbers * 2 for weight in weights.values()) if artefact.adapter else 0
    if any(target.kind == "gguf" and gguf_merge_dtype(target.type) != "auto" for target in targets):
        merged *= 3  # once more, in float32
    root = output_dir or artefact.exports
    return Forecast(
        artefact.name,
        sum(2 * weight.numbers for weight in weights.values()),
        formats,
        str(root),
        # A format that is there already is replaced when the new one is whole.
        sum(entry.file_bytes or 0 for entry in formats),
        merged + (tokens * vocabulary_size * PREDICTION_BYTES if artefact.run else 0),
        free_bytes(root),
        memory_bytes,
    )


@dataclass(frozen=True)
class _Source:
    """The model that is quantised: its name, its configuration and tokenizer, and its tensors.

    Attributes:
        group: Weights of a scale of 8da4w.
    """

    model: str
    folder: Path
    weights: dict[str, Weight]
    group: int


def _format(target: Target, source: _Source, timed: bool) -> Format:
    missing = missing_tools(target.name)
    try:
        if target.kind == "gguf":
            return _gguf(target, source, timed, missing)
        return _folder_format(target, source, timed, missing)
    except MissingExtra as error:
        return Format(target.name, None, None, None, str(error))


def _gguf(target: Target, source: _Source, timed: bool, missing: str | None) -> Format:
    from lighten.quantization.gguf_model import file_bytes, plan_gguf

    plan = plan_gguf(source.folder, target.type, weights=source.weights)
    size = file_bytes(source.folder, target.type, name=source.model, weights=source.weights)
    seconds = _gguf_seconds(plan.numbers) if timed and missing is None else None
    return Format(target.name, size, plan.peak_bytes, seconds, missing, "; ".join(plan.sentences()))


def _gguf_seconds(numbers: Any) -> float:
    """Time of rounding so many numbers by format, by the rate of a sample of each."""
    from lighten.quantization.gguf_model import pack
    from lighten.quantization.llamacpp import available_threads

    generator = np.random.default_rng(0)
    values = generator.standard_normal((SAMPLE_ROWS, 4096), dtype=np.float32)
    return sum(
        count * _rate(lambda kind=kind: pack(values, kind, available_threads(), "a sample"),
                      values.size)
        for kind, count in numbers.items()
    )  # fmt: skip


def _rate(call: Any, numbers: int) -> float:
    """Seconds for one number: the better of two, since the first loads the library."""
    times = []
    for _ in range(2):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times) / numbers


def _folder_format(target: Target, source: _Source, timed: bool, missing: str | None) -> Format:
    from lighten.models import skeleton
    from lighten.quantization import int4
    from lighten.quantization.file_sizes import folder_bytes
    from lighten.quantization.shapes import about_experts, about_int8, about_nf4

    abouts = {"nf4": about_nf4, "int4": int4.about, "int4:rounded": int4.about, "int8": about_int8}
    model = skeleton(str(source.folder))
    size = folder_bytes(target.kind, model, group=source.group)
    about = abouts.get(target.kind)
    notes = about_experts(model), about(model) if about else ""
    weights, note = source.weights, "; ".join(filter(None, notes))
    if target.kind.startswith("int4") or target.kind == DYNAMIC:
        return Format(target.name, size, None, None, missing, note)
    largest = max(weight.numbers for weight in weights.values())
    # What is made, and one weight as its file has it and in 16 bits.
    peak = size + max(tensor_bytes(weight) for weight in weights.values()) + 2 * largest
    seconds = None
    if timed and missing is None:
        matrices = sum(weight.numbers for weight in weights.values() if len(weight.shape) == 2)
        seconds = matrices * _folder_rate(target.kind)
    return Format(target.name, size, peak, seconds, missing, note)


def _folder_rate(kind: str) -> float:
    """Seconds of rounding a weight, measured on a sample."""
    import torch

    sample = torch.randn(SAMPLE_ROWS, 4096, dtype=torch.bfloat16)
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        def call() -> None:
            layer = torch.nn.Linear(4096, SAMPLE_ROWS, bias=False, dtype=torch.bfloat16)
            quantize_(layer, Int8WeightOnlyConfig(version=2))
    else:
        from bitsandbytes import functional

        def call() -> None:
            if kind == "nf4":
                functional.quantize_4bit(sample, quant_type="nf4", compress_statistics=True)
            else:
                functional.int8_vectorwise_quant(sample.half())

    return _rate(call, sample.numel())


def _vocabulary_size(folder: Path) -> int:
    from lighten.quantization.gguf_source import read_settings

    return int(read_settings(folder)["vocab_size"])
