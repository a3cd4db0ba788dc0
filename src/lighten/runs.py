"""The run folder: what is in it, and files that are written whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from lighten.errors import UserError
from lighten.recipe import Recipe, yaml_lines

RECIPE, INFO, METRICS, EVALUATION = "recipe.yaml", "run.json", "metrics.jsonl", "evaluation.json"
PLAN, MODEL = "plan.json", "model"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FileContent(Protocol):
    """What becomes a file without being in memory as bytes.

    Attributes:
        size: Bytes of the file, or nearly.
    """

    size: int

    def write(self, path: Path) -> None:
        """Write the file.

        Raises:
            OSError: It cannot be written.
        """


def write_bytes(path: Path, data: bytes | FileContent) -> None:
    """Write a file whole or not at all: under a temporary name, flushed to disk, then renamed.

    Raises:
        UserError: The disk is full; names the file and the bytes missing. An older file stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    size = len(data) if isinstance(data, bytes) else data.size
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data if isinstance(data, bytes) else b"")
            file.flush()
            os.fsync(file.fileno())
        if not isinstance(data, bytes):
            mode = temporary.stat().st_mode
            data.write(temporary)
            _settle(temporary, mode)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        written = temporary.stat().st_size if temporary.exists() else 0
        raise _told(error, path, size - written) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A folder to fill, put in the place of an older one when all of it is on disk.

    Raises:
        UserError: The disk is full; an older folder stays.
    """
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        probe = partial / ".mode"
        probe.touch()
        mode = probe.stat().st_mode
        probe.unlink()
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                _settle(path, mode)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _sync_folder(final.parent)
    except OSError as error:
        raise _told(error, final, 1) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _settle(path: Path, mode: int) -> None:
    """Flush a file that a library wrote, and make it as readable as any other.

    safetensors writes for the owner alone (0.7).
    """
    path.chmod(mode)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` for JSON; numbers that are not finite become null."""
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n")


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Add one JSON line to a file in one write.

    Raises:
        UserError: The disk is full.
    """
    data = (json.dumps(_finite(value), ensure_ascii=False) + "\n").encode()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            written = os.write(descriptor, data)
        finally:
            os.close(descriptor)
        if written < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise _told(error, path, len(data)) from error


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON lines of a file; a last line torn by a kill is passed over."""
    if not path.is_file():
        return
    for line in path.read_bytes().split(b"\n"):
        try:
            value = json.loads(line) if line else None
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def _told(error: OSError, path: Path, missing: int) -> UserError:
    if error.errno in _FULL:
        return UserError(
            f"the disk is full: {path} could not be written, {max(missing, 1)} bytes were missing; "
            "what was saved before is intact (free some space, then go on with --resume)"
        )
    return UserError(f"cannot write {path}: {error.strerror or error}")


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; systems that cannot open a folder for this do without."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(own) for own in value]
    return value


class Run:
    """A run folder.

    Raises:
        UserError: The folder holds no run.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not (self.folder / RECIPE).is_file():
            raise UserError(
                f"{self.folder} is not a run: it has no {RECIPE} (see: lighten runs list)"
            )

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    def _repr_html_(self) -> str:
        """What it changed, and its loss, for notebooks."""
        from lighten.notebook import run_html

        return run_html(self)

    @classmethod
    def create(cls, recipe: Recipe, *, resume: bool = False) -> Run:
        """Make the recipe's run folder, or take it up again; an ended run is moved aside, not lost.

        Raises:
            UserError: A run is there already and not to be resumed, or it has another recipe.
        """
        folder = recipe.run_folder
        there = (folder / RECIPE).is_file()
        if resume and there:
            run = cls(folder)
            run._require_same(recipe)
            return run
        if there and (folder / METRICS).exists():
            if cls(folder).info().get("status") in ("running", "interrupted"):
                raise UserError(
                    f"{folder} holds an unfinished run; go on with --resume, or choose another "
                    "--output_dir"
                )
            aside = free_name(folder)
            os.replace(folder, aside)
            recipe.notices.append(f"{folder} held an ended run, which is now {aside}")
        write_text(folder / RECIPE, recipe.to_yaml())
        return cls(folder)

    def _require_same(self, recipe: Recipe) -> None:
        free = {"output_dir", "report_to", "logging_steps", "save_total_limit", "evaluate",
                "sweep"}  # fmt: skip
        before, now = self.recipe().completed(), recipe.completed()
        changed = [key for key in now if key not in free and now[key] != before.get(key)]
        if changed:
            key = changed[0]
            raise UserError(
                f"cannot resume {self.folder}: {key} was {before.get(key)!r} and is now "
                f"{now[key]!r}; resume with the same recipe or choose another --output_dir"
            )

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    def recipe(self) -> Recipe:
        """The completed recipe of the run."""
        values, _ = yaml_lines.read(self.folder / RECIPE)
        # A completed recipe holds every default, also those that contradict each other only when
        # somebody asks for them.
        recipe = Recipe.model_validate(values)
        recipe._name = self.name
        return recipe

    def info(self) -> dict[str, Any]:
        """`run.json`: machine, base, data, how it ended. Empty before the run began."""
        return self._json(INFO) or {}

    def update(self, **parts: Any) -> dict[str, Any]:
        """Set parts of `run.json`."""
        info = {**self.info(), **parts}
        write_json(self.folder / INFO, info)
        return info

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`."""
        return list(read_lines(self.folder / METRICS))

    def truncate_metrics(self, step: int) -> None:
        """Drop what was logged after a step, and a torn last line: the run goes on from there."""
        if (self.folder / METRICS).exists():
            kept = [line for line in self.metrics() if line["step"] <= step]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
            write_text(self.folder / METRICS, text)

    def evaluation(self) -> dict[str, Any] | None:
        """`evaluation.json`, or None before `lighten evaluate`."""
        return self._json(EVALUATION)

    def plan(self) -> dict[str, Any] | None:
        """`plan.json`: what was predicted before the first step; None where it was not."""
        return self._json(PLAN)

    def adapters(self) -> dict[str, Path]:
        """Folder of each saved adapter by name, in the recipe's order."""
        names = [own.name for own in self.recipe().cohort()]
        folders = {name: self.folder / "adapters" / name for name in names}
        return {
            name: path
            for name, path in folders.items()
            if (path / "adapter_model.safetensors").is_file()
        }

    def model(self) -> Path | None:
        """Folder of the base that this run trained whole, once it is there."""
        path = self.folder / MODEL
        return path if (path / "config.json").is_file() else None

    def _json(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON: {error}") from error
        return value


def free_name(folder: Path) -> Path:
    """The folder's name with the first number that is not taken."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return aside


def find(folder: str | os.PathLike[str] = "runs") -> list[Run]:
    """The runs directly under a folder, by time of their start."""
    root = Path(folder)
    found = [Run(path.parent) for path in root.glob(f"*/{RECIPE}")] if root.is_dir() else []
    return sorted(found, key=lambda run: (str(run.info().get("started", "")), run.name))


def compare(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Runs side by side: a row per setting that differs, then a row per measurement.

    Returns:
        Rows with `what` and `values`, one value per run (None where it is not known).
    """
    recipes = [run.recipe().completed() for run in runs]
    rows = [
        {"what": key, "kind": "setting", "values": [own.get(key) for own in recipes]}
        for key in recipes[0]
        if key not in ("output_dir", "evaluate", "sweep")
        and any(own.get(key) != recipes[0].get(key) for own in recipes)
    ]
    measured = [_measured(run) for run in runs]
    names = dict.fromkeys(name for own in measured for name in own)
    return rows + [
        {"what": name, "kind": "measured", "values": [own.get(name) for own in measured]}
        for name in names
    ]


def _measured(run: Run) -> dict[str, Any]:
    """The figures of one run that a comparison shows, by label."""
    info, evaluation = run.info(), run.evaluation()
    training = info.get("training", {})
    found: dict[str, Any] = {"status": info.get("status")}
    for own in info.get("adapters", []):
        found[f"{own['name']}: held-out loss"] = own.get("eval_loss")
        found[f"{own['name']}: {own.get('kind', 'adapter')} MB"] = round(own["file_bytes"] / 1e6, 2)
    for model in (evaluation or {}).get("models", []):
        for metric, value in model["metrics"].items():
            found[f"{model['name']}: {metric}"] = value
    found["tokens/s"] = training.get("tokens_per_second")
    found["peak GiB"] = training["peak_bytes"] / 2**30 if "peak_bytes" in training else None
    found["training s"] = training.get("seconds")
    return found
