"""Tasks of `lm-eval` on the base and on what was trained, each document paired.

lm-eval's own code asks and scores; it is given the model that is in memory. Whether the chat
template stood around the questions decides such figures as much as the model does (trap 46): it is
recorded, and figures of unlike settings are never compared.

A task's figure is lm-eval's own. Most are means over documents; perplexities are not, and a corpus
score has no score of each document. What is resampled for an interval is therefore the formula that
gives lm-eval's figure, and where none does, the figure stands alone.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lighten.errors import UserError, require_package
from lighten.evaluation.bootstrap import Array, Estimate, FromSums, Resamples
from lighten.evaluation.metrics import mean_loss
from lighten.evaluation.verdicts import verdict
from lighten.recipe import EvaluateOptions
from lighten.wording import first_line

SEED = 1234
# From summed [value, weight] of the documents to a figure, as lm-eval's aggregations of these names
# have it; the weight of a document is 1 where lm-eval names none.
FORMULAS: dict[str, FromSums] = {
    "mean": mean_loss,
    "perplexity": lambda sums: np.exp(-mean_loss(sums)),
    "bits_per_byte": lambda sums: -mean_loss(sums) / math.log(2),
}
_Scores = dict[int, tuple[float, float]]


@dataclass
class Tasks:
    """Scores of each model on the same documents.

    Attributes:
        settings: What has to be the same for two scores to be comparable.
        manager: lm-eval's, which knows the tasks.
        figures: By task, metric and filter, then model: lm-eval's figure.
        scores: By the same: value and weight of each document, by its number; none of a metric that
            gives a document no number.
        better: By task, metric and filter: whether more is better.
        asked: By task: how many documents, and a digest of what was asked.
        groups: Names of those that stand for several tasks; their documents are those of all.
    """

    settings: dict[str, Any]
    manager: Any
    figures: dict[tuple[str, str, str], dict[str, float]] = field(default_factory=dict)
    scores: dict[tuple[str, str, str], dict[str, _Scores]] = field(default_factory=dict)
    better: dict[tuple[str, str, str], bool] = field(default_factory=dict)
    asked: dict[str, tuple[int, str]] = field(default_factory=dict)
    groups: set[str] = field(default_factory=set)


def require(options: EvaluateOptions) -> None:
    """What the tasks need is there.

    Raises:
        MissingExtra: lm-eval is not installed.
        UserError: The folder of tasks is not there.
    """
    require_package("lm_eval", "lm-eval")
    if options.include_path is not None and not Path(options.include_path).is_dir():
        raise UserError(f"include_path: the folder {options.include_path} does not exist")


def begin(options: EvaluateOptions, tokenizer: Any) -> Tasks:
    """Tasks without scores yet.

    Args:
        options: Which tasks, and how.
        tokenizer: Of the model; without a chat template none is applied.

    Raises:
        UserError: There is no such task, or it cannot be loaded.
    """
    from importlib.metadata import version

    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(
        include_path=options.include_path, include_defaults=options.include_path is None
    )
    unknown = [task for task in options.tasks if task not in manager.all_tasks]
    if unknown:
        source = options.include_path or "lm-eval"
        raise UserError(f"tasks: {source} has no task {', '.join(map(repr, unknown))}")
    # What a task lacks, a package or its documents, is told before anything is measured.
    try:
        manager.load(list(options.tasks))
    except Exception as error:  # of a task's own code, which may raise anything
        raise UserError(
            f"tasks: lm-eval cannot load {', '.join(options.tasks)}: {first_line(error)}"
        ) from error
    applied = options.tasks_chat_template and tokenizer.chat_template is not None
    return Tasks({
        "lm_eval": version("lm_eval"), "tasks": list(options.tasks),
        "chat_template": applied, "limit": options.tasks_limit,
    }, manager)  # fmt: skip


def score(
    tasks: Tasks, name: str, model: Any, tokenizer: Any, options: EvaluateOptions,
    using: AbstractContextManager[Any], ends: Sequence[int] = (),
) -> None:  # fmt: skip
    """Ask one model the tasks.

    Args:
        tasks: Receives the scores.
        name: Of the model.
        model: In memory, in eval mode.
        tokenizer: Of it.
        options: Which tasks, and how.
        using: Within it the adapter answers that is meant.
        ends: Tokens that end an answer, beside those that the model declares.

    Raises:
        UserError: lm-eval refuses a task.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with using, _tied_as_it_is(model), _ending_at(model, ends):
        try:
            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)
            results = lm_eval.simple_evaluate(
                model=lm, tasks=list(options.tasks), task_manager=tasks.manager,
                limit=options.tasks_limit, bootstrap_iters=0, log_samples=True,
                apply_chat_template=tasks.settings["chat_template"],
                random_seed=SEED, numpy_random_seed=SEED, torch_random_seed=SEED,
                fewshot_random_seed=SEED,
            )  # fmt: skip
        # Of scoring too: some tasks import what they need when they are scored.
        except (ValueError, KeyError, TypeError, OSError, ImportError) as error:
            raise UserError(f"tasks: lm-eval failed: {first_line(error)}") from error
    assert results is not None
    for task, samples in results["samples"].items():
        direction = results["higher_is_better"].get(task, {})
        tasks.asked[task] = _questions(samples, with_prompts=not tasks.settings["chat_template"])
        for sample in samples:
            for metric in sample.get("metrics", ()):
                if metric == "bypass":  # lm-eval's name of no metric
                    continue
                key = (task, metric, str(sample.get("filter", "none")))
                figure = results["results"][task].get(f"{metric},{key[2]}")
                if not _is_number(figure):
                    continue
                tasks.figures.setdefault(key, {})[name] = float(figure)
                tasks.better[key] = direction.get(metric) is not False  # None where no task says
                if (score := _score(sample.get(metric))) is not None:
                    by_model = tasks.scores.setdefault(key, {}).setdefault(name, {})
                    by_model[int(sample["doc_id"])] = score
    for group, figures in results.get("groups", {}).items():
        _add_group(tasks, name, group, figures, results)


@contextmanager
def _tied_as_it_is(model: Any) -> Iterator[None]:
    """Let lm-eval tie no weights anew.

    Where an adapter has the head, there is no weight of the base's in its place to tie.
    """
    model.tie_weights = lambda *_, **__: None
    try:
        yield
    finally:
        del model.tie_weights


@contextmanager
def _ending_at(model: Any, ends: Sequence[int]) -> Iterator[None]:
    """Let answers end at tokens, too, that the model does not declare."""
    config = model.generation_config
    declared = config.eos_token_id
    known = [declared] if isinstance(declared, int) else list(declared or ())
    config.eos_token_id = list(dict.fromkeys([*known, *ends])) or None
    try:
        yield
    finally:
        config.eos_token_id = declared


def _add_group(
    tasks: Tasks, name: str, group: str, figures: Mapping[str, Any], results: Mapping[str, Any]
) -> None:
    """What lm-eval says of a group as a whole, with the documents of all of its tasks."""
    members = dict.fromkeys(_members(group, results["group_subtasks"], results["samples"]))
    tasks.groups.add(group)
    digests = "\n".join(f"{task}: {tasks.asked[task][1]}" for task in members)
    count = sum(tasks.asked[task][0] for task in members)
    tasks.asked[group] = count, hashlib.sha256(digests.encode()).hexdigest()
    direction = results["higher_is_better"].get(group, {})
    for label, figure in figures.items():
        metric, comma, filtered = label.partition(",")
        if not comma or metric.endswith("_stderr") or not _is_number(figure):
            continue
        key = (group, metric, filtered)
        tasks.figures.setdefault(key, {})[name] = float(figure)
        tasks.better[key] = direction.get(metric) is not False
        scores: list[tuple[float, float]] = []
        for task in members:  # where one has none they are too few, and no formula will do
            of_task = tasks.scores.get((task, metric, filtered), {}).get(name, {})
            scores += [of_task[document] for document in sorted(of_task)]
        tasks.scores.setdefault(key, {})[name] = dict(enumerate(scores))


def _members(
    name: str, children: Mapping[str, Sequence[str]], samples: Mapping[str, Any]
) -> Iterator[str]:
    """The tasks of a group, and of the groups in it."""
    for child in children.get(name, ()):
        if child in samples:
            yield child
        else:
            yield from _members(child, children, samples)


def _questions(samples: Sequence[Mapping[str, Any]], *, with_prompts: bool) -> tuple[int, str]:
    """How many documents a task has, and a digest of them.

    The digest is of the prompts too where these do not hang on the model: a template is its own.
    """
    names = ("doc_hash", "target_hash", "prompt_hash")[: 3 if with_prompts else 2]
    lines = {
        int(sample["doc_id"]): ",".join(str(sample.get(name)) for name in names)
        for sample in samples
    }
    text = "\n".join(f"{document}: {line}" for document, line in sorted(lines.items()))
    return len(lines), hashlib.sha256(text.encode()).hexdigest()


def _score(value: Any) -> tuple[float, float] | None:
    """A document's value and weight; None: it has none, such as the texts of a corpus score."""
    if _is_number(value):
        return float(value), 1.0
    if isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_number, value)):
        return float(value[0]), float(value[1])
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.number | np.bool_)


def summary(tasks: Tasks, options: EvaluateOptions) -> list[dict[str, Any]]:
    """Each metric of each task: every model's figure with its interval, and paired differences.

    Args:
        tasks: Scored by all models; the first is the base.
        options: How intervals are drawn.

    Returns:
        Groups come first, as lm-eval has them.
    """
    rows = []
    for key in sorted(tasks.figures, key=lambda key: key[0] not in tasks.groups):
        (task, metric, filtered), figures = key, tasks.figures[key]
        count, digest = tasks.asked[task]
        statistics = _statistics(tasks.scores.get(key, {}))
        formula = _formula(statistics, figures, count)
        base = next(iter(figures))
        row = {
            "task": task, "metric": metric, "filter": filtered, "documents": count,
            "documents_sha256": digest, "higher_is_better": tasks.better[key], "formula": formula,
        }  # fmt: skip
        if formula is None:
            alone = {name: Estimate(figure, None, None, None) for name, figure in figures.items()}
            rows.append({
                **row, "models": {name: figure.to_dict() for name, figure in alone.items()},
                "differences": {
                    name: {"value": figure - figures[base], "low": None, "high": None,
                           "verdict": "no interval"}
                    for name, figure in figures.items() if name != base
                },
                "values": {}, "weights": {},
            })  # fmt: skip
            continue
        draws = Resamples(count, options.bootstrap_samples, options.seed)
        rows.append({
            **row,
            "models": {name: draws.estimate(counts, FORMULAS[formula]).to_dict()
                       for name, counts in statistics.items()},
            "differences": {
                name: difference(counts, statistics[base], draws, higher=tasks.better[key],
                                 formula=formula)
                for name, counts in statistics.items() if name != base
            },
            "values": {name: counts[:, 0].tolist() for name, counts in statistics.items()},
            "weights": {name: counts[:, 1].tolist() for name, counts in statistics.items()},
        })  # fmt: skip
    return rows


def _statistics(scores: Mapping[str, _Scores]) -> dict[str, Array]:
    """[documents, 2] of each model, in the order of the documents."""
    return {
        name: np.asarray([by_document[place] for place in sorted(by_document)])
        for name, by_document in scores.items()
    }


def _formula(
    statistics: Mapping[str, Array], figures: Mapping[str, float], documents: int
) -> str | None:
    """The name of the formula that gives lm-eval's figure of every model; None: none does."""
    if set(statistics) != set(figures) or any(len(c) != documents for c in statistics.values()):
        return None
    weighted = any((counts[:, 1] != 1).any() for counts in statistics.values())
    for name, formula in FORMULAS.items():
        if weighted and name == "mean":  # pairs that a mean is made of are no weights
            continue
        ours = [float(formula(counts.sum(0))) for counts in statistics.values()]
        theirs = [figures[model] for model in statistics]
        if np.allclose(ours, theirs, rtol=1e-6, atol=1e-9, equal_nan=True):
            return name
    return None


def difference(
    ours: Array, theirs: Array, draws: Resamples, *, higher: bool, formula: str = "mean"
) -> dict[str, Any]:
    """Of two models on the same documents, with a verdict.

    Args:
        ours: [documents, 2] of the one.
        theirs: Of the other.
        draws: Over the documents.
        higher: More is better.
        formula: Of `FORMULAS`.
    """
    estimate = draws.difference(ours, theirs, FORMULAS[formula])
    label = verdict(estimate, len(ours), lower_is_better=not higher)
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "verdict": label}
