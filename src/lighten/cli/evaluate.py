"""What `lighten evaluate` and `lighten run` print of an evaluation."""

from __future__ import annotations

from typing import Any

from lighten.cli.console import cell, console, print_table


def print_evaluation(evaluation: dict[str, Any]) -> None:
    """Print every metric of every model, what changed, and what is to be said of it."""
    differences = {(d["adapter"], d["metric"]): d for d in evaluation["differences"]}
    names = [model["name"] for model in evaluation["models"]]
    rows = []
    for metric in evaluation["models"][0]["metrics"]:
        cells = []
        for model in evaluation["models"]:
            change = differences.get((model["name"], metric))
            wording = f" {change['verdict']}" if change else ""
            cells.append(cell(model["metrics"][metric]) + wording)
        rows.append([metric, *cells])
    print_table(["metric", *names], rows)
    if evaluation["comparisons"]:
        compared = [
            [comparison["model"], f"{comparison['run']}: {comparison['against']}",
             comparison["metric"],
             cell({**comparison, "value": comparison["difference"]}), comparison["verdict"]]
            for comparison in evaluation["comparisons"]
        ]  # fmt: skip
        print_table(["model", "against", "metric", "difference", ""], compared)
    for judgement in evaluation["judged"]:
        rate = cell({**judgement["rate"]})
        cut_off = judgement["cut_off"]
        room = f", {cut_off} without room for a choice: raise --judge_max_tokens" if cut_off else ""
        console().print(
            f"judge: {judgement['adapter']} against {judgement['against']}: "
            f"{judgement['wins']} better, {judgement['losses']} worse, {judgement['ties']} ties "
            f"({judgement['swapped']} swapped with the order, {judgement['unclear']} unclear{room})"
            f"; {rate} % ({judgement['verdict']})",
            highlight=False, markup=False,
        )  # fmt: skip
    if evaluation["tasks"]:
        print_table(
            ["task", "metric", *names], [_task(task, names) for task in evaluation["tasks"]]
        )
    for sentence in evaluation["dataset"].get("notes", []):
        console().print(sentence, highlight=False, markup=False)


def _task(task: dict[str, Any], names: list[str]) -> list[str]:
    """A task's metric: each model's mean, and whether it differs from the base's."""
    cells = []
    for name in names:
        change = task["differences"].get(name)
        cells.append(cell(task["models"][name]) + (f" {change['verdict']}" if change else ""))
    filtered = "" if task["filter"] == "none" else f", {task['filter']}"
    return [task["task"], f"{task['metric']}{filtered}", *cells]
