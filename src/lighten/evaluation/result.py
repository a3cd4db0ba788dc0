"""What an evaluation gives: each model's figures, what differs, and every answer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any

from lighten.evaluation.bootstrap import Array
from lighten.evaluation.generate import Answers
from lighten.wording import counted


@dataclass
class Measured:
    """One model's raw results on the examples.

    Attributes:
        name: `base`, or what was trained.
        adapter: The same name, None for the base.
        statistics: Per-example statistics [examples, K] by metric.
        answers: What it said.
        references: What that was compared with: what training learnt of each example's answer.
        memory: Peak memory while it was measured.
    """

    name: str
    adapter: str | None
    statistics: dict[str, Array]
    answers: Answers
    references: list[str]
    memory: dict[str, Any] = field(default_factory=dict)


@dataclass
class Evaluation:
    """What `evaluation.json` holds.

    Attributes:
        settings: How it was measured.
        dataset: On what.
        models: Metrics per model with standard error and 95 % interval.
        differences: Each adapter minus the base, paired, with a verdict.
        examples: Prompt, reference and every model's answer.
        judged: How often a judge preferred each adapter's answers to the base's.
        tasks: Scores on tasks of lm-eval.
        comparisons: Each model minus each of another run, where one was named.
    """

    settings: dict[str, Any]
    dataset: dict[str, Any]
    models: list[dict[str, Any]]
    differences: list[dict[str, Any]]
    examples: list[dict[str, Any]]
    version: int = 1
    created: str = ""
    judged: list[dict[str, Any]] = field(default_factory=list)
    tasks: list[dict[str, Any]] = field(default_factory=list)
    comparisons: list[dict[str, Any]] = field(default_factory=list)

    def __repr__(self) -> str:
        labels = []
        for model in self.models:
            loss = model["metrics"].get("loss", {}).get("value")
            labels.append(model["name"] + ("" if loss is None else f" {loss:.3f}"))
        rows = counted(self.dataset.get("rows", 0), "example")
        return f"Evaluation({rows}; loss: {', '.join(labels)})"

    def _repr_html_(self) -> str:
        """Every metric of every model, for notebooks."""
        # The report knows what it draws; it is looked up when a notebook asks.
        return str(import_module("lighten.reporting.notebook").evaluation_html(self))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def metric(self, model: str, name: str) -> dict[str, float | None]:
        """Value, standard error and interval of one metric of one model."""
        for entry in self.models:
            if entry["name"] == model:
                values: dict[str, float | None] = entry["metrics"][name]
                return values
        raise KeyError(model)
