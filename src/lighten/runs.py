"""The run folder: what is in it."""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from lighten import folders, locks
from lighten.errors import UserError
from lighten.folders import AUDIT as AUDIT
from lighten.folders import BENCH as BENCH
from lighten.folders import EVALUATION as EVALUATION
from lighten.folders import EVALUATION_PARTS as EVALUATION_PARTS
from lighten.folders import INFO as INFO
from lighten.folders import METRICS as METRICS
from lighten.folders import MODEL as MODEL
from lighten.folders import PLAN as PLAN
from lighten.folders import QUANTIZE as QUANTIZE
from lighten.folders import RECIPE as RECIPE
from lighten.folders import is_run as is_run
from lighten.paths import data_sets, exists, expanded, name_of, split_limit
from lighten.recipe import Recipe, aliases, places, yaml_lines
from lighten.whole_files import FileContent as FileContent
from lighten.whole_files import alone_in as alone_in
from lighten.whole_files import append_line as append_line
from lighten.whole_files import finite as finite
from lighten.whole_files import read_lines as read_lines
from lighten.whole_files import remove_unfinished as remove_unfinished
from lighten.whole_files import whole_folder as whole_folder
from lighten.whole_files import write_bytes as write_bytes
from lighten.whole_files import write_json as write_json
from lighten.whole_files import write_text as write_text
from lighten.wording import typed

# How it stands with a run that can go on.
UNFINISHED = ("running", "interrupted", "killed")
# What a run may go on with otherwise than it began: it changes no result.
FREE = frozenset({
    "output_dir", "report_to", "logging_steps", "save_every", "save_steps", "save_total_limit",
    "evaluate", "quantize", "sweep",
    # Where things lie, and what is computed twice to hold less.
    "strategy", "offload_optimizer", "offload_params", "nvme_path", "offload_base",
    "activation_offload", "gradient_checkpointing", "gradient_checkpointing_layers",
    "gradient_checkpointing_part", "gradient_checkpointing_kwargs", "tokens_per_microbatch",
    "workers", "per_device_eval_batch_size", "torch_compile",
})  # fmt: skip
# Nor does how the examples of a step are cut, while they are as many.
CUT = frozenset({"per_device_train_batch_size", "gradient_accumulation_steps"})
MODEL_ALONE = "model alone"  # of one that measures a model and trains nothing


class Run:
    """A run folder.

    Args:
        folder: Where it is.
        begun_elsewhere: By another rank, whose machine's disk need not be this one's.

    Raises:
        UserError: The folder holds no run.
    """

    def __init__(self, folder: str | os.PathLike[str], *, begun_elsewhere: bool = False) -> None:
        self.folder = expanded(os.fspath(folder))
        self.claim: folders.Claim | None = None  # where this process began it
        # `run.json` before this process took it up again, until the training goes on.
        self.before_resumed: dict[str, Any] | None = None
        if not begun_elsewhere and not (self.folder / RECIPE).is_file():
            raise UserError(
                f"{self.folder} is not a run: it has no {RECIPE} (see: lighten runs list)"
            )

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    def _repr_html_(self) -> str:
        """What it changed, and its loss, for notebooks."""
        # The report knows what it draws; it is looked up when a notebook asks.
        return str(import_module("lighten.reporting.notebook").run_html(self))

    @classmethod
    def create(cls, recipe: Recipe, *, resume: bool = False) -> Run:
        """Make the recipe's run folder, or take it up again; an ended run is moved aside, not lost.

        Raises:
            UserError: A run is there already and not to be resumed, or it has another recipe.
        """
        folder = recipe.run_folder
        before = cls.before(recipe, resume=resume)
        if before is not None and resume:
            locks.acquire(folder)
            for place in (folder, folder / "adapters", folder / "exports"):
                remove_unfinished(place)  # of a process that was killed
            return before
        claim = folders.claim(folder, recipe.to_yaml(), aside=before is not None)
        if claim.aside is not None:
            recipe.notices.append(f"{folder} held an ended run, which is now {claim.aside}")
        run = cls(folder)
        run.claim = claim
        return run

    @classmethod
    def before(cls, recipe: Recipe, *, resume: bool = False) -> Run | None:
        """The run that is in a recipe's folder: to go on with, or to move aside; changes nothing.

        Raises:
            UserError: As for `create`.
        """
        folder = recipe.run_folder
        if (folder / folders.SWEEP).is_file() and (resume or not cls(folder)._has_ended()):
            raise UserError(
                f"{folder} holds a sweep; go on with: {folders.resume_command(folder)}, or choose "
                "another --output_dir"
            )
        if resume and (folder / RECIPE).is_file() and folders.is_run(folder):
            locks.require_unlocked(folder)
            run = cls(folder)
            if run.is_model_alone():
                raise UserError(
                    f"{folder} measures a model as it is: there is no training to go on with"
                )
            run._require_same(recipe)
            return run
        folders.require_ours(folder)
        if (folder / folders.SWEEP).is_file():
            return cls(folder)
        if not (folder / METRICS).exists():
            alone = (folder / RECIPE).is_file() and cls(folder).is_model_alone()
            return cls(folder) if alone else None
        run = cls(folder)
        if run.is_unfinished():
            raise UserError(
                f"{folder} holds an unfinished run; go on with: {folders.resume_command(folder)}, "
                "or choose another --output_dir"
            )
        return run

    def _has_ended(self) -> bool:
        return self.info().get("status") == "finished"

    @staticmethod
    def goes_on(folder: Path) -> bool:
        """Whether there is a run in a folder that can be taken up again."""
        return (folder / RECIPE).is_file() and Run(folder).is_unfinished()

    def is_finished(self) -> bool:
        """Whether it has ended as it should, and all that it trained is there."""
        recipe = self.recipe()
        has_model = self.model() is not None
        # One that diverged is there as it was before, unless its weights are no numbers.
        lost = sum(
            bool(adapter.get("diverged")) and not adapter.get("file_bytes")
            for adapter in self.info().get("adapters", [])
        )
        expected = len(recipe.cohort()) - lost
        complete = has_model if recipe.method == "full" else len(self.adapters()) == expected
        return complete and self._has_ended()

    def is_unfinished(self) -> bool:
        """Whether it can go on: it was stopped, killed, or is at work."""
        return self.info().get("status") in UNFINISHED

    def is_model_alone(self) -> bool:
        """Whether it measures a model as it is, and trains nothing."""
        return self.info().get("status") == MODEL_ALONE

    def adapter_alone(self) -> Path | None:
        """Folder of the adapter from elsewhere that it measures over its base, if it does."""
        folder = (self.info().get("adapter") or {}).get("folder")
        return None if folder is None else Path(folder)

    def _require_same(self, recipe: Recipe) -> None:
        before, now = self.recipe().completed(), recipe.completed()
        free = FREE
        if math.prod(before[key] for key in CUT) == math.prod(now[key] for key in CUT):
            free = FREE | CUT
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
        """The completed recipe of the run; settings that were renamed since have their new names.

        Raises:
            UserError: It holds what this version does not know.
        """
        values, _ = yaml_lines.read(self.folder / RECIPE)
        settings, _, problems = aliases.translate(values)
        settings = places.above(settings, self.folder)
        # A completed recipe holds every default, also those that contradict each other only when
        # somebody asks for them.
        try:
            recipe = Recipe.model_validate(settings)
        except ValueError as error:
            problems += [line.strip() for line in str(error).splitlines()[1:2]]
        if problems:
            raise UserError(
                f"{self.folder / RECIPE}: this version of lighten does not know {problems[0]}; "
                "train again, or use the version that wrote the run"
            )
        recipe._name = self.name
        return recipe

    def info(self) -> dict[str, Any]:
        """`run.json`: machine, base, data, how it ended. Empty before the run began."""
        info = self._json(INFO) or {}
        if info.get("status") == "running" and not locks.is_held(self.folder):
            info["status"] = "killed"  # it could not say so itself
        return info

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
            lines = [line for line in self.metrics() if line["step"] <= step]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_text(self.folder / METRICS, text)

    def evaluation(self) -> dict[str, Any] | None:
        """`evaluation.json`, or None before `lighten evaluate`."""
        return self._json(EVALUATION)

    def quantized(self) -> dict[str, Any] | None:
        """`quantize.json`: what smaller copies cost and keep; None before `lighten quantize`."""
        return self._json(QUANTIZE)

    def benched(self) -> dict[str, Any] | None:
        """`bench.json`: speed and memory; None before `lighten bench`."""
        return self._json(BENCH)

    def plan(self) -> dict[str, Any] | None:
        """`plan.json`: what was predicted before the first step; None where it was not."""
        return self._json(PLAN)

    def adapters(self) -> dict[str, Path]:
        """Folder of each saved adapter by name, in the recipe's order; or of the one measured."""
        if (measured := self.adapter_alone()) is not None:
            name = name_of(measured)
            folders = {"adapter" if name == "base" else name: measured}
        else:
            names = [spec.name for spec in self.recipe().cohort()]
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

    def untrained(self, what: str = "nothing trained") -> UserError:
        """What to say where something is wanted that was trained, and there is none."""
        if (self.folder / folders.SWEEP).is_file():
            inside = ", ".join(str(run.folder) for run in find(self.folder)[:3])
            return UserError(
                f"{self.folder} is a sweep; what it trained is in runs of their own"
                f"{f': name {inside}' if inside else ''}"
            )
        checkpoints = self.folder / "checkpoints"
        if self.is_unfinished() and any(checkpoints.glob("checkpoint-*")):
            adapters = checkpoints.glob("checkpoint-*/adapters/*")
            newest = max(adapters, key=lambda a: int(a.parts[-3].rpartition("-")[2]), default=None)
            held = f" (or name what its newest checkpoint holds: {typed(newest)})" if newest else ""
            command = folders.resume_command(self.folder)
            return UserError(f"{self.folder} has {what} yet; go on with: {command}{held}")
        return UserError(f"{self.folder} has {what} yet; train it first")

    def _json(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON: {error}") from error
        return value


def now() -> str:
    """Date and time (UTC), as files keep them."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@contextmanager
def model_alone(recipe: Recipe, adapter: Path | None = None) -> Iterator[Run]:
    """A run's folder in which a model is measured and nothing trained; none where that fails.

    Args:
        recipe: What is measured on what.
        adapter: Folder of one over it.

    Raises:
        UserError: The folder is somebody's, or a run that trains, another model's figures or those
            on other data are in it.
    """
    folder, subject = recipe.run_folder, str(adapter or recipe.model_name_or_path)
    if (folder / RECIPE).is_file() and not Run(folder).is_model_alone():
        raise UserError(
            f"{folder} holds a run that trains; choose another --output_dir for measuring "
            f"{subject}, or measure the run: lighten evaluate {typed(folder)}"
        )
    if (folder / RECIPE).is_file():
        before = Run(folder)
        measured = str(before.adapter_alone() or before.recipe().model_name_or_path)
        if measured != subject:
            raise UserError(
                f"{folder} has the figures of {measured}; choose another --output_dir for {subject}"
            )
        for name in ("dataset", "eval_dataset"):
            was, asked = getattr(before.recipe(), name), getattr(recipe, name)
            if _rows_of(was) != _rows_of(asked):
                raise UserError(
                    f"{folder} has figures on other data: {name} was {was or 'not set'} and is now "
                    f"{asked or 'not set'}; choose another --output_dir"
                )
    claim = folders.claim(folder, recipe.to_yaml(), aside=False)
    try:
        run = Run(folder)
        of_adapter = {} if adapter is None else {"adapter": {"folder": str(adapter)}}
        run.update(status=MODEL_ALONE, **of_adapter)
        yield run
    except BaseException:
        claim.undo()
        raise
    finally:
        locks.release(folder)


def _rows_of(setting: str | Sequence[str] | None) -> list[tuple[Path, int | None]]:
    """Which data a setting names, and how many rows of each."""
    named = map(split_limit, data_sets(setting or ()))
    return [(path.resolve() if exists(path) else path, limit) for path, limit in named]


def folder_of(target: str) -> Path | None:
    """Where a run lies that is given by its folder or its name under `runs/`; None: nowhere."""
    folders = (expanded(target), expanded(str(Path("runs") / target)))
    return next((folder for folder in folders if exists(folder / RECIPE)), None)


def find(folder: str | os.PathLike[str] = "runs") -> list[Run]:
    """The runs directly under a folder, by time of their start."""
    root = Path(folder)
    runs = [Run(path.parent) for path in root.glob(f"*/{RECIPE}")] if root.is_dir() else []
    return sorted(runs, key=lambda run: (str(run.info().get("started", "")), run.name))


def compare(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Runs side by side: a row per setting that differs, then a row per measurement.

    Returns:
        Rows with `what` and `values`, one value per run (None where it is not known, or has no
        effect).
    """
    recipes = [run.recipe() for run in runs]
    settings = [recipe.completed() for recipe in recipes]
    without_effect = [recipe.without_effect() for recipe in recipes]
    rows = []
    for key in settings[0]:
        values = [values.get(key) for values in settings]
        counting = [
            value for value, unused in zip(values, without_effect, strict=True) if key not in unused
        ]
        if key in ("output_dir", "evaluate", "quantize", "sweep") or not any(
            value != counting[0] for value in counting
        ):
            continue
        row = [None if key in unused else value
               for value, unused in zip(values, without_effect, strict=True)]  # fmt: skip
        rows.append({"what": key, "kind": "setting", "values": row})
    measured = [_measured(run) for run in runs]
    names = dict.fromkeys(name for figures in measured for name in figures)
    return rows + [
        {"what": name, "kind": "measured", "values": [figures.get(name) for figures in measured]}
        for name in names
    ]


def _measured(run: Run) -> dict[str, Any]:
    """The figures of one run that a comparison shows, by label."""
    info, evaluation = run.info(), run.evaluation()
    training = info.get("training", {})
    figures: dict[str, Any] = {"status": info.get("status")}
    for adapter in info.get("adapters", []):
        figures[f"{adapter['name']}: held-out loss"] = adapter.get("eval_loss")
        figures[f"{adapter['name']}: {adapter.get('kind', 'adapter')} MB"] = round(
            adapter["file_bytes"] / 1e6, 2
        )
    for model in (evaluation or {}).get("models", []):
        for metric, value in model["metrics"].items():
            figures[f"{model['name']}: {metric}"] = value
    figures["tokens/s"] = training.get("tokens_per_second")
    figures["peak GiB"] = training["peak_bytes"] / 2**30 if "peak_bytes" in training else None
    figures["training s"] = training.get("seconds")
    return figures
