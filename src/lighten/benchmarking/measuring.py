"""One row of an audit: its job, in a process of its own, and what the plan says of it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten.artifacts.source import open_source
from lighten.benchmarking.learning import select_rows
from lighten.benchmarking.size import file_bytes
from lighten.benchmarking.techniques import CHOSEN, LONG, TOGETHER, TRAINING, Technique, storage_of
from lighten.jobs import MODELS, Outcome, in_child
from lighten.machine.devices import Device
from lighten.planning import predict
from lighten.planning.answers import answer_peak, resident_after
from lighten.recipe import Recipe

if TYPE_CHECKING:
    from lighten.benchmarking.audit import Settings
    from lighten.training.rows import Rows

ADAPTER = "adapter"
# Seconds for the repeats of one answer.
ANSWER_S = 6.0
QUANTIZED_REPEATS = 3
# A long row may take this share of what is left, over all rows of its group, and is one of these.
LONG_SHARE, LONG_LENGTHS = 0.15, (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
# Four rows of four steps each, two of which check the loss and warm up.
LONG_ROWS_S = 16


@dataclass
class Measuring:
    """Makes the jobs of an audit's rows.

    Attributes:
        recipe: The user's recipe under some settings.
        device: This machine's.
        settings: Of the audit.
        folder: Of the audit; the adapter of the row “all together” is kept there.
        steps: Optimiser steps of a training.
    """

    recipe: Callable[[Mapping[str, Any]], Recipe]
    device: Device
    settings: Settings
    folder: Path
    steps: int = 2
    _rows: Rows | None = None

    @property
    def adapter(self) -> Path:
        """Where the adapter that answers take is."""
        return self.folder / ADAPTER

    def process(
        self, technique: Technique, timeout_s: float, *, measures_loss: bool
    ) -> tuple[Outcome, float]:
        """Measure a row in a process of its own; what came of it, and the seconds it took."""
        began = time.monotonic()
        if technique.target is not None:
            outcome = self._quantized(technique, timeout_s, measures_loss=measures_loss)
        else:
            job, options = self._job(technique, measures_loss=measures_loss)
            outcome = self._child(job, options, timeout_s)
        return outcome, time.monotonic() - began

    def _child(
        self, job: str, options: Mapping[str, Any], timeout_s: float,
        libraries: tuple[str, ...] = MODELS,
    ) -> Outcome:  # fmt: skip
        on_processor = self.device.kind == "cpu"
        return in_child(
            job, options, libraries=libraries, timeout_s=max(1.0, timeout_s),
            memory_bytes=self.memory_bytes if on_processor else None,
        )  # fmt: skip

    @property
    def memory_bytes(self) -> int:
        """What a process may hold."""
        return self.settings.memory_bytes or int(0.9 * (self.device.memory_bytes or 2**62))

    def training_recipe(self, technique: Technique) -> Recipe:
        """The recipe of a training row."""
        return self.recipe({
            **technique.settings, "max_eval_samples": self.settings.examples,
            "lr_scheduler_type": "constant", "lr_scheduler_kwargs": {}, "warmup_steps": 0,
        })  # fmt: skip

    def _job(self, technique: Technique, *, measures_loss: bool) -> tuple[str, dict[str, Any]]:
        """The job of a row, and what it takes."""
        if technique.group == TRAINING:
            keeps_adapter = technique.name == TOGETHER and measures_loss
            return "lighten.benchmarking.learning", {
                "recipe": self.training_recipe(technique).completed(), "kind": self.device.kind,
                "steps": self.steps, "measures_loss": measures_loss,
                "adapter": str(self.adapter) if keeps_adapter else None,
            }  # fmt: skip
        if technique.group == LONG:
            recipe = self.training_recipe(technique)
            return "lighten.benchmarking.training", {
                "recipe": recipe.completed(), "kind": self.device.kind,
                "lengths": [recipe.max_length], "supervised": 1.0, "least": 2, "most": 2,
                "budget_s": 0.0,
            }  # fmt: skip
        adapter = None if technique.needs is None else str(self.adapter)
        return "lighten.benchmarking.answering", {
            "recipe": self._base_recipe().completed(), "device": self.device.kind,
            "prompt_tokens": self.settings.prompt_tokens,
            "new_tokens": self.settings.new_tokens, "budget_s": ANSWER_S, "adapter": adapter,
            "measures_loss": measures_loss, **technique.settings,
        }  # fmt: skip

    def _base_recipe(self) -> Recipe:
        return self.recipe({**CHOSEN, "max_eval_samples": self.settings.examples})

    def _quantized(self, technique: Technique, timeout_s: float, *, measures_loss: bool) -> Outcome:
        """Write a format and measure it; both are processes of their own."""
        from lighten.quantization import child as quantizing
        from lighten.quantization.table import weight_bytes
        from lighten.quantization.targets import parse

        assert technique.target is not None
        (target,) = parse(technique.target)
        deadline = time.monotonic() + timeout_s
        with tempfile.TemporaryDirectory(prefix="lighten-audit-") as temporary:
            scratch = Path(temporary)
            model, conversion = open_source(self._base_recipe().model_name_or_path).base_folder, {}
            if technique.needs is not None:
                model = scratch / "merged"
                merging = {"adapter": str(self.adapter), "folder": str(model)}
                outcome = self._child("lighten.benchmarking.merging", merging, timeout_s)
                if outcome.error is not None:
                    return outcome
            folder = scratch / "made"
            folder.mkdir()
            job: dict[str, Any] = {
                "name": target.name, "kind": target.kind, "type": target.type, "label": "model",
                "model": str(model), "folder": str(folder), "calibration": [],
            }  # fmt: skip
            libraries = quantizing.libraries_of(target.kind)
            outcome = self._child(
                "lighten.quantization.child",
                {"job": {**job, "do": "make"}},
                deadline - time.monotonic(),
                libraries,
            )
            if outcome.error is not None:
                return outcome
            conversion = outcome.records[-1]
            outcome = self._child(
                "lighten.quantization.child",
                {"job": {
                    **job, "do": "measure", **self._measuring_options(measures_loss=measures_loss),
                }},
                deadline - time.monotonic(), libraries,
            )  # fmt: skip
            for record in outcome.records:
                rows = record.pop("rows", None) or {"nll": [], "tokens": []}
                record["losses"] = [
                    list(pair) for pair in zip(rows["nll"], rows["tokens"], strict=True)
                ]
                record["shipped_bytes"] = weight_bytes(folder)
                record["made_s"], record["made_peak_bytes"] = (
                    conversion["seconds"],
                    conversion["peak_bytes"],
                )
                record["memory_by"] = "resident set after loading"
        return outcome

    def _measuring_options(self, *, measures_loss: bool) -> dict[str, Any]:
        rows = self.rows(self._base_recipe()).held_out
        held_out = [] if rows is None or not measures_loss else [
            {"ids": [int(token) for token in row.input_ids],
             "supervised": [bool(flag) for flag in row.supervised]}
            for row in rows.rows if any(row.supervised[1:])
        ]  # fmt: skip
        length = max(2, self.settings.prompt_tokens)
        return {
            "rows": held_out, "prompts": [], "rooms": [], "store": None,
            "prompt": [place % 64 + 5 for place in range(length)], "reference": False,
            "repeats": QUANTIZED_REPEATS,
        }  # fmt: skip

    def rows(self, recipe: Recipe) -> Rows:
        """A recipe's data, encoded.

        Raises:
            UserError: They cannot be.
        """
        from lighten.training.base import tokenizer_of
        from lighten.training.rows import load_rows

        if self._rows is None:
            self._rows = load_rows(recipe, tokenizer_of(recipe))
        return self._rows

    def predicted(self, technique: Technique) -> dict[str, Any]:
        """What the plan says of a row's peak, and of its step.

        Raises:
            UserError: It cannot be planned.
        """
        if technique.group == TRAINING:
            recipe = self.training_recipe(technique).changed({"max_steps": self.steps})
            rows = select_rows(self.rows(recipe), recipe, self.steps)
            planner = predict.planner_for(self.device, rows, calibrate=False)
        elif technique.group == LONG:
            recipe = self.training_recipe(technique)
            planner = predict.planner_for(self.device, None, calibrate=False)
        else:
            return self._answer_predicted(technique)
        plan = planner(recipe)
        memory = plan.memory
        expected = memory.expected if memory.allocated is None else memory.allocated
        return {
            "predicted_bytes": expected,
            "predicted_seconds": None if plan.time is None else plan.time.seconds,
        }  # fmt: skip

    def _answer_predicted(self, technique: Technique) -> dict[str, Any]:
        recipe = self._base_recipe()
        name, revision = recipe.model_name_or_path, recipe.revision
        if technique.target is not None:
            stored = storage_of(technique.target)
            if stored is None:
                return {}
            resident = resident_after(name, storage=stored[0], rest=stored[1], revision=revision)
            return {"predicted_bytes": resident}
        settings = technique.settings
        beside = technique.needs is not None and not settings["merged"]
        return {
            "predicted_bytes": answer_peak(
                name, dtype=str(settings["dtype"]), attention=str(settings["attention"]),
                prompt_tokens=self.settings.prompt_tokens, new_tokens=self.settings.new_tokens,
                adapter_bytes=file_bytes(self.adapter) if beside else 0,
                device=self.device.kind, revision=revision,
            )
        }  # fmt: skip

    def long_tokens(self, left_s: float) -> int | None:
        """The longest row whose steps there is time for, by the plan; None: none of them."""
        planner = predict.planner_for(self.device, None, calibrate=False)
        positions = predict.described(self._base_recipe()).context_length or LONG_LENGTHS[-1]
        longest = None
        for tokens in (length for length in LONG_LENGTHS if length <= positions):
            plan = planner(self.recipe({
                **CHOSEN, "gradient_checkpointing": True, "max_length": tokens,
                "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
            }))  # fmt: skip
            if plan.time is None or LONG_ROWS_S * plan.time.seconds > LONG_SHARE * left_s:
                break
            longest = tokens
        return longest


def merged(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What a process measured, its records in one."""
    combined: dict[str, Any] = {}
    for record in records:
        combined |= record
    # A long row, of `lighten.benchmarking.training`.
    if "seconds" in combined and "tokens" in combined:
        samples = combined["seconds"]["samples"]
        combined |= {"step_seconds": samples, "step_tokens": [combined["tokens"]] * len(samples)}
    return combined
