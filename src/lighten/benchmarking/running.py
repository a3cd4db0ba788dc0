"""The verb `bench`: all parts that apply, each in processes of its own, in one file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lighten import whole_files
from lighten.artifacts.source import Artefact, open_source
from lighten.benchmarking import PARTS, attention
from lighten.benchmarking.limits import largest
from lighten.benchmarking.size import file_bytes
from lighten.benchmarking.training import DECIDED, WAYS
from lighten.errors import UserError
from lighten.jobs import MODELS, in_child
from lighten.machine import devices, hardware
from lighten.models.load import checksum, weight_files
from lighten.planning import predict, serving
from lighten.planning.answers import answer_peak
from lighten.planning.build import config_of
from lighten.recipe import Recipe
from lighten.recipe.fields import RecipeFields, lora_settings
from lighten.runs import now
from lighten.training import checkpoints
from lighten.wording import first_line

VERSION = 1
FILE = "bench.json"
# What `generate` measures and in which engine; merged weights are a base to ours.
GENERATED = (
    ("base", "transformers"), ("base", "lighten"), ("adapter", "transformers"),
    ("adapter", "lighten"), ("merged", "transformers"),
)  # fmt: skip
# What has to be the same for the parts of an earlier command to stay in a run's file.
_ALIKE = ("version", "base_sha256", "adapter", "adapter_sha256", "machine", "versions", "commit",
          "tree_clean", "device")  # fmt: skip
_UNITS = {"": 1, "k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        prompt_tokens: Of `generate`.
        batch_sizes: Of `generate`.
        new_tokens: Of an answer.
        lengths: Of `attention`.
        memory_bytes: What a process may hold; None: nine tenths of what is free.
        seconds: For the repeats of each figure.
        timeout_s: For each process.
    """

    prompt_tokens: tuple[int, ...] = (32, 128, 512)
    batch_sizes: tuple[int, ...] = (1, 4)
    new_tokens: int = 32
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    memory_bytes: int | None = None
    seconds: float = 10.0
    timeout_s: float = 600.0

    def check(self) -> None:
        """Raise what is wrong.

        Raises:
            UserError: A setting out of its bounds.
        """
        if self.new_tokens < 2:
            raise UserError("new_tokens: an answer that is timed has 2 tokens or more")
        for name in ("prompt_tokens", "batch_sizes", "lengths"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise UserError(f"{name}: give whole numbers from 1, such as 128,512")
        if self.seconds <= 0 or self.timeout_s <= 0:
            raise UserError("seconds and timeout_s must be above 0")


def bytes_of(text: str | int) -> int:
    """Bytes of `8GiB`, `512M` (powers of 1024), `8GB` (of 1000) or a number of bytes.

    Raises:
        UserError: It is none of these.
    """
    match = _SIZE.fullmatch(str(text))
    if match is None or not float(match[1]):
        raise UserError(f"memory: {text!r} is no amount of memory; write 8GiB or 512MiB")
    decimal = (match[3] or "ib").lower() == "b" and match[2]
    power = _UNITS[match[2].lower()] if match[2] else 0
    return int(float(match[1]) * (1000 if decimal else 1024) ** power)


class Bench:
    """One target with its recipe, and what is measured of it.

    Args:
        target: What is measured.
        recipe: The user's settings for training.
        settings: How much.
        log: Given a line about what is being done.
    """

    def __init__(
        self, target: Artefact, recipe: Recipe, settings: Settings, log: Callable[[str], None]
    ) -> None:
        self.target, self.recipe, self.settings, self.log = target, recipe, settings, log
        self.device = devices.named(None)
        free = int(0.9 * (self.device.memory_bytes or 2**62))
        self.limit = settings.memory_bytes or free

    @property
    def limit_of_children(self) -> int | None:
        """What a process may hold of main memory."""
        return self.limit if self.device.kind == "cpu" else None

    def size(self) -> Iterator[dict[str, Any]]:
        """Parameters, files and memory."""
        records = self._child("size", {
            "model": self.target.base, "adapter": self._adapter, "revision": self.target.revision,
            "device": self.device.kind,
        })  # fmt: skip
        for record in records:
            yield {"part": "size", "name": record.get("variant", "base"), **record}
        if self.target.run is not None:
            for folder in checkpoints.listing(self.target.run.folder / "checkpoints"):
                size_bytes = sum(
                    path.stat().st_size for path in folder.rglob("*") if path.is_file()
                )
                yield {"part": "size", "name": folder.name, "variant": folder.name,
                       "file_bytes": size_bytes,
                       "weight_file_bytes": file_bytes(folder)}  # fmt: skip

    def generate(self) -> Iterator[dict[str, Any]]:
        """Answers of the base, of the adapter, and of the two merged; in transformers, in ours."""
        settings = self.settings
        dtype = self.device.dtype(self.recipe.compute_dtype).value
        most_rows = max(settings.batch_sizes)
        for variant, engine in GENERATED if self._adapter else GENERATED[:2]:
            label = variant if engine == "transformers" else f"{variant}, our engine"
            self.log(f"generate: {label}")
            records = self._child("generation", {
                "model": self.target.base, "variant": variant, "adapter": self._adapter,
                "revision": self.target.revision, "device": self.device.kind,
                "dtype": self.recipe.compute_dtype, "prompt_tokens": settings.prompt_tokens,
                "batch_sizes": settings.batch_sizes, "new_tokens": settings.new_tokens,
                "budget_s": settings.seconds, "engine": engine,
            })  # fmt: skip
            for record in records:
                name = label
                if "prompt_tokens" in record:
                    name += f", {record['prompt_tokens']} tokens, {record['batch_size']} at once"
                if "peak_bytes" in record:
                    record["predicted_bytes"] = answer_peak(
                        self.target.base, dtype=dtype, prompt_tokens=record["prompt_tokens"],
                        new_tokens=record["new_tokens"], rows=record["batch_size"],
                        adapter_bytes=self._adapter_bytes if variant == "adapter" else 0,
                        slots=most_rows if engine == "lighten" else None,
                        device=self.device.kind, revision=self.target.revision,
                    )  # fmt: skip
                yield {"part": "generate", "name": name, "variant": variant, "engine": engine,
                       **record}  # fmt: skip

    def attention(self) -> Iterator[dict[str, Any]]:
        """Attention of one layer of the model's shape."""
        text = config_of(self.recipe)[0].get_text_config()
        # Of layers with heads of their own the last one: it attends to all tokens.
        layer = serving.layer_configs(text)[-1]
        heads = int(getattr(layer, "num_attention_heads", None) or 0)
        if not heads:
            yield {"part": "attention", "name": text.model_type, "why": "its layers do not attend"}
            return
        features = getattr(layer, "head_dim", None) or layer.hidden_size // heads
        for training in (False, True):
            for kind in attention.KINDS:
                phase = "training step" if training else "forward"
                self.log(f"attention: {kind}, {phase}")
                job: dict[str, Any] = {
                    "kind": kind, "heads": heads, "features": int(features),
                    "key_heads": serving.key_heads(layer),
                    "lengths": self.settings.lengths, "device": self.device.kind,
                    "dtype": hardware.choose_dtype("auto", self.device.kind).value,
                    "training": training, "budget_s": self.settings.seconds,
                }  # fmt: skip
                # What cannot run here needs no process to say so.
                if attention.obstacle(kind, self.device.kind, training) is None:
                    records = list(self._child("attention", job))
                else:
                    records = list(attention.run(**job))
                yield from attention_records(kind, phase, self.settings.lengths, records)

    def train(self) -> Iterator[dict[str, Any]]:
        """Steps of each way to train, with and without checkpointing."""
        notes: list[str] = []
        rows = predict.read_rows(self.recipe, notes)
        if (line := not_followed(self.recipe)) is not None:
            notes.append(line)
        for note in notes:
            self.log(note)
        planner = predict.planner_for(self.device, rows, calibrate=False)
        for way, settings in WAYS.items():
            for checkpointing in (False, True):
                name = f"{way}, checkpointing" if checkpointing else way
                self.log(f"train: {name}")
                record = {"part": "train", "name": name, "way": way, "checkpointing": checkpointing}
                try:
                    recipe = way_of(self.recipe, settings, checkpointing=checkpointing)
                    plan = planner(recipe)
                except UserError as error:
                    yield {**record, "why": first_line(error)}
                    continue
                memory = plan.memory
                predicted = memory.expected if memory.allocated is None else memory.allocated
                records = self._child("training", {
                    "recipe": recipe.completed(), "kind": self.device.kind,
                    "lengths": predict.lengths_of(rows),
                    "supervised": predict.supervised_share(rows),
                    "least": 5, "most": 20, "budget_s": self.settings.seconds,
                })  # fmt: skip
                for measured in records:
                    yield {**record, "predicted_bytes": predicted, **measured}

    def max_batch(self) -> Iterator[dict[str, Any]]:
        """The most rows and the longest context."""
        yield from largest(
            self.recipe, self.device, self.limit, timeout_s=self.settings.timeout_s,
            log=self.log,
        )  # fmt: skip

    @property
    def _adapter(self) -> str | None:
        return None if self.target.adapter is None else str(self.target.adapter)

    @property
    def _adapter_bytes(self) -> int:
        return 0 if self.target.adapter is None else file_bytes(self.target.adapter)

    def _child(self, job: str, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The records of a job; the last one says why it ended early, if it did."""
        outcome = in_child(
            f"lighten.benchmarking.{job}",
            settings,
            libraries=("torch",) if job == "attention" else MODELS,
            memory_bytes=self.limit_of_children,
            timeout_s=self.settings.timeout_s,
        )
        yield from outcome.records
        if outcome.error is not None:
            yield {"why": outcome.error, "out_of_memory": outcome.out_of_memory,
                   "process_peak_bytes": outcome.process_peak_bytes}  # fmt: skip


def way_of(recipe: Recipe, settings: dict[str, Any], *, checkpointing: bool) -> Recipe:
    """A recipe as one way to train; its rate is constant, so that every step moves the weights.

    What has no effect on that way is left out.
    """
    idle = ["warmup_ratio"]
    first: dict[str, Any] = {}
    if settings["method"] == "full":
        idle += lora_settings()
        cohorts = {key: getattr(recipe, key) for key in ("learning_rate", "seed")}
        first = {key: value[0] for key, value in cohorts.items() if isinstance(value, list)}
    if not settings.get("load_in_4bit"):
        idle += [key for key in RecipeFields.model_fields if key.startswith("bnb_4bit_")]
    if not checkpointing:
        idle += [
            key for key in RecipeFields.model_fields if key.startswith("gradient_checkpointing_")
        ]
    return recipe.changed({
        "load_in_4bit": False, "load_in_8bit": False, "trainable_layers": None,
        "offload_params": "none", "dtype": recipe.compute_dtype,
        **{key: _default(key) for key in idle}, **first, **settings,
        "gradient_checkpointing": checkpointing, "lr_scheduler_type": "constant",
        "lr_scheduler_kwargs": {}, "warmup_steps": 0,
    })  # fmt: skip


def not_followed(recipe: Recipe) -> str | None:
    """A line on the recipe's settings that every way to train has in a way of its own, or None."""
    names = [key for key in DECIDED if getattr(recipe, key) != _default(key)]
    if not names:
        return None
    return (
        f"train: {', '.join(names)} of the recipe {'is' if len(names) == 1 else 'are'} not "
        "followed: each row of the table has its own"
    )


def _default(key: str) -> Any:
    return RecipeFields.model_fields[key].get_default(call_default_factory=True)


def attention_records(
    kind: str, phase: str, lengths: Sequence[int], records: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """A record for each length, and one with the growth over them.

    Args:
        kind: The implementation.
        phase: `forward` or `training step`.
        lengths: That were to be measured.
        records: What came of it; the last one may say why the process ended.
    """
    measured = {entry["tokens"]: entry for entry in records if "tokens" in entry}
    failure = next((entry for entry in records if "tokens" not in entry), None)
    for tokens in sorted(lengths):
        record = {"part": "attention", "name": f"{kind}, {phase}, {tokens} tokens", "kind": kind,
                  "what": phase, "tokens": tokens}  # fmt: skip
        if tokens in measured:
            yield {**record, **measured[tokens]}
        elif failure is not None:
            yield {**record, **failure}
            failure = {"why": "not tried: a shorter one did not end", "out_of_memory": False}
    timed = [entry for entry in measured.values() if "seconds" in entry]
    if not timed:
        return
    sizes = [entry["tokens"] for entry in timed]
    oom = [entry for entry in records if entry.get("out_of_memory")]
    yield {
        "part": "attention", "name": f"{kind}, {phase}, growth", "kind": kind, "what": phase,
        "time_exponent": attention.growth(sizes, [entry["seconds"]["median"] for entry in timed]),
        "memory_exponent": attention.growth(sizes, [entry["peak_bytes"] for entry in timed]),
        "runs_out_at": min((t for t in lengths if t > max(sizes)), default=None) if oom else None,
    }  # fmt: skip


def bench(
    target: str,
    parts: Sequence[str] = (),
    *,
    recipe: Callable[[str], Recipe],
    adapter: str | None = None,
    output: Path | None = None,
    settings: Settings | None = None,
    log: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure a model or a run here; see `lighten.benchmarking`.

    In a run's `bench.json` the other parts of earlier commands stay, if they are of the same
    weights, machine and versions. The file is written after each part; one that fails has a record
    of why, and the others are measured all the same.

    Args:
        target: A model, or a run.
        parts: Of `PARTS`; none: all.
        recipe: Settings for training, from the base's name.
        adapter: Of a run with several, which.
        output: Where the file goes; None: `bench.json` in a run's folder.
        settings: How much is measured.
        log: Given a line about what is being done.

    Raises:
        UserError: Something the user can mend.
        Exception: What the first part failed with, where none could be measured.
    """
    effective = settings or Settings()
    effective.check()
    for part in parts:
        if part not in PARTS:
            raise UserError(f"bench: {part!r} is no part; parts are {', '.join(PARTS)}")
    source = open_source(target, adapter=adapter)
    path = output or (None if source.run is None else source.run.folder / FILE)
    if path is not None and path.is_dir():
        raise UserError(f"--output {path} is a folder; name a file in it, such as {path / FILE}")
    base = source.base
    benchmark = Bench(source, recipe(base), effective, log or (lambda _: None))
    commit, clean = hardware.commit()
    records: list[dict[str, Any]] = []
    result = {
        "version": VERSION, "created": now(), "target": target, "base": base,
        "base_sha256": checksum(weight_files(source.base_folder)), "adapter": benchmark._adapter,
        "adapter_sha256": _adapter_checksum(source.adapter),
        "machine": hardware.machine().to_dict(), "versions": hardware.versions(),
        "commit": commit, "tree_clean": clean, "device": benchmark.device.label,
        "settings": {**asdict(effective), "memory_bytes": benchmark.limit}, "records": records,
    }  # fmt: skip
    into_run = output is None and path is not None
    earlier = _earlier_records(path, result, set()) if into_run and path is not None else []
    failures: list[Exception] = []
    for part in parts or PARTS:
        benchmark.log(part)
        try:
            for record in getattr(benchmark, part.replace("-", "_"))():
                records.append(record)  # those before a failure stay
        except Exception as error:  # of any library: what was measured must not be lost with it
            failures.append(error)
            records.append({"part": part, "name": part, "why": _reason(error)})
        if len(failures) == len(records):
            continue
        if into_run:
            measured = {record["part"] for record in records}
            kept = [record for record in earlier if record["part"] not in measured]
            result["earlier_parts"] = list(dict.fromkeys(record["part"] for record in kept))
            result["records"] = [*records, *kept]
        if path is not None:
            whole_files.write_json(path, result)
    if failures and len(failures) == len(records):
        raise failures[0]
    if path is not None:
        result["path"] = str(path)
    return result


def _reason(error: Exception) -> str:
    """Why a part ended, in a line: a fault that is not the user's with its kind."""
    if isinstance(error, UserError):
        return first_line(error)
    return f"{type(error).__name__}: {first_line(error)}"


def _adapter_checksum(adapter: Path | None) -> str | None:
    return None if adapter is None else checksum(sorted(adapter.glob("adapter_*.safetensors")))


def _earlier_records(
    path: Path, result: Mapping[str, Any], measured: set[str]
) -> list[dict[str, Any]]:
    """Records of the file that is there which may stand beside those of now: of other parts."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        alike = all(before[key] == whole_files.as_written(result[key]) for key in _ALIKE)
        return [r for r in before["records"] if alike and r["part"] not in measured]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # there is none, or another version's
