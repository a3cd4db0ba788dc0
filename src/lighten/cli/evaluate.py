"""What `lighten evaluate` and `lighten run` print of an evaluation."""

from __future__ import annotations

from typing import Any

from lighten.cli.console import cell, console, print_table


def print_evaluation(found: dict[str, Any]) -> None:
    """Print every metric of every model, what changed, and what is to be said of it."""
    differences = {(d["adapter"], d["metric"]): d for d in found["differences"]}
    names = [model["name"] for model in found["models"]]
    rows = []
    for metric in found["models"][0]["metrics"]:
        cells = []
        for model in found["models"]:
            change = differences.get((model["name"], metric))
            said = f" {change['verdict']}" if change else ""
            cells.append(cell(model["metrics"][metric]) + said)
        rows.append([metric, *cells])
    print_table(["metric", *names], rows)
    if found["comparisons"]:
        compared = [
            [own["model"], own["against"], own["metric"],
             cell({**own, "value": own["difference"]}), own["verdict"]]
            for own in found["comparisons"]
        ]  # fmt: skip
        print_table(["model", "against", "metric", "difference", ""], compared)
    for own in found["judged"]:
        rate = cell({**own["rate"]})
        console().print(
            f"judge: {own['adapter']} against {own['against']}: {own['wins']} better, "
            f"{own['losses']} worse, {own['ties']} ties ({own['swapped']} swapped with the order, "
            f"{own['unclear']} unclear); {rate} % ({own['verdict']})",
            highlight=False, markup=False,
        )  # fmt: skip
    if found["tasks"]:
        print_table(["task", "metric", *names], [_task(own, names) for own in found["tasks"]])
    for sentence in found["dataset"].get("notes", []):
        console().print(sentence, highlight=False, markup=False)


def _task(own: dict[str, Any], names: list[str]) -> list[str]:
    """A task's metric: each model's mean, and whether it differs from the base's."""
    cells = []
    for name in names:
        change = own["differences"].get(name)
        cells.append(cell(own["models"][name]) + (f" {change['verdict']}" if change else ""))
    filtered = "" if own["filter"] == "none" else f", {own['filter']}"
    return [own["task"], f"{own['metric']}{filtered}", *cells]
