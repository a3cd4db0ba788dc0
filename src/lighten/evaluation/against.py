"""Two evaluations side by side: only where both were measured in the same way."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lighten.data import Encoded
from lighten.errors import UserError
from lighten.evaluation import forgetting, harness, metrics, registry
from lighten.evaluation.bootstrap import Array, FromSums, Resamples
from lighten.evaluation.forgetting import GeneralText
from lighten.evaluation.verdicts import verdict
from lighten.recipe import EvaluateOptions
from lighten.runs import Run
from lighten.training.held_out_data import HeldOutData
from lighten.wording import typed

# Settings that a figure depends on. `batch_size` changes the time alone; of `max_examples` the
# examples tell that were taken; and answers of both are scored anew, by the same metrics.
_SAME = ("max_new_tokens", "chat_template", "normalisation", "general_text")
# Those of them that are known before anything is measured.
_CHOSEN = ("max_new_tokens",)
# And those that are known once the data are encoded.
_OF_DATA = ("chat_template", "general_text")


def read(run: Run) -> dict[str, Any]:
    """A run's evaluation.

    Raises:
        UserError: It was not evaluated yet, or its file is broken.
    """
    evaluation = run.evaluation()
    if evaluation is None:
        raise UserError(
            f"{run.folder} was not evaluated yet; first: lighten evaluate {typed(run.folder)}"
        )
    return evaluation


def name_of(other: Run, run: Run) -> str:
    """What to call the other run beside this one: its folder, where both have one name."""
    same = other.name == run.name and other.folder.resolve() != run.folder.resolve()
    return str(other.folder) if same else other.name


def require_same_settings(settings: EvaluateOptions, theirs: Mapping[str, Any]) -> None:
    """What is about to be measured can be compared, as far as its settings say.

    Raises:
        UserError: It cannot.
    """
    chosen = settings.model_dump()
    # How long an answer may be is known once the references are, unless it is set.
    known = [name for name in _CHOSEN if chosen[name] is not None]
    different = _different(known, chosen, theirs["settings"])
    general = theirs["settings"].get("general_text")
    if (settings.forgetting is None) != (general is None):
        measured = ("is", "is not") if general is None else ("is not", "is")
        different.append("the loss on general text {} and {} measured".format(*measured))
    _refuse(different)


def require_same_data(
    theirs: Mapping[str, Any], scored: HeldOutData, examples_sha256: str, template: str,
    general: GeneralText | None,
) -> None:  # fmt: skip
    """What is about to be measured is what the other evaluation measured, token by token.

    Args:
        theirs: The other evaluation.
        scored: Encoded examples.
        examples_sha256: Of what they say.
        template: Name of the chat template.
        general: Text beside the task.

    Raises:
        UserError: It is something else.
    """
    ours: dict[str, Any] = {
        "settings": {"chat_template": template, "general_text": general and general.facts},
        "dataset": {"rows": len(scored.examples), "examples_sha256": examples_sha256},
        "models": [{"losses": _unmeasured(scored.rows)}],
    }
    if general is not None:
        ours["models"][0]["general_losses"] = _unmeasured(general.rows)
    _refuse([*_different(_OF_DATA, _settings(ours), _settings(theirs)), *_other_data(ours, theirs)])


def _unmeasured(encoded: Encoded | None) -> list[tuple[float, int]]:
    """Losses of 0 with the tokens that they will be of, as `evaluation.json` has them."""
    assert encoded is not None
    counts = (sum(map(bool, row.supervised[1:])) for row in encoded.rows)
    return [(0.0, count) for count in counts if count]


def compare(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], their_run: str
) -> list[dict[str, Any]]:
    """What each model of ours has over each of theirs, paired over the examples.

    Args:
        ours: As `evaluation.json` has it.
        theirs: The same.
        their_run: The name of the run that theirs is of.

    Returns:
        `model`, `run` (theirs), `against` (its model), `metric`, `difference` (ours minus theirs),
        its 95 % interval and a verdict.

    Raises:
        UserError: They were measured differently: with other settings, another chat template, or
            on other examples.
    """
    _require_same(ours, theirs)
    rows = []
    samples, seed = ours["settings"]["bootstrap_samples"], ours["settings"]["seed"]
    extra_metrics = ours["settings"].get("extra_metrics", [])
    first, second = (_statistics(evaluation, extra_metrics) for evaluation in (ours, theirs))
    for name, our_metrics in first.items():
        for their_name, their_metrics in second.items():
            for metric, (statistics, formula) in our_metrics.items():
                reference = their_metrics[metric][0]
                draws = Resamples(len(statistics), samples, seed)
                difference = draws.difference(statistics, reference, formula)
                lower = registry.described(metric).lower_is_better
                rows.append({
                    "model": name, "against": their_name, "metric": metric,
                    "difference": difference.value, "low": difference.low, "high": difference.high,
                    "verdict": verdict(difference, len(statistics), lower_is_better=lower),
                })  # fmt: skip
    return [{"run": their_run, **row} for row in (*rows, *_tasks(ours, theirs))]


def _tasks(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Scores on the tasks that both were asked, paired over the documents."""
    rows = []
    samples, seed = ours["settings"]["bootstrap_samples"], ours["settings"]["seed"]
    their_tasks = {
        (task["task"], task["metric"], task["filter"]): task for task in theirs.get("tasks", [])
    }
    for task in ours.get("tasks", []):
        counterpart = their_tasks.get((task["task"], task["metric"], task["filter"]))
        for (name, values), (against, references) in itertools.product(
            task["values"].items(), (counterpart or {"values": {}})["values"].items()
        ):
            assert counterpart is not None
            first, second = (
                np.stack([scores, which["weights"][model]], 1).astype(float)
                for which, model, scores in (
                    (task, name, values), (counterpart, against, references)
                )
            )  # fmt: skip
            draws = Resamples(len(values), samples, seed)
            difference = harness.difference(
                first, second, draws, higher=task["higher_is_better"],
                formula=task["formula"],
            )  # fmt: skip
            rows.append({
                "model": name, "against": against, "metric": f"{task['task']}, {task['metric']}",
                "difference": difference.pop("value"), **difference,
            })  # fmt: skip
    return rows


def _require_same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Trap 46: figures of another template, length or data are no comparison."""
    different = _different(_SAME, _settings(ours), _settings(theirs))
    if "lm_eval" in ours["settings"] and "lm_eval" in theirs["settings"]:
        first, second = (evaluation["settings"]["lm_eval"] for evaluation in (ours, theirs))
        different += [
            f"of the tasks, {name} is {first[name]!r} and {second[name]!r}"
            for name in first
            if name != "tasks" and first[name] != second[name]
        ]
        different += _other_documents(ours, theirs)
    _refuse([*different, *_other_data(ours, theirs)])


def _other_data(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What of the examples and of the general text is not the same."""
    first, second = ours["dataset"], theirs["dataset"]
    if first["rows"] != second["rows"]:
        return [f"{first['rows']} and {second['rows']} held-out examples"]
    if first["examples_sha256"] != second["examples_sha256"]:  # of turns that are not kept, too
        return ["the held-out examples are not the same"]
    if "examples" in ours and _questions(ours) != _questions(theirs):
        return ["the held-out examples are not the same"]
    if _supervised(ours, "losses") != _supervised(theirs, "losses"):
        return ["the same examples have other tokens: the losses are per token"]
    if _supervised(ours, "general_losses") != _supervised(theirs, "general_losses"):
        return ["the same general text has other tokens, as where max_length cuts it elsewhere"]
    return []


def _settings(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """How it was measured; general text is what it says, wherever its file lies."""
    settings = dict(evaluation["settings"])
    if text := settings.get("general_text"):
        settings["general_text"] = {key: text[key] for key in text if key != "path"}
    return settings


def _other_documents(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Tasks of one name that asked other things."""
    asked = {task["task"]: task for task in theirs.get("tasks", [])}
    different = []
    for task in {task["task"]: task for task in ours.get("tasks", [])}.values():
        counterpart = asked.get(task["task"])
        if counterpart is None:
            continue
        if task["documents"] != counterpart["documents"]:
            different.append(
                f"task {task['task']} has {task['documents']} and {counterpart['documents']} "
                "documents"
            )
        elif task["documents_sha256"] != counterpart["documents_sha256"]:
            different.append(f"the documents of task {task['task']} are not the same")
    return different


def _different(
    names: Sequence[str], ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> list[str]:
    return [
        f"{name} is {ours.get(name)!r} and {theirs.get(name)!r}"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]


def _refuse(different: Sequence[str]) -> None:
    if different:
        raise UserError(
            f"the two were measured differently, so they are not compared: {'; '.join(different)}; "
            "evaluate both in the same way"
        )


def _questions(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(example["prompt"], example["reference"]) for example in evaluation["examples"]]


def _supervised(evaluation: Mapping[str, Any], losses: str) -> list[float]:
    """Tokens behind each loss of the first model, the base."""
    return [tokens for _, tokens in evaluation["models"][0].get(losses, ())]


def _statistics(
    evaluation: Mapping[str, Any], extra_metrics: Sequence[str]
) -> dict[str, dict[str, tuple[Array, FromSums]]]:
    """Per-example statistics of each model by metric, from its losses and its answers."""
    result = {}
    references = registry.nfc([example["reference"] for example in evaluation["examples"]])
    for model in evaluation["models"]:
        losses = np.asarray(model["losses"], float)
        by_metric: dict[str, tuple[Array, FromSums]] = {
            "loss": (losses, metrics.mean_loss), "perplexity": (losses, metrics.perplexity),
        }  # fmt: skip
        if "general_losses" in model:
            general = np.asarray(model["general_losses"], float)
            by_metric[forgetting.METRIC] = (general, metrics.mean_loss)
        if references:
            answers = registry.nfc(
                [example["answers"][model["name"]] for example in evaluation["examples"]]
            )
            for name in (*registry.OF_ANSWERS, *extra_metrics):
                scorer = registry.scorer(name)
                by_metric[name] = (scorer.statistics(answers, references), scorer.formula)
        result[model["name"]] = by_metric
    return result
