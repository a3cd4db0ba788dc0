"""Tasks of `lm-eval` on the base and on what was trained, each document paired.

lm-eval's own code asks and scores; it is given the model that is in memory. Whether the chat
template stood around the questions decides such figures as much as the model does (trap 46): it is
recorded, and figures of unlike settings are never compared.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lighten.errors import UserError, missing_extra
from lighten.evaluation.bootstrap import Array, Resamples
from lighten.evaluation.metrics import mean_loss
from lighten.evaluation.verdicts import verdict
from lighten.recipe import EvaluateOptions

SEED = 1234


@dataclass
class Tasks:
    """Scores of each model on the same documents.

    Attributes:
        settings: What has to be the same for two scores to be comparable.
        scores: By task, metric and filter, then model: a score for each document, by its number.
        better: By the same: whether more is better.
        manager: lm-eval's, which knows the tasks.
    """

    settings: dict[str, Any]
    manager: Any
    scores: dict[tuple[str, str, str], dict[str, dict[int, float]]] = field(default_factory=dict)
    better: dict[tuple[str, str, str], bool] = field(default_factory=dict)


def require(options: EvaluateOptions) -> None:
    """What the tasks need is there.

    Raises:
        MissingExtra: lm-eval is not installed.
        UserError: The folder of tasks is not there.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise missing_extra("lm-eval", "lm-eval")
    if options.include_path is not None and not Path(options.include_path).is_dir():
        raise UserError(f"include_path: the folder {options.include_path} does not exist")


def begin(options: EvaluateOptions, tokenizer: Any) -> Tasks:
    """Tasks without scores yet.

    Args:
        options: Which tasks, and how.
        tokenizer: Of the model; without a chat template none is applied.

    Raises:
        UserError: There is no such task.
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
    applied = options.tasks_chat_template and tokenizer.chat_template is not None
    return Tasks({
        "lm_eval": version("lm_eval"), "tasks": list(options.tasks),
        "chat_template": applied, "limit": options.tasks_limit,
    }, manager)  # fmt: skip


def score(
    tasks: Tasks, name: str, model: Any, tokenizer: Any, options: EvaluateOptions,
    using: AbstractContextManager[Any],
) -> None:  # fmt: skip
    """Ask one model the tasks.

    Args:
        tasks: Receives the scores.
        name: Of the model.
        model: In memory, in eval mode.
        tokenizer: Of it.
        options: Which tasks, and how.
        using: Within it the adapter answers that is meant.

    Raises:
        UserError: lm-eval refuses a task.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with using:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)
        try:
            results = lm_eval.simple_evaluate(
                model=lm, tasks=list(options.tasks), task_manager=tasks.manager,
                limit=options.tasks_limit, bootstrap_iters=0, log_samples=True,
                apply_chat_template=tasks.settings["chat_template"],
                random_seed=SEED, numpy_random_seed=SEED, torch_random_seed=SEED,
                fewshot_random_seed=SEED,
            )  # fmt: skip
        except (ValueError, KeyError, TypeError, OSError) as error:
            message = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"tasks: lm-eval failed: {message}") from error
    assert results is not None
    for task, samples in results["samples"].items():
        direction = results["higher_is_better"].get(task, {})
        for sample in samples:
            for metric in sample.get("metrics", ()):
                value = sample.get(metric)
                if not isinstance(value, bool | int | float):
                    continue  # what is no mean over documents, such as a corpus score's parts
                key = (task, metric, str(sample.get("filter", "none")))
                by_model = tasks.scores.setdefault(key, {}).setdefault(name, {})
                by_model[int(sample["doc_id"])] = float(value)
                tasks.better[key] = bool(direction.get(metric, True))


def summary(tasks: Tasks, options: EvaluateOptions) -> list[dict[str, Any]]:
    """Each metric of each task: every model's mean with its interval, and paired differences.

    Args:
        tasks: Scored by all models; the first is the base.
        options: How intervals are drawn.
    """
    rows = []
    for key, by_model in tasks.scores.items():
        task, metric, filtered = key
        documents = sorted(next(iter(by_model.values())))
        statistics = {name: _counts(scores, documents) for name, scores in by_model.items()}
        draws = Resamples(len(documents), options.bootstrap_samples, options.seed)
        base = next(iter(statistics))
        rows.append({
            "task": task, "metric": metric, "filter": filtered, "documents": len(documents),
            "higher_is_better": tasks.better[key],
            "models": {name: draws.estimate(counts, mean_loss).to_dict()
                       for name, counts in statistics.items()},
            "differences": {
                name: difference(counts, statistics[base], draws, higher=tasks.better[key])
                for name, counts in statistics.items() if name != base
            },
            "values": {name: counts[:, 0].tolist() for name, counts in statistics.items()},
        })  # fmt: skip
    return rows


def difference(ours: Array, theirs: Array, draws: Resamples, *, higher: bool) -> dict[str, Any]:
    """Of two models on the same documents, with a verdict.

    Args:
        ours: [documents, 2] of the one.
        theirs: Of the other.
        draws: Over the documents.
        higher: More is better.
    """
    estimate = draws.difference(ours, theirs, mean_loss)
    label = verdict(estimate, len(ours), lower_is_better=not higher)
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "verdict": label}


def _counts(scores: Mapping[int, float], documents: Sequence[int]) -> Array:
    values = [scores[document] for document in documents]
    return np.stack([np.asarray(values), np.ones(len(values))], axis=1)
