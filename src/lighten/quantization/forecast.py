"""`lighten plan quantize … --to`: what quantising will write, take and need, before it begins."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lighten.artifacts import Artefact, copy_companions, open_source
from lighten.errors import DiskFull, MissingExtra
from lighten.quantization.gguf_source import Weight, read_weights
from lighten.quantization.targets import DYNAMIC, Target, parse, require_tools
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
        weight_bytes: Of the model, in 16 bits where an adapter is merged into it.
        formats: One for each of `--to`.
        folder: Where they will be.
        disk_bytes: That all formats need there.
        temporary_bytes: That are needed meanwhile: a merged model, and the reference's scores.
        temporary: Where.
        free_bytes: Of `folder`'s disk.
        memory_bytes: Free main memory.
    """

    model: str
    weight_bytes: int
    formats: list[Format]
    folder: str
    disk_bytes: int
    temporary_bytes: int
    temporary: str
    free_bytes: int
    memory_bytes: int | None = None

    def fits(self) -> bool | None:
        """Whether disk and memory are enough and nothing is missing; None where one is unknown."""
        peaks = [own.peak_bytes for own in self.formats]
        if self.disk_bytes > self.free_bytes or any(own.missing for own in self.formats):
            return False
        if self.memory_bytes is None or None in peaks:
            return None
        return max(peak for peak in peaks if peak is not None) <= self.memory_bytes

    def sentence(self) -> str:
        """What it needs of disks, in a line."""
        meanwhile = f", and meanwhile {_size(self.temporary_bytes)} in {self.temporary}"
        return (
            f"{self.model}: {_size(self.disk_bytes)} in {self.folder}, where "
            f"{_size(self.free_bytes)} are free{meanwhile if self.temporary_bytes else ''}"
        )

    def rows(self) -> list[list[str]]:
        """A row for each format; a dash where something is not known."""
        return [
            [
                own.name,
                "–" if own.file_bytes is None else f"{own.file_bytes / 1e6:,.1f}",
                "–" if own.file_bytes is None else f"{own.file_bytes / self.weight_bytes:.2f}",
                "–" if own.peak_bytes is None else f"{own.peak_bytes / 1e6:,.1f}",
                "–" if own.seconds is None else f"{own.seconds:.2g}",
            ]
            for own in self.formats
        ]

    def notes(self) -> list[str]:
        """What is missing, and what has to be said of formats."""
        return [
            f"{own.name}: {line}"
            for own in self.formats
            for line in (own.missing, own.note)
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
        formats = [_format(target, artefact.name, folder, weights, timed) for target in targets]
        words = _words(folder)
    merged = sum(own.numbers * 2 for own in weights.values()) if artefact.adapter else 0
    root = output_dir or (artefact.run.folder if artefact.run else Path.cwd()) / "exports"
    return Forecast(
        artefact.name,
        sum(_nbytes(own) for own in weights.values()),
        formats,
        str(root),
        # A format that is there already is replaced when the new one is whole.
        sum(own.file_bytes or 0 for own in formats),
        merged + (tokens * words * PREDICTION_BYTES if artefact.run else 0),
        tempfile.gettempdir(),
        free_bytes(root),
        memory_bytes,
    )


@contextmanager
def described(artefact: Artefact) -> Iterator[tuple[Path, dict[str, Weight]]]:
    """Configuration and tokenizer of the model that will be quantised, and its tensors' shapes."""
    if artefact.adapter is None:
        yield artefact.base_folder, read_weights(artefact.base_folder)
        return
    from lighten.quantization.export import added_words
    from lighten.quantization.merge import Unmergeable, merged_shapes

    with tempfile.TemporaryDirectory(prefix="lighten-plan-") as scratch:
        folder = Path(scratch)
        shutil.copyfile(artefact.base_folder / "config.json", folder / "config.json")
        copy_companions(artefact, folder)
        try:
            weights = merged_shapes(
                artefact.base_folder, artefact.adapter, folder, words=added_words(artefact)
            )
        except Unmergeable:  # in memory, by PEFT: of the base's own shapes
            weights = read_weights(artefact.base_folder)
        yield folder, weights


def require_room(folder: Path, nbytes: int, what: str, *, temporary_bytes: int = 0) -> None:
    """A disk has room for what will be written.

    Args:
        folder: Where.
        nbytes: How much.
        what: Its name in the error.
        temporary_bytes: That are needed meanwhile in the folder of temporary files.

    Raises:
        DiskFull: It has not.
    """
    temporary = Path(tempfile.gettempdir())
    needs = {_there(folder): nbytes}
    one_disk = _there(folder).stat().st_dev == temporary.stat().st_dev
    place = _there(folder) if one_disk else temporary
    needs[place] = needs.get(place, 0) + temporary_bytes
    for where, needed in needs.items():
        free = shutil.disk_usage(where).free
        if free < needed:
            raise DiskFull(
                f"{what} needs {_size(needed)} in {where} and the disk has {_size(free)} left; "
                "free some space or choose another --output_dir"
            )


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk of a folder that may not be there yet."""
    return shutil.disk_usage(_there(folder)).free


def _there(folder: Path) -> Path:
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _format(
    target: Target, model: str, folder: Path, weights: dict[str, Weight], timed: bool
) -> Format:
    missing = _missing(target)
    try:
        if target.kind == "gguf":
            return _gguf(target, model, folder, weights, timed, missing)
        return _folder_format(target, folder, weights, timed, missing)
    except MissingExtra as error:
        return Format(target.name, None, None, None, str(error))


def _missing(target: Target) -> str | None:
    try:
        require_tools([target])
    except MissingExtra as error:
        return str(error)
    return None


def _gguf(
    target: Target, model: str, folder: Path, weights: dict[str, Weight], timed: bool,
    missing: str | None,
) -> Format:  # fmt: skip
    from lighten.quantization.gguf_model import file_bytes, plan_gguf

    plan = plan_gguf(folder, target.type, weights=weights)
    size = file_bytes(folder, target.type, name=model, weights=weights)
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


def _folder_format(
    target: Target, folder: Path, weights: dict[str, Weight], timed: bool, missing: str | None
) -> Format:
    from lighten.models import skeleton
    from lighten.quantization.file_sizes import folder_bytes

    size = folder_bytes(target.kind, skeleton(str(folder)))
    if target.kind.startswith("int4") or target.kind == DYNAMIC:
        note = "its peak memory and time are not known beforehand"
        return Format(target.name, size, None, None, missing, note)
    largest = max(own.numbers for own in weights.values())
    # What is made, and one weight as its file has it and in 16 bits.
    peak = size + max(_nbytes(own) for own in weights.values()) + 2 * largest
    seconds = None
    if timed and missing is None:
        matrices = sum(own.numbers for own in weights.values() if len(own.shape) == 2)
        seconds = matrices * _folder_rate(target.kind)
    return Format(target.name, size, peak, seconds, missing)


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


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def _nbytes(weight: Weight) -> int:
    return weight.numbers * {"F32": 4, "F64": 8}.get(weight.kind, 2)


def _words(folder: Path) -> int:
    from lighten.quantization.gguf_source import read_settings

    return int(read_settings(folder)["vocab_size"])
