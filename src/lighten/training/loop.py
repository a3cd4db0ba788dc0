"""The training loop: steps, evaluations and checkpoints of a cohort, from any step to the last."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from lighten import runs
from lighten.cpu import allocator
from lighten.data.batches import MicroBatch, TokenRow
from lighten.engine import forked
from lighten.engine.adapter_optimizer import AdapterOptimizer
from lighten.engine.forked import Forked
from lighten.engine.forward_backward import undropped
from lighten.engine.memory_errors import ran_out
from lighten.engine.schedule import in_steps
from lighten.engine.step import AdapterStep, TrainingDiverged, train_step
from lighten.engine.validation import held_out_over
from lighten.engine.validation_loss import ValidationLoss
from lighten.engine.workers import Threads, Workers
from lighten.folders import resume_command
from lighten.machine.hardware import PeakMemory
from lighten.parallel import ranks
from lighten.recipe.section import seconds
from lighten.training import checkpoints, out_of_memory
from lighten.training.checkpoints import TrainerState
from lighten.training.interrupt import Interrupted, StopSignals
from lighten.training.prediction import Prediction
from lighten.training.progress import TrainingProgress
from lighten.training.setup import Setup
from lighten.training.step_batches import StepBatches
from lighten.training.time_budget import StepsInTime


class Pruner(Protocol):
    """Asked after every step; what it names leaves the batch and keeps its weights."""

    def leaving(
        self, step: int, losses: Mapping[str, ValidationLoss], active: Sequence[str]
    ) -> Collection[str]:
        """The adapters that train no further.

        Args:
            step: Optimiser steps made.
            losses: Held-out losses measured after this step; empty where none were.
            active: Adapters still training.
        """

    def diverged(self, step: int, name: str) -> None:
        """An adapter's loss or gradient is not a number: it leaves, the others go on."""


class Loop:
    """A run's steps over its setup.

    Args:
        setup: What to train.
        folder: The run folder.
        state: Where the run stands.
        progress: Where to show it.
        memory: Started before the base was loaded.
        prediction: What was planned, to say what took more if memory runs out.
        retries: Make a step for which memory runs out again with smaller micro-batches. A benchmark
            leaves it off: it would measure something else than it says.
        pruner: May take adapters out early. An adapter that diverges leaves with or without one;
            where all have, the run fails.
        saves: Write checkpoints. A measurement leaves none.
    """

    def __init__(
        self,
        setup: Setup,
        folder: Path,
        state: TrainerState,
        progress: TrainingProgress,
        memory: PeakMemory,
        prediction: Prediction | None = None,
        *,
        pruner: Pruner | None = None,
        retries: bool = False,
        saves: bool = True,
    ) -> None:
        self.setup, self.folder, self.state = setup, folder, state
        self.progress, self.memory, self.prediction = progress, memory, prediction
        self.pruner, self._saves = pruner, saves
        self._losses: dict[str, ValidationLoss] = {}
        self._pages = allocator.KeptPages(setup.accelerator.device.type)
        self._retries, self._watch = retries, out_of_memory.Watch(setup.adapters)
        self.main = setup.accelerator.is_main_process
        self._batches = StepBatches(setup)
        self._workers: Workers | None = None
        self._agreed = False
        self._saved_at, self._saving_s = time.monotonic(), 0.0
        self._first, self._forks = state.step, forked.possible()
        self._time: StepsInTime | None = None

    def run(self) -> None:
        """Train from the state's step to the end.

        Raises:
            Interrupted: A signal to stop came; the state is saved.
            UserError: A loss is not finite, or the disk is full.
        """
        setup, state, recipe = self.setup, self.state, self.setup.recipe
        self._began = time.monotonic() - state.elapsed_s
        with StopSignals() as signals:
            try:
                if recipe.max_time is not None:
                    self._time = StepsInTime(setup, state, self.progress, self.folder)
                    if not state.total_steps:
                        self._fit_to_time(self._time)
                self.progress.begin(setup.total_steps, state.step)
                while state.step < setup.total_steps and self._active():
                    began = time.perf_counter()
                    report = self._step(self._active(), state.step)
                    if report:  # else the last ones diverged, and others were stopped before
                        state.step += 1
                        self._after_step(report, time.perf_counter() - began)

                    last = state.step == setup.total_steps
                    best = False
                    if report and setup.rows.held_out and (last or self._due(recipe.eval_steps)):
                        best = self._evaluate(self._active()) and recipe.load_best_model_at_end
                    self._prune()
                    finished = last or not self._active()
                    stop = ranks.agreed_stop(setup.accelerator, signals.received)
                    save_due = finished or best or stop or self._due(recipe.save_steps)
                    if (save_due or self._due_by_time()) and self._saves:
                        self._save()
                    if stop is not None and not finished:
                        raise Interrupted(
                            f"stopped by {stop.name} after step {state.step}; the state is "
                            f"saved, go on with: {resume_command(self.folder)}",
                            stop,
                        )
            finally:
                self._close_workers()

    def _fit_to_time(self, steps_in_time: StepsInTime) -> None:
        """Set the number of steps by the time that some of the first epoch's take."""
        first_epoch = self._batches.steps(self.setup.adapters[0].settings.seed, 0)
        lengths = self._batches.lengths
        tokens = [sum(lengths[row] for row in rows) for rows in first_epoch]
        steps_in_time.fit(tokens, self._rehearse, self._held_out_loss)

    def _rehearse(self, step: int) -> None:
        """The passes of a step of the first epoch, for their time alone."""
        self._step(self.setup.adapters, step, update=False)

    def _step(
        self, adapters: Sequence[AdapterOptimizer], step: int, *, update: bool = True
    ) -> dict[str, AdapterStep]:
        """One step, without the adapters that diverge in it.

        Where memory runs out, the same step is made again with smaller micro-batches.
        """
        setup = self.setup
        report: dict[str, AdapterStep] = {}
        groups = setup.groups(adapters)
        while groups:
            group = groups[0]
            self._watch.moved = False
            batches: list[MicroBatch] = []
            try:
                batches = list(self._batches.of(step, group))
                if self._check_loss(batches, group):
                    batches = list(self._batches.of(step, group))
                self._open_workers()
                idle = self._batches.idle(batches, group[0])
                report |= train_step(
                    batches, group, setup.objective, setup.accelerator, setup.scaler,
                    self._workers, setup.strategy, idle, update=update,
                )  # fmt: skip
                del groups[0]
                continue
            except TrainingDiverged as error:
                if not self._dropped_diverged(group, error):
                    raise
                remaining = [adapter for adapter in group if not adapter.progress.stopped]
                groups[:1] = [remaining] if remaining else []
                continue
            except (MemoryError, RuntimeError) as error:
                if not (self._retries and ran_out(error)):
                    raise
                self._shrink(batches, error)
                self._close_workers()
            # Only here, with the exception and the step that it holds gone, is there memory again.
            batches.clear()
            out_of_memory.clear(setup)
        return report

    def _after_step(self, report: dict[str, AdapterStep], took_s: float) -> None:
        self._record(report, took_s)
        self._pages.after_step()
        if self._time is not None:
            self._time.after_step(took_s)

    def _check_loss(self, batches: list[MicroBatch], adapters: Sequence[AdapterOptimizer]) -> bool:
        """The first batch's check, agreed by all ranks; whether rows have to be laid out anew."""
        objective = self.setup.objective
        packed = objective.packs
        if self.setup.strategy.in_step and not self._agreed:
            # Ranks that wait for each other make the same passes: those of the main rank's batch.
            batches = list(self._batches.of(self.state.step, adapters, rank=0))
        if batches and not self._agreed:
            objective.verify(batches[0], undropped(batches[0]))
        if not self._agreed:
            fast, packs = ranks.agreed_all(self.setup.accelerator, objective.fast, objective.packs)
            if self.setup.accelerator.num_processes > 1:
                objective.agree(fast=fast, packs=packs)
            self._agreed = True
        return packed != objective.packs

    def _open_workers(self) -> None:
        """Processes as soon as what they inherit is complete: a checked loss, compiled layers."""
        setup = self.setup
        if setup.workers == 1 or isinstance(self._workers, Forked):
            return
        compiles = setup.choices["compilation"].value == "on" and self.state.step == self._first
        if self._forks and not compiles:
            self._pages.give_back()
            try:
                processes = forked.processes_for(
                    setup.workers, setup.objective, setup.groups(setup.adapters)
                )
            except OSError as error:
                self._forks = False
                self.progress.note(f"workers are threads, for want of processes: {error}")
            else:
                self._close_workers()
                self._workers = processes
        self._workers = self._workers or Threads(setup.workers, torch.get_num_threads())

    def _close_workers(self) -> None:
        if self._workers is not None:
            self._workers.close()
            self._workers = None
        self.memory.beside(0)

    def _give_back(self) -> None:
        self._pages.give_back()
        if self._workers is not None:
            self._workers.give_back()

    def _shrink(self, batches: list[MicroBatch], error: BaseException) -> None:
        """Halve the micro-batches from now on, and say why; raises where that is no way on."""
        setup, step = self.setup, self.state.step + 1
        tokens, fewer = out_of_memory.smaller(setup, batches, self._watch, error, step)
        cause = out_of_memory.blame(self.prediction, setup, self.memory.read()["peak_bytes"], error)
        setup.tokens_per_microbatch = fewer
        if self.main:
            run = runs.Run(self.folder)
            retry = out_of_memory.Retry(step, tokens, fewer, cause)
            run.update(retries=[*run.info().get("retries", []), asdict(retry)])
        self.progress.note(
            f"memory ran out in step {step} ({cause}); again with micro-batches of {fewer} tokens "
            f"at most in place of {tokens}, which gives the same result"
        )

    def _active(self) -> list[AdapterOptimizer]:
        return [adapter for adapter in self.setup.adapters if not adapter.progress.stopped]

    def _prune(self) -> None:
        """Take out what the pruner names."""
        if self.pruner is not None and (active := self._active()):
            names = [adapter.name for adapter in active]
            leaving = self.pruner.leaving(self.state.step, self._losses, names)
            for adapter in active:
                adapter.progress.stopped = adapter.name in leaving
        self._losses = {}

    def _dropped_diverged(
        self, adapters: Sequence[AdapterOptimizer], error: TrainingDiverged
    ) -> bool:
        """Take out what diverged, if others go on or were stopped; none of theirs has moved."""
        diverged = [adapter for adapter in adapters if adapter.name in error.sentences]
        for adapter in adapters:
            adapter.optimizer.zero_grad(set_to_none=True)
        others = any(
            not (adapter.name in error.sentences or adapter.progress.diverged)
            for adapter in self.setup.adapters
        )
        if self.pruner is None and not others:
            return False
        for adapter in diverged:
            adapter.progress.stopped = adapter.progress.diverged = True
            if self.pruner is not None:
                self.pruner.diverged(self.state.step, adapter.name)
            self.progress.note(f"step {self.state.step + 1}: {adapter.name} diverged and leaves")
        return others

    def _due(self, every: float | None) -> bool:
        steps = in_steps(every or self.setup.steps_per_epoch, self.setup.total_steps)
        return self.state.step % steps == 0

    def _due_by_time(self) -> bool:
        """Whether the last checkpoint is old enough for another one, by the main rank's clock."""
        every = self.setup.recipe.save_every
        if every is None:
            return False
        # Where a checkpoint is large and the disk slow, it may cost a twentieth of the time.
        wait_s = max(seconds(every), 20 * self._saving_s)
        is_due = time.monotonic() - self._saved_at >= wait_s
        return ranks.of_main(self.setup.accelerator, is_due)

    def _record(self, report: dict[str, AdapterStep], seconds: float) -> None:
        """Append a line per adapter to metrics.jsonl and move the bar."""
        state = self.state
        state.seconds += seconds
        if self._workers is not None:
            self.memory.beside(self._workers.unshared_bytes)
        peak = self.memory.read()["peak_bytes"]
        tokens = sum(step.tokens for step in report.values())
        state.tokens += tokens
        state.supervised_tokens += sum(step.supervised_tokens for step in report.values())
        for name, step in report.items():
            self._line(
                {
                    "kind": "train",
                    "step": state.step,
                    "epoch": round(state.step / self.setup.steps_per_epoch, 6),
                    "adapter": name,
                    "loss": step.loss,
                    "learning_rate": step.learning_rate,
                    "grad_norm": step.grad_norm,
                    "examples": step.examples,
                    "supervised_tokens": step.supervised_tokens,
                    "tokens": step.tokens,
                    "seconds": seconds,
                    "peak_bytes": peak,
                    "skipped": step.skipped,
                },
                track=self._due(self.setup.recipe.logging_steps),
            )
        mean = sum(step.loss for step in report.values()) / len(report)
        self.progress.step(state.step, mean, tokens / seconds, peak)

    def _evaluate(self, adapters: list[AdapterOptimizer]) -> bool:
        """Held-out loss of each adapter; whether one of them is the best so far."""
        setup, state = self.setup, self.state
        any_best = False
        assert setup.rows.held_out is not None
        self._give_back()
        for adapter in adapters:
            began = time.perf_counter()
            validation = self._held_out_loss(adapter, setup.rows.held_out.rows)
            spread = validation.standard_error
            any_best |= adapter.note_evaluation(validation.loss, state.step)
            self._losses[adapter.name] = validation
            self._line(
                {
                    "kind": "eval",
                    "step": state.step,
                    "epoch": round(state.step / setup.steps_per_epoch, 6),
                    "adapter": adapter.name,
                    "loss": validation.loss,
                    "loss_se": spread,
                    "supervised_tokens": sum(validation.tokens),
                    "seconds": time.perf_counter() - began,
                },
                track=True,
            )
            error = "" if spread is None else f" ± {spread:.4f}"
            ends = ", which stops it early" if adapter.progress.stopped else ""
            self.progress.note(
                f"step {state.step}: {adapter.name} held-out loss "
                f"{validation.loss:.4f}{error}{ends}"
            )
        self._give_back()
        return any_best

    def _held_out_loss(self, adapter: AdapterOptimizer, rows: Sequence[TokenRow]) -> ValidationLoss:
        setup = self.setup
        return held_out_over(
            setup.accelerator,
            setup.objective,
            rows,
            adapter.name,
            passes=setup.strategy.passes,
            max_rows=setup.recipe.per_device_eval_batch_size,
            max_tokens=setup.tokens_per_microbatch,
            device=setup.accelerator.device,
            workers=self._workers,
        )

    def _line(self, line: dict[str, Any], *, track: bool) -> None:
        if not self.main:
            return
        runs.append_line(self.folder / "metrics.jsonl", line)
        if track and self.setup.accelerator.log_with:
            keys = ("loss", "loss_se", "learning_rate", "grad_norm", "tokens", "peak_bytes")
            values = {
                f"{line['kind']}/{line['adapter']}/{key}": line[key]
                for key in keys
                if line.get(key) is not None
            }
            self.setup.accelerator.log(values, step=line["step"])

    def _drop_infinite(self) -> None:
        """Take out adapters whose weights are no numbers any more: no checkpoint is whole of them.

        One that has left already may be of these: its next loss has told, or its held-out loss was
        no number and so no gain.

        Raises:
            TrainingDiverged: All are of these.
        """
        finite = ranks.agreed_all(
            self.setup.accelerator, *(adapter.is_finite() for adapter in self.setup.adapters)
        )
        sentences = {}
        for adapter, is_finite in zip(self.setup.adapters, finite, strict=True):
            adapter.progress.infinite = not is_finite
            if not is_finite and not adapter.progress.diverged:
                sentences[adapter.name] = (
                    f"adapter {adapter.name!r}: weights that are not finite after step "
                    f"{self.state.step} (a lower learning_rate than "
                    f"{adapter.settings.learning_rate:g} may help)"
                )
        error = TrainingDiverged(sentences)
        if sentences and not self._dropped_diverged(self.setup.adapters, error):
            raise error

    def _save(self) -> None:
        self._drop_infinite()
        setup, state = self.setup, self.state
        began = time.monotonic()
        self._give_back()
        if self.main:
            state.members = {adapter.name: adapter.progress for adapter in setup.adapters}
            state.scaler = setup.scaler.state_dict()
            state.elapsed_s = time.monotonic() - self._began
            newest = checkpoints.save(
                self.folder / "checkpoints",
                state,
                setup.trained,
                setup.adapters,
                base_model=setup.base.name,
                revision=setup.base.revision,
            )
            best = [m.progress.best_step for m in setup.adapters]
            keep = best if setup.recipe.load_best_model_at_end else []
            checkpoints.prune(
                self.folder / "checkpoints", setup.recipe.save_total_limit, keep, newest
            )
        else:
            checkpoints.take_part(setup.trained, setup.adapters)
        ranks.wait(setup.accelerator)
        self._give_back()
        self._saved_at = time.monotonic()
        self._saving_s = self._saved_at - began
