"""What an evaluation says beside its metrics: another run, a judge, tasks of lm-eval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lighten.evaluation.registry import described


def section(evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the template shows of it.

    Args:
        evaluation: As `evaluation.json` has it, or None.

    Returns:
        `against`, the name of the other run and rows of differences from it, None where there are
        none; `judged` with the `judge`; `tasks`, with whether the chat template (`template`) stood
        around them.
    """
    evaluation = evaluation or {}
    settings = evaluation.get("settings", {})
    return {
        "against": _against(evaluation),
        "judged": evaluation.get("judged", []),
        "tasks": evaluation.get("tasks", []),
        "judge": settings.get("judge_model"),
        "template": settings.get("lm_eval", {}).get("chat_template"),
    }


def _against(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was measured beside what the other run measured.

    Bases that stand beside what was trained on them are in the file; of a model that was measured
    alone the base is all there is.
    """
    compared = evaluation.get("comparisons", [])
    hidden = {
        side: "base" if len({row[side] for row in compared}) > 1 else None
        for side in ("model", "against")
    }
    rows = [row for row in compared if all(row[side] != name for side, name in hidden.items())]
    if not rows:
        return None
    return {
        "run": rows[0]["run"],
        "rows": [{**row, "label": described(row["metric"]).label} for row in rows],
    }
