"""The verb `train`: a recipe in, a run folder out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers.utils import logging as transformers_logging

from lighten import locks
from lighten.adapters.peft_methods import method_of
from lighten.cpu import allocator
from lighten.engine import optimizers
from lighten.engine.adapter_optimizer import AdapterOptimizer
from lighten.engine.memory_errors import ran_out
from lighten.errors import DiskFull, UserError
from lighten.folders import resume_command
from lighten.machine import hardware
from lighten.parallel import launch, ranks
from lighten.paths import exists
from lighten.recipe import Recipe, spread
from lighten.runs import INFO, PLAN, RECIPE, Run, now, write_json
from lighten.training import offloaded, quantization_aware, streaming, trackers
from lighten.training.base import agreed_dtype, load_base, require_trainable, tokenizer_of
from lighten.training.best_state import is_spread, put_best_back
from lighten.training.checkpoints import TrainerState
from lighten.training.export import export, take_part
from lighten.training.loop import Loop, Pruner
from lighten.training.method import FROM_ADAPTER, go_on_from_adapter
from lighten.training.out_of_memory import OutOfMemory, clear_frames
from lighten.training.prediction import Prediction, compare
from lighten.training.prepare import layers_later, prepare
from lighten.training.progress import TrainingProgress
from lighten.training.restarting import agreed as agreed_restart
from lighten.training.resuming import (
    newest_of,
    put_back,
    require_folder_on_ranks,
    require_same_inputs,
    require_same_on_ranks,
    steps_in_time,
)
from lighten.training.rows import load_rows
from lighten.training.setup import Setup
from lighten.wording import counted, first_line

# After quantisation-aware training, so many rows go through the converted model too.
COMPARED_ROWS = 8


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    restarts: bool = False,
    progress: bool = True,
    prediction: Prediction | None = None,
    pruner: Pruner | None = None,
) -> Run:
    """Train what the recipe says.

    Args:
        recipe: What to train.
        resume: Go on from the newest whole checkpoint of the recipe's run folder.
        restarts: Do so too where a launcher has started several ranks, or some of them, again.
        progress: Show what happens on standard error.
        prediction: What was planned.
        pruner: May take adapters out before the end.

    Returns:
        The run, with its adapters under `adapters/`, or the whole model under `model/`.

    Raises:
        UserError: Something the user can mend; the run is marked failed.
        Interrupted: A signal to stop; the state is saved and the run is marked interrupted.
    """
    place = launch.recognise()
    spread.require_ranks(recipe, place.world_size)
    trackers.check_installed(recipe.report_to)
    if recipe.peft is not None:
        method_of(recipe.peft)  # says what is wrong with it before anything is loaded
    device = hardware.choose_device()
    optimizers.choose(recipe.optim, device.value)  # a missing package is told before anything loads
    with TrainingProgress(enabled=progress and place.main):
        require_trainable(recipe)  # fetches a model that is not on this machine
    accelerator = ranks.connect(
        place,
        device.value,
        f"{recipe.run_folder}\n{'resumed' if resume else 'new'}\n{recipe.to_yaml()}",
        gathers=spread.gathers_layers(recipe, place.world_size),
        offloads={recipe.offload_params, recipe.offload_optimizer} != {"none"},
        log_with=list(recipe.report_to) or None,
        project_config=trackers.places(recipe.run_folder),
    )
    if restarts and not resume and place.world_size > 1:
        resume = agreed_restart(recipe, accelerator)
    if resume and ranks.of_main(accelerator, place.main and _is_finished(recipe)):
        accelerator.end_training()
        return Run(recipe.run_folder, begun_elsewhere=True)
    streaming.require_possible(recipe, accelerator.device.type)
    offloaded.require_possible(recipe, accelerator.device.type)
    run = _open(recipe, accelerator, resume=resume)
    with TrainingProgress(enabled=progress and accelerator.is_main_process) as display:
        for notice in recipe.notices:
            display.note(notice)
        if prediction is None:  # else it was said before the plan was made
            _warn_of_slow_format(recipe, device.value, display)
        here = accelerator.process_index, accelerator.num_processes
        try:
            # Rows of what learns are gathered in many places: for norms, checkpoints, the model.
            with ranks.lost_within(*here), _pages(recipe, accelerator) as pages:
                _train(run, recipe, accelerator, display, prediction, pruner, pages, resume=resume)
        except BaseException as caught:
            error = _explained(caught, run, prediction)
            # Whatever ended the run is told truthfully in run.json, and then goes its way.
            cut_short = isinstance(error, KeyboardInterrupt | ranks.PeerLost)
            status = "interrupted" if cut_short else "failed"
            if accelerator.is_main_process:
                with suppress(OSError, ValueError):
                    if not _came_to_nothing(run, error):
                        run.update(status=status, error=str(error) or type(error).__name__,
                                   ended=now())  # fmt: skip
            if error is not caught:
                raise error from caught
            raise
        finally:
            with suppress(Exception):
                accelerator.end_training()
            if accelerator.is_main_process:
                locks.release(run.folder)
    return run


@contextmanager
def _pages(recipe: Recipe, accelerator: Accelerator) -> Iterator[hardware.Choice]:
    """What becomes of memory that is free again: ranks that gather layers have it for that alone.

    Layers come and go between what stays; kept in its place, their memory was twice what was used.
    """
    device = accelerator.device.type
    if device != "cpu" or not spread.gathers_layers(recipe, accelerator.num_processes):
        yield allocator.keep_pages(device)
        return
    with allocator.temporaries_given_back():
        yield hardware.Choice(
            "given back", f"strategy: {recipe.strategy} gathers layers between what stays"
        )


def _warn_of_slow_format(recipe: Recipe, device: str, progress: TrainingProgress) -> None:
    device_type = device.partition(":")[0]
    if device_type not in ("cpu", "cuda"):
        return
    name = "this processor" if device_type == "cpu" else "this GPU"
    formats = hardware.formats(device)
    if (slow := hardware.slow_format(recipe.compute_dtype, formats, name, device_type)) is not None:
        progress.note(f"warning: {slow}")


def _is_finished(recipe: Recipe) -> bool:
    return exists(recipe.run_folder / RECIPE) and Run(recipe.run_folder).is_finished()


def _came_to_nothing(run: Run, error: BaseException) -> bool:
    """Whether a mistake of the user's ended a run before it began, or went on: it is as before."""
    if not isinstance(error, UserError):
        return False
    if run.before_resumed is not None:
        write_json(run.folder / INFO, run.before_resumed)
        return True
    return run.claim is not None and "base" not in run.info() and run.claim.undo()


def _explained(error: BaseException, run: Run, prediction: Prediction | None) -> BaseException:
    """An error that means too little memory or disk, with what to do about it."""
    if isinstance(error, DiskFull):
        return DiskFull(f"{error}, then go on with: {resume_command(run.folder)}")
    if not (isinstance(error, OutOfMemory) or ran_out(error)):
        return error
    reason = (
        str(error) if isinstance(error, OutOfMemory) else f"memory ran out: {first_line(error)}"
    )
    clear_frames(error)  # what would need less is planned in the same memory
    advice = prediction.advice() if prediction is not None else []
    if advice:
        reason = "\n  - ".join([f"{reason}; cheapest ways to need less:", *advice])
    return OutOfMemory(reason)


def _open(recipe: Recipe, accelerator: Accelerator, *, resume: bool) -> Run:
    if accelerator.is_main_process:
        run = Run.create(recipe, resume=resume)
        run.before_resumed = run.info() if resume else None
        commit, clean = hardware.commit()
        run.update(
            version=1, name=run.name, status="running", error=None, ended=None,
            started=(run.info().get("started") if resume else None) or now(),
            commit=commit, tree_clean=clean,
            machine=hardware.machine().to_dict(), versions=hardware.versions(),
            jobs=launch.jobs(),
        )  # fmt: skip
        ranks.wait(accelerator)
        return run
    ranks.wait(accelerator)
    return Run(recipe.run_folder, begun_elsewhere=True)


def _train(
    run: Run, recipe: Recipe, accelerator: Accelerator, progress: TrainingProgress,
    prediction: Prediction | None, pruner: Pruner | None, pages: hardware.Choice, *, resume: bool,
) -> None:  # fmt: skip
    transformers_logging.disable_progress_bar()
    planned = prediction is not None and prediction.record is not None
    if planned:
        _report_plan(run, accelerator, progress, prediction)
    set_seed(0)  # nothing below draws from the global generators; a model's own code might
    memory = allocator.measure_peak(accelerator.device.type)
    rows = prediction.rows if prediction is not None else None
    if rows is None:  # what is wrong with them is told before a base is loaded
        rows = load_rows(recipe, tokenizer_of(recipe), progress.encoding)
    newest, saved_state = (
        newest_of(run, accelerator, progress) if resume else (None, TrainerState())
    )
    base = load_base(
        recipe, str(accelerator.device), learns=True,
        layers_later=layers_later(recipe, accelerator), ranks=accelerator.num_processes,
        dtype=agreed_dtype(recipe, accelerator),
    )  # fmt: skip
    require_same_on_ranks(accelerator, base, rows)
    # The rows may have been encoded with a tokenizer of their own; this one is saved.
    base.tokenizer.chat_template = rows.template.text
    facts = base.facts()  # of the base alone: PEFT puts its parameters into the model
    # What a step is belongs to the run: another number of ranks shares the same steps.
    per_step = saved_state.examples_per_step or (
        ranks.of_main(accelerator, run.info().get("examples_per_step")) if resume else None
    )
    setup = prepare(recipe, accelerator, base, rows, per_step, saved_state.total_steps or None)
    setup.choices["memory"] = pages
    if recipe.load_best_model_at_end and any(map(is_spread, setup.adapters)):
        require_folder_on_ranks(accelerator, recipe, run)
    if recipe.qat is not None:
        tried_difference = quantization_aware.try_conversion(base.model)
    if not planned:  # what kept the plan from being made may have been told as an error by now
        _report_plan(run, accelerator, progress, prediction)
    _report_setup(setup, progress)
    if resume and accelerator.is_main_process:  # the others have read the same
        require_same_inputs(run, base, rows)
    state = put_back(newest, setup, progress) if newest is not None else TrainerState()
    state.examples_per_step = setup.examples_per_step
    if state.step == 0:
        go_on_from_adapter(recipe, setup.trained)
    run.before_resumed = None
    if accelerator.is_main_process:
        run.truncate_metrics(state.step)
        if state.total_steps:
            setup.choices |= steps_in_time(run)
        run.update(
            base=facts,
            data=rows.facts,
            examples_per_step=setup.examples_per_step,
            choices=[
                {"what": name, "value": choice.value, "reason": choice.reason}
                for name, choice in setup.choices.items()
            ],
            **({} if recipe.qat is None else {"qat": _qat_facts(recipe, tried_difference)}),
        )
    ranks.wait(accelerator)
    if (note := trackers.start(accelerator, run.folder, recipe.completed())) is not None:
        progress.note(note)
    Loop(setup, run.folder, state, progress, memory, prediction, pruner=pruner, retries=True).run()
    if recipe.load_best_model_at_end:
        put_best_back(run.folder, setup, progress)
    for adapter in setup.adapters:
        adapter.end()  # what is gathered below takes its place
    if accelerator.is_main_process:
        _finish(run, setup, state, memory.read(), progress)
        _compare_with_plan(run, progress)
    elif all(_ships(setup, adapter) for adapter in setup.adapters):
        take_part(setup)
    ranks.wait(accelerator)


def _report_plan(
    run: Run, accelerator: Accelerator, progress: TrainingProgress, prediction: Prediction | None
) -> None:
    """Tell the plan and write it into the run folder; a plan of an earlier run goes."""
    if not accelerator.is_main_process:
        return
    if prediction is None or prediction.record is None:
        (run.folder / PLAN).unlink(missing_ok=True)
    else:
        write_json(run.folder / PLAN, prediction.record)
    for line in prediction.lines if prediction is not None else ():
        progress.note(line)


def _compare_with_plan(run: Run, progress: TrainingProgress) -> None:
    """Put what was measured beside what was predicted."""
    plan, info = run.plan(), run.info()
    if plan is None:
        return
    comparison = compare(plan, info["training"], run.metrics())
    run.update(prediction=comparison)
    comparisons = [
        f"{label} {show(figures['measured'])}, {show(figures['predicted'])} predicted "
        f"({100 * (figures['predicted'] / figures['measured'] - 1):+.0f} %)"
        for label, figures, show in (
            ("peak memory", comparison["memory"], lambda value: f"{value / 2**30:.2f} GiB"),
            (
                "a step of the planned size",
                comparison["step_seconds"],
                lambda value: f"{value:.2f} s",
            ),
        )
        if figures is not None and figures["measured"]
    ]
    progress.note("; ".join(comparisons))


def _report_setup(setup: Setup, progress: TrainingProgress) -> None:
    """What a user wants to know before the first step."""
    base, rows = setup.base, setup.rows
    progress.note(f"{base.name}: {base.dtype.value}, because {base.dtype.reason}")
    if base.quantization is not None:
        progress.note(f"linear layers: {base.quantization.value}, {base.quantization.reason}")
    progress.note(f"chat template: {rows.template.name}, {rows.template.reason}")
    counts = rows.train.counts
    held_out = rows.facts["eval_rows"]
    progress.note(
        f"{counted(counts.rows, 'example')}, {counted(counts.tokens, 'token')}, "
        f"{counts.supervised_tokens:,} of them supervised; {counted(held_out, 'example')} held out"
    )
    for problem in (*rows.train.problems, *rows.notes):
        progress.note(f"note: {problem}")
    start = setup.choices.get("start")
    if start is not None and start.reason != FROM_ADAPTER:
        progress.note(f"note: {start.reason}")
    if (tokens := setup.choices.get("added_tokens")) is not None:
        progress.note(f"note: the new tokens are not trained: {tokens.reason}")
    for adapter in setup.adapters:
        size = sum(parameter.numel() for parameter in adapter.parameters.values())
        progress.note(f"{setup.trained.describe(adapter.name)}, {size:,} parameters")


def _finish(
    run: Run, setup: Setup, state: TrainerState, memory: dict[str, Any], progress: TrainingProgress
) -> None:
    """Write what was trained and what was measured."""
    if setup.recipe.qat is not None:
        _compare_with_converted(run, setup, progress)
    adapters = []
    for adapter in setup.adapters:
        exported = _ships(setup, adapter)
        adapters.append(
            {
                "name": adapter.name,
                **setup.trained.facts(adapter.name),
                "trainable_parameters": sum(p.numel() for p in adapter.parameters.values()),
                "file_bytes": export(setup, adapter.name, run) if exported else 0,
                "diverged": adapter.progress.diverged,
                "steps": adapter.progress.steps,
                "best_step": adapter.progress.best_step,
                "eval_loss": _last_held_out(run, adapter.name, setup, adapter.progress.best_step),
            }
        )
    run.update(
        status="finished",
        ended=now(),
        adapters=adapters,
        choices=[
            *(choice for choice in run.info()["choices"] if choice["what"] != "packing"),
            {
                "what": "loss",
                "value": "supervised positions" if setup.objective.fast else "whole forward",
                "reason": setup.objective.reason,
            },
            {
                "what": "packing",
                "value": "on" if setup.objective.packs else "off",
                "reason": setup.objective.packing_reason,
            },
        ],
        training={
            "steps": state.step,
            "seconds": state.seconds,
            "tokens": state.tokens,
            "supervised_tokens": state.supervised_tokens,
            "tokens_per_second": state.tokens / state.seconds if state.seconds else None,
            **memory,
            **streaming.facts(setup.recipe, setup.base.feed),
        },
    )


def _ships(setup: Setup, adapter: AdapterOptimizer) -> bool:
    """Whether there is something to export; the same on every rank.

    One whose weights became infinite is nothing to ship, unless its best state was put back.
    """
    best = setup.recipe.load_best_model_at_end and adapter.progress.best_step is not None
    return best or not adapter.progress.infinite


def _qat_facts(recipe: Recipe, tried_difference: float) -> dict[str, Any]:
    return {
        "scheme": recipe.qat,
        "group_size": recipe.qat_group_size,
        "tried_difference": tried_difference,
    }


def _compare_with_converted(run: Run, setup: Setup, progress: TrainingProgress) -> None:
    """Convert what was trained for real, and note how far its answers are from those in training.

    It is put beside the rest of `run.json`'s `qat`, by name.
    """
    source = setup.rows.held_out or setup.rows.train
    rows = [row.input_ids for row in source.rows[:COMPARED_ROWS]]
    agreements = {name: quantization_aware.agreement(setup.trained, name, rows)
             for name in setup.trained.names}  # fmt: skip
    run.update(qat={**run.info()["qat"], "converted": agreements})
    for name, agreement in agreements.items():
        progress.note(
            f"{name}: converted by torchao, log-probabilities differ by at most "
            f"{agreement['largest_difference']:.2g} from those in training "
            f"({agreement['tokens']} tokens)"
        )


def _last_held_out(run: Run, name: str, setup: Setup, best: int | None) -> float | None:
    """The held-out loss of the adapter as it was saved."""
    lines = [m for m in run.metrics() if m["kind"] == "eval" and m["adapter"] == name]
    if setup.recipe.load_best_model_at_end and best is not None:
        lines = [line for line in lines if line["step"] == best]
    return lines[-1]["loss"] if lines else None
