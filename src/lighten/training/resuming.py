"""What a run that goes on must find as it was when it began, and every rank as the others do."""

from __future__ import annotations

from accelerate import Accelerator

from lighten import models
from lighten.errors import UserError
from lighten.parallel import ranks
from lighten.recipe import Recipe
from lighten.runs import RECIPE, Run
from lighten.training.rows import Rows


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
