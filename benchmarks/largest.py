"""The largest model that trains while no process holds more than a limit, strategy by strategy.

    python benchmarks/scale_table.py --only largest        # 3 GiB; the last line is JSON
    python benchmarks/scale_table.py --only largest --gib 0.9 --hidden 128   # small, to see it run

Llamas of one width and random weights, which differ in their number of layers alone: a layer's
file is written once, and a model is a folder of links to as many of them as it has. Every layer
has the same numbers, so that a file costs no more than its writing.

What a process holds is its high-water mark (`VmHWM`), from its start to its end, loading and
writing the trained model included; pages that it shares with others count whole. A process that
passes the limit is ended with all others of its run. The first number of layers tried is the one
that `lighten plan` predicts; from there it grows or shrinks until what trains and what does not are
within a tenth. A streamed base hardly grows with its layers: it is tried at `AT_LEAST` times
the largest plain one, and what trains there is a lower bound.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.streamed_base import GIB, Shape, write_rows, write_tokenizer

TOKENS = 16  # of each rank in a step
STEPS = 2
RANK = 4  # of adapters, on all linear layers
FEW = 8  # layers of the smallest model that is tried and planned
NEARER = 0.1  # what trains and what does not are at most so far from each other
AT_LEAST = 4.2  # how much larger than the largest plain model the streamed one is tried
LOOK_S = 0.05
LONGEST_S = 900.0
SPARE_BYTES = 5 * GIB  # of the disk that stay free
# What the last line has of it.
FIGURES = (
    "largest_vs_plain", "largest_vs_plain_lora", "largest_all_weights_vs_plain",
    "each_as_large_as_before", "largest_parameters",
)  # fmt: skip

FULL = {"method": "full", "dtype": "float32"}
LORA = {"lora_r": RANK, "dtype": "bfloat16"}


@dataclass(frozen=True)
class Row:
    """One way to train.

    Attributes:
        name: As the table has it.
        settings: Of the recipe.
        processes: Ranks.
        streamed: Its size is a multiple of that of the row before, and no limit is looked for.
    """

    name: str
    settings: Mapping[str, Any]
    processes: int = 1
    streamed: bool = False


ROWS = (
    Row("plain, all weights", FULL),
    Row("zero2, all weights", {**FULL, "strategy": "zero2"}, 2),
    Row("zero3, all weights", {**FULL, "strategy": "zero3"}, 2),
    Row("zero3 + nvme, all weights",
        {**FULL, "strategy": "zero3", "offload_optimizer": "nvme"}, 2),
    Row("zero3 + nvme, weights too, all weights",
        {**FULL, "strategy": "zero3", "offload_optimizer": "nvme", "offload_params": "nvme"}, 2),
    Row("plain, LoRA", LORA),
    Row("streamed base, LoRA", {**LORA, "offload_base": "disk"}, streamed=True),
)  # fmt: skip


@dataclass
class Trial:
    """What became of a model of so many layers.

    Attributes:
        layers: Its decoder layers.
        fits: It trained, and no process passed the limit.
        peak_bytes: The most that any process held, as far as it came.
        seconds: The whole run.
        error: Why it ended otherwise.
    """

    layers: int
    fits: bool
    peak_bytes: int
    seconds: float
    error: str | None = None


@dataclass
class Models:
    """Models of one width, which share the files of their layers.

    Args:
        folder: Where they lie.
        hidden: Width.
        vocabulary: Rows of embedding and head.
    """

    folder: Path
    hidden: int
    vocabulary: int
    _tensors: dict[str, dict[str, Any]] = field(default_factory=dict)

    def shape(self, layers: int) -> Shape:
        """Of a model of so many layers."""
        return Shape(layers, self.hidden, self.vocabulary)

    @contextlib.contextmanager
    def of(self, layers: int, *, weights: bool = True) -> Iterator[Path]:
        """A model of so many layers, gone afterwards.

        Args:
            layers: How many.
            weights: With its weights, or its configuration alone.

        Raises:
            SystemExit: The disk has no room for it.
        """
        folder = self.folder / f"{layers} layers"
        folder.mkdir(parents=True)
        self.shape(layers).config.save_pretrained(folder)
        write_tokenizer(folder)
        try:
            if weights:
                self._link(folder, layers)
            yield folder
        finally:
            shutil.rmtree(folder)

    def _link(self, folder: Path, layers: int) -> None:
        places: dict[str, str] = {}
        for part in ["rest", *map(str, range(layers))]:
            file, names = self._file(part)
            os.link(file, folder / file.name)
            places |= dict.fromkeys(names, file.name)
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")

    def _file(self, part: str) -> tuple[Path, list[str]]:
        """The file of one layer, by its number, or of what is in none; and its tensors' names."""
        from safetensors.torch import save_file

        tensors = self._random()["rest" if part == "rest" else "layer"]
        named = {name.replace("layers.0.", f"layers.{part}."): value
                 for name, value in tensors.items()}  # fmt: skip
        path = self.folder / f"model-{part}.safetensors"
        if not path.exists():
            size = sum(value.numel() * value.element_size() for value in named.values())
            if (free := shutil.disk_usage(self.folder).free) < size + SPARE_BYTES:
                raise SystemExit(f"{free / GIB:.1f} GiB of disk are free: too little for a layer")
            save_file(named, path, metadata={"format": "pt"})
        return path, list(named)

    def _random(self) -> dict[str, dict[str, Any]]:
        """Weights of one layer and of what is in none, in bfloat16."""
        import torch

        from lighten.models.configuration import build_empty

        if not self._tensors:
            generator = torch.Generator().manual_seed(0)
            for name, value in build_empty("a Llama", self.shape(1).config).named_parameters():
                part = "layer" if name.startswith("model.layers.") else "rest"
                self._tensors.setdefault(part, {})[name] = (
                    torch.ones(value.shape) if value.dim() == 1 else
                    torch.empty(value.shape).normal_(std=0.02, generator=generator)
                ).bfloat16()  # fmt: skip
        return self._tensors


def largest(folder: Path, *, limit_bytes: int, hidden: int, vocabulary: int) -> dict[str, Any]:
    """The table: for each way to train the most layers that stay within the limit.

    Args:
        folder: For models and runs, on a disk.
        limit_bytes: Of each process.
        hidden: Width of the models.
        vocabulary: Rows of embedding and head.

    Returns:
        `rows`, `limit_bytes`, the free disk before, and the ratios of the summary.
    """
    models = Models(folder, hidden, vocabulary)
    folder.mkdir(parents=True)
    free = shutil.disk_usage(folder).free
    start_bytes: int | None = None  # of a process before it trains: its libraries
    rows: list[dict[str, Any]] = []
    for row in ROWS:
        trial = functools.partial(_train, models, row, limit_bytes)
        planned = [_planned(models, row, layers) for layers in (FEW, 3 * FEW)]
        if start_bytes is None:
            start_bytes = trial(FEW).peak_bytes - planned[0]
        slope = (planned[1] - planned[0]) / (2 * FEW)
        predicted = FEW + max(0, math.floor((limit_bytes - start_bytes - planned[0]) / slope))
        if row.streamed:
            trials = [trial(_layers_of(models, AT_LEAST * rows[-1]["parameters"]))]
        else:
            trials = search(trial, predicted)
        fitting = [tried for tried in trials if tried.fits]
        if not fitting:
            raise SystemExit(f"{row.name}: nothing trains; {trials[-1].error}")
        most = max(fitting, key=lambda tried: tried.layers)
        failed = min((tried.layers for tried in trials if not tried.fits), default=None)
        rows.append({
            "row": row.name, "processes": row.processes, "layers": most.layers,
            "parameters": models.shape(most.layers).parameters, "peak_bytes": most.peak_bytes,
            "planned_bytes": int(start_bytes + planned[0] + (most.layers - FEW) * slope),
            "predicted_layers": predicted, "fails_at_layers": failed, "seconds": most.seconds,
            "trials": [vars(tried) for tried in trials],
        })  # fmt: skip
        print(line(rows[-1]), flush=True)
    return {"limit_bytes": limit_bytes, "free_disk_bytes": free, "rows": rows, **ratios(rows)}


def search(trial: Callable[[int], Trial], first: int) -> list[Trial]:
    """Trials, until what trains and what does not are within `NEARER` of each other.

    Args:
        trial: Trains a model of so many layers.
        first: The number to begin with.
    """
    trials: list[Trial] = []
    fits, fails, step, layers = 0, None, NEARER, max(1, first)
    while fails is None or fails - fits > max(1, math.floor(NEARER * fits)):
        trials.append(trial(layers))
        if trials[-1].fits:
            fits = layers
        else:
            fails = layers
        if fails is None:
            layers = max(fits + 1, math.floor(fits * (1 + step)))
        elif not fits:
            layers = max(1, min(fails - 1, math.floor(fails / (1 + step))))
        else:
            layers = (fits + fails) // 2
        step *= 2
    return trials


def ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of the last line, of rows in the order of `ROWS`."""
    *full, lora, streamed = rows
    pairs = [*itertools.pairwise(full), (full[-1], streamed), (lora, streamed)]
    return {
        "largest_vs_plain": streamed["parameters"] / full[0]["parameters"],
        "largest_vs_plain_lora": streamed["parameters"] / lora["parameters"],
        "largest_all_weights_vs_plain": full[-1]["parameters"] / full[0]["parameters"],
        "each_as_large_as_before": all(a["parameters"] <= b["parameters"] for a, b in pairs),
        "largest_parameters": {row["row"]: row["parameters"] for row in rows},
    }


def line(row: Mapping[str, Any]) -> str:
    """A row of the table in the documents."""
    more = "and more" if row["fails_at_layers"] is None else f"not {row['fails_at_layers']}"
    return (
        f"| {row['row']} | {row['processes']} | {row['layers']} ({more}) | "
        f"{row['parameters'] / 1e6:,.0f} M | {row['peak_bytes'] / GIB:.2f} | "
        f"{row['planned_bytes'] / GIB:.2f} | {row['seconds']:.0f} |"
    )


def _layers_of(models: Models, parameters: float) -> int:
    one, two = models.shape(1).parameters, models.shape(2).parameters
    return math.ceil(1 + (parameters - one) / (two - one))


def _recipe(models: Models, row: Row, model: Path) -> dict[str, Any]:
    data = write_rows(models.folder / "rows.jsonl", models.vocabulary, tokens=TOKENS)
    return {
        "model_name_or_path": str(model), "dataset": str(data), "per_device_train_batch_size": 1,
        "max_steps": STEPS, "val_size": 0, "save_steps": 10**6, "save_every": None,
        "gradient_checkpointing": True, "max_length": TOKENS, "report_to": "none", **row.settings,
    }  # fmt: skip


def _planned(models: Models, row: Row, layers: int) -> int:
    """What `lighten plan` expects of each process, above what it held before the training."""
    import lighten
    from lighten import api

    os.environ["LIGHTEN_READ_RATE"] = "1e9"  # its time is not asked for
    with models.of(layers, weights=False) as model:
        recipe = _recipe(models, row, model)
        if row.processes > 1:
            return int(api.plan_spread(processes=row.processes, **recipe).device_bytes)
        return lighten.plan(device="cpu", changes=False, **recipe).memory.expected


def _train(models: Models, row: Row, limit_bytes: int, layers: int) -> Trial:
    with (
        models.of(layers) as model,
        tempfile.TemporaryDirectory(dir=models.folder) as scratch,
    ):
        run = Path(scratch) / "run"
        file = Path(scratch) / "recipe.yaml"
        recipe = {**_recipe(models, row, model), "output_dir": str(run)}
        file.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
        command = [sys.executable, "-m", "lighten", "train", str(file), "--no-plan"]
        if row.processes > 1:
            command += ["--processes", str(row.processes)]
        trial = watched(command, layers, limit_bytes)
        if trial.fits:
            metrics = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            assert len(metrics) == STEPS
    result = "trains" if trial.fits else f"does not: {trial.error}"
    print(f"{row.name}: {layers} layers, {trial.peak_bytes / GIB:.2f} GiB, {trial.seconds:.0f} s: "
          f"{result}", flush=True)  # fmt: skip
    return trial


def watched(command: list[str], layers: int, limit_bytes: int) -> Trial:
    """Run a command; it and all that it started are ended when one of them passes the limit.

    Args:
        command: With its words.
        layers: Of what it trains.
        limit_bytes: Of each process, by its high-water mark.

    Raises:
        RuntimeError: It failed otherwise than by memory.
    """
    began, peak, passed = time.monotonic(), 0, False
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=errors,
            env={**os.environ, "LIGHTEN_DEVICE": "cpu"},
        )  # fmt: skip
        try:
            while process.poll() is None and not passed:
                peak = max([peak, *map(_high_water, _family(process.pid))])
                passed = peak > limit_bytes or time.monotonic() - began > LONGEST_S
                time.sleep(LOOK_S)
        finally:
            if process.poll() is None:
                for pid in _family(process.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            process.wait()
        errors.seek(0)
        message = errors.read().strip()
    seconds = time.monotonic() - began
    if passed:
        why = f"over {limit_bytes / GIB:.2f} GiB" if peak > limit_bytes else "it takes too long"
        return Trial(layers, False, peak, seconds, why)
    if process.returncode:
        raise RuntimeError(message[-2000:])
    return Trial(layers, True, peak, seconds)


def _family(pid: int) -> list[int]:
    """A process and all that it and its children have started (Linux)."""
    family = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has just ended
            for child in task.read_text(encoding="ascii").split():
                family += _family(int(child))
    return family


def _high_water(pid: int) -> int:
    """The most that a process has held (Linux); 0 where it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in text.splitlines()
                 if line.startswith("VmHWM")), 0)  # fmt: skip
