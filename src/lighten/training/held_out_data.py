"""Which examples are held out of a recipe's training, and what has to be said of them.

Training watches its loss on them and evaluation measures on them. Both leave out the rows that
training leaves out, by the same encoding, and say so; both say how many ask what is trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from lighten import data
from lighten.data import FEWEST, Encoded, NothingSupervised
from lighten.data.files import Content
from lighten.data.storage import chosen, spread_evenly
from lighten.errors import NoHeldOut, UserError
from lighten.models import Limits
from lighten.recipe import Recipe
from lighten.training.encoding import Progress, encode_as, lost_sentences
from lighten.wording import counted


@dataclass(frozen=True)
class HeldOutData:
    """Held-out examples.

    Attributes:
        examples: They.
        name: Their file, or whose part they are, for people.
        split_off: They are a part of the training data.
        bad_rows: Rows that could not be read.
        notes: What reading and splitting left out or did otherwise than was asked, a sentence each.
        trained_prompts: What is asked in training as far as it is asked here too; None where that
            is not known.
        rows: They as the model sees them, once encoded.
        left_out: Examples that training would leave out too; not in `examples` any more.
        sha256: Of the bytes of their files, where they have files of their own.
    """

    examples: Sequence[data.Example]
    name: str
    split_off: bool = False
    bad_rows: int = 0
    notes: list[str] = field(default_factory=list)
    trained_prompts: frozenset[str] | None = frozenset()
    rows: Encoded | None = None
    left_out: int = 0
    sha256: str | None = None

    @property
    def shared(self) -> int | None:
        """How many ask what a training example asks; None where that is not known."""
        if self.trained_prompts is None:
            return None
        if not self.trained_prompts:
            return 0
        return sum(example.prompt_key in self.trained_prompts for example in self.examples)

    def sentences(self) -> list[str]:
        """All that has to be said wherever figures measured on these examples are shown."""
        return [*self.notes, *shared_sentence(self.shared, len(self.examples), self.name),
                *few_sentence(len(self.examples))]  # fmt: skip


def shared_sentence(shared: int | None, count: int, name: str) -> list[str]:
    """What it means that held-out examples ask what is trained on."""
    if shared is None:
        return [
            "it is not known whether held-out examples ask what was trained on: the training data "
            "is not known, has changed or is gone"
        ]
    if not shared:
        return []
    return [
        f"{shared:,} of {counted(count, 'held-out example')} "
        f"{'asks' if shared == 1 else 'ask'} what a training example asks ({name}): there the "
        "figures tell what was remembered, not what was learnt for new questions"
    ]


def few_sentence(count: int) -> list[str]:
    """What it means that there are few held-out examples."""
    if not 0 < count < FEWEST:
        return []
    interval = ", and one example has no interval" if count == 1 else ""
    return [
        f"only {counted(count, 'held-out example')}: fewer than {FEWEST} cannot tell better from "
        f"worse{interval}; hold out more (val_size), or give an eval_dataset"
    ]


def read_as(
    recipe: Recipe, source: str | Sequence[str], split: str, content: Content | None = None
) -> data.Dataset:
    """Read a split as the recipe says (content: see `data.read`).

    Raises:
        UserError: As for `data.read`.
    """
    return data.read(
        source,
        split=split,
        limit=recipe.max_train_samples if split == "train" else None,
        skip_bad_rows=recipe.skip_bad_rows,
        columns=recipe.dataset_columns,
        content=content,
    )


def held_out_source(recipe: Recipe) -> str | list[str] | None:
    """Where the data are that the loss is watched on; None: a part of the training data is."""
    if recipe.eval_dataset is not None:
        return recipe.eval_dataset
    return data.with_split(recipe.dataset, "valid") or None


def separate(
    recipe: Recipe,
    trained: Sequence[data.Example] | None,
    split: str = "valid",
    content: Content | None = None,
) -> HeldOutData | None:
    """Held-out examples that have files of their own; None where there are none.

    Args:
        recipe: The run's.
        trained: What is trained on; None: not known.
        split: `valid` for those that the loss is watched on, or `test`.
        content: What its files should hold, if that is known.

    Raises:
        UserError: They cannot be read.
    """
    test = data.with_split(recipe.dataset, "test") or None
    source = test if split == "test" else held_out_source(recipe)
    if source is None:
        return None
    dataset = read_as(recipe, source, split, content)
    prompts = None if trained is None else data.shared_prompts(trained, dataset.examples)
    return HeldOutData(
        dataset.examples, dataset.name, bad_rows=len(dataset.bad_rows),
        notes=[*data.left_out("held-out", dataset), *dataset.findings], trained_prompts=prompts,
        sha256=dataset.sha256,
    )  # fmt: skip


def beside_training(recipe: Recipe, held_out: HeldOutData, trained_on: str | None) -> HeldOutData:
    """The same with what the training data asks, if those are still what was trained on.

    Args:
        recipe: The run's.
        held_out: Held-out examples with files of their own.
        trained_on: SHA-256 of the data that the run was trained on; None: as they are now.
    """
    try:
        trained = read_as(recipe, recipe.dataset, "train")
    except UserError:  # gone, or broken since
        return replace(held_out, trained_prompts=None)
    if trained_on not in (None, trained.sha256):
        return replace(held_out, trained_prompts=None)
    prompts = data.shared_prompts(trained.examples, held_out.examples)
    return replace(held_out, trained_prompts=prompts)


def split_off(recipe: Recipe, dataset: data.Dataset) -> tuple[Sequence[data.Example], HeldOutData]:
    """What is left to train on, and what is held out of the training data.

    Raises:
        UserError: Too little is left to train on.
    """
    if not recipe.val_size:
        return dataset.examples, HeldOutData([], dataset.name, split_off=True)
    train, held_out, note = data.split(dataset.examples, recipe.val_size)
    return train, HeldOutData(
        held_out, f"held out of {dataset.name}", split_off=True,
        notes=[] if note is None else [note],
    )  # fmt: skip


def encoded(
    recipe: Recipe,
    held_out: HeldOutData,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    most: int | None = None,
    progress: Progress | None = None,
    setting: str | None = None,
) -> HeldOutData:
    """The examples that training would keep too, encoded; the others are counted and told.

    Where fewer than all are wanted, they are spread evenly over all, and always the same ones.

    Args:
        recipe: How.
        held_out: All of them.
        tokenizer: With its chat template chosen.
        limits: Of the model that will see them.
        most: Examples at most.
        progress: Log how many examples are encoded, and of how many.
        setting: Named where it is said how many of all these are; None: the caller says that.

    Raises:
        NoHeldOut: None is left.
        UserError: As for `data.encode`.
    """
    count = len(held_out.examples)
    if not count:
        raise NoHeldOut(held_out.notes[0] if held_out.notes else "nothing is held out (val_size 0)")
    looked_at = count if most is None else min(most, count)
    while True:
        part = chosen(held_out.examples, spread_evenly(looked_at, count))
        try:
            rows = encode_as(recipe, part, tokenizer, limits, progress)
        except NothingSupervised as nothing:
            if looked_at == count:
                raise NoHeldOut(
                    f"no held-out example of {held_out.name} can be measured on: none has a "
                    f"supervised token, because {nothing.reason}"
                ) from nothing
        else:
            if looked_at == count or len(rows.rows) >= (most or 0):
                break
        looked_at = min(2 * looked_at, count)  # those left out make room for others
    left_out = looked_at - len(rows.rows)
    # Of all that were looked at: those that are left out are not among the ones that are chosen.
    problems = [sentence for sentence in rows.problems if sentence not in rows.findings.sentences()]
    problems += lost_sentences(rows, limits, limits.longest(recipe.max_length)[1])
    wanted = len(rows.rows) if most is None else most
    kept = spread_evenly(wanted, len(rows.rows))
    examples = chosen(part, [rows.places[place] for place in kept])
    if setting is not None and (looked_at < count or len(rows.rows) > len(examples)):
        problems.append(
            f"{len(examples):,} of {count:,} examples, spread evenly over them ({setting})"
        )
    if len(rows.rows) > len(examples):
        rows = encode_as(recipe, examples, tokenizer, limits)
    return replace(
        held_out,
        examples=examples,
        rows=rows,
        left_out=left_out,
        notes=[*held_out.notes, *(f"held out: {sentence}" for sentence in problems)],
    )
