"""What a run that goes on must find as it was when it began, and every rank as the others do."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator

from lighten import models
from lighten.errors import UserError
from lighten.machine.hardware import Choice
from lighten.parallel import ranks
from lighten.recipe import Recipe
from lighten.runs import RECIPE, Run
from lighten.training import best_state, checkpoints
from lighten.training.checkpoints import TrainerState
from lighten.training.progress import TrainingProgress
from lighten.training.rows import Rows
from lighten.training.setup import Setup


def require_same_inputs(run: Run, base: models.Base, rows: Rows) -> None:
    """The run must see the model, tokenizer, data and chat template that it began with.

    Other rows would stand in another order, and held-out losses of other examples say nothing about
    which state is the best. What a run that ended too early did not note is not compared.

    Args:
        run: Which.
        base: As it is loaded now.
        rows: As they are encoded now.

    Raises:
        UserError: A file has changed since.
    """
    info = run.info()
    noted, facts = info.get("data") or {}, rows.facts
    tokenizer = noted.get("tokenizer") or {}
    if tokenizer.get("tokenizers") != facts["tokenizer"]["tokenizers"]:
        tokenizer = {}  # another version of the library writes it otherwise
    compared = [
        (f"the model {base.name}", info.get("base") or {}, "checksum", base.checksum),
        ("the tokenizer", tokenizer, "sha256", facts["tokenizer"]["sha256"]),
        (f"the dataset {facts['path']}", noted, "sha256", facts["sha256"]),
        ("the set of held-out examples", noted, "eval_sha256", facts["eval_sha256"]),
        (
            f"the chat template ({rows.template.name})", noted.get("template") or {}, "sha256",
            facts["template"]["sha256"],
        ),
    ]  # fmt: skip
    for label, before, key, now in compared:
        # A model without files on disk has no checksum.
        unknown = key not in before or (key == "checksum" and before[key] is None)
        if not unknown and before[key] != now:
            raise UserError(
                f"cannot resume {run.folder}: {label} has changed since the run began; put it "
                "back, or choose another --output_dir"
            )


def require_same_on_ranks(accelerator: Accelerator, base: models.Base, rows: Rows) -> None:
    """Every rank has read the same model and data: machines may each have files of their own.

    Steps of other rows, or sums of other weights' gradients, would be nobody's; another number of
    steps would leave ranks waiting for each other.

    Args:
        accelerator: The ranks.
        base: As this one has loaded it.
        rows: As this one has encoded them.

    Raises:
        UserError: A file is another one on some rank.
        PeerLost: A rank has ended.
    """
    facts = rows.facts
    read = {
        f"the model {base.name}": base.checksum,
        f"the dataset {facts['path']}": facts["sha256"],
        "the set of held-out examples": facts["eval_sha256"],
        f"the chat template ({rows.template.name})": facts["template"]["sha256"],
        "the number of tokens": facts["tokens"],
    }
    first, *others = ranks.gather(accelerator, list(read.values()))
    for rank, values in enumerate(others, 1):
        for label, expected, value in zip(read, first, values, strict=True):
            if value != expected:
                raise UserError(
                    f"{label} is another one on rank {rank} than on rank 0; give every machine the "
                    "same files"
                )


def require_folder_on_ranks(accelerator: Accelerator, recipe: Recipe, run: Run) -> None:
    """Every rank sees the run's folder, where each of them reads the best checkpoint at the end.

    Where weights are spread; otherwise the main rank puts them back alone.

    Args:
        accelerator: The ranks.
        recipe: What is trained.
        run: Its run.

    Raises:
        UserError: A rank does not see it.
        PeerLost: A rank has ended.
    """
    for rank, sees in enumerate(ranks.gather(accelerator, (run.folder / RECIPE).is_file())):
        if not sees:
            raise UserError(
                f"load_best_model_at_end: with strategy: {recipe.strategy} every rank reads the "
                f"best checkpoint, and rank {rank} does not see {run.folder.absolute()}; put the "
                "run's folder where every machine sees it, or set load_best_model_at_end to false"
            )


def newest_of(
    run: Run, accelerator: Accelerator, progress: TrainingProgress
) -> tuple[Path | None, TrainerState]:
    """The newest whole checkpoint, which one rank looks for, and what its state says.

    Raises:
        UserError: Another rank does not see it, or another version wrote it.
        PeerLost: A rank has ended.
    """
    newest_and_broken: tuple[Path | None, list[str]] = (None, [])
    if accelerator.is_main_process:
        newest_and_broken = checkpoints.newest_complete(run.folder / "checkpoints")
    newest, broken = ranks.of_main(accelerator, newest_and_broken)
    for sentence in broken:
        progress.note(sentence)
    if newest is None:
        progress.note(f"{run.folder} has no whole checkpoint; starting from the first step")
        return None, TrainerState()
    if not newest.is_dir():
        raise UserError(
            f"rank {accelerator.process_index} does not see {newest.absolute()}, from which rank 0 "
            "goes on; put the run's folder where every machine sees it"
        )
    return newest, checkpoints.read_state(newest)


def put_back(newest: Path, setup: Setup, progress: TrainingProgress) -> TrainerState:
    """Put a checkpoint back.

    Raises:
        UserError: It is of another cohort.
        PeerLost: A rank has ended.
    """
    state = checkpoints.restore(newest, setup.trained, setup.adapters)
    if state.scaler:
        setup.scaler.load_state_dict(state.scaler)
    progress.note(f"going on after step {state.step} ({newest.name})")
    if setup.recipe.load_best_model_at_end:
        then = "the best is looked for from here on"
        best_state.forget_damaged(newest.parent, setup, progress, then=then)
    return state


def steps_in_time(run: Run) -> dict[str, Choice]:
    """How many steps the run's `max_time` gave it when it began, if it has one."""
    return {
        choice["what"]: Choice(choice["value"], choice["reason"])
        for choice in run.info().get("choices") or []
        if choice["what"] == "steps"
    }
