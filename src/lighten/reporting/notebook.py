"""How results draw themselves in a notebook: a sentence, a small table and a chart each.

Self-contained HTML whose text and lines take the notebook's own colour; what comes from data is
escaped. The rooms whose objects are drawn do not know the report; they call this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lighten.evaluation.result import Evaluation
    from lighten.runs import Run
    from lighten.sweeps.result import SweepResult

# Only inside the card: a notebook's page is not ours to style.
_STYLE = """<style>
.lighten-card { max-width: 720px; font: 14px/1.5 system-ui, sans-serif; }
.lighten-card svg { max-width: 100%; height: auto; }
.lighten-card .grid, .lighten-card .axis { stroke: currentColor; stroke-opacity: .2; }
.lighten-card text { fill: currentColor; font-size: 13px; }
.lighten-card .series path { fill: none; stroke: var(--ink); stroke-width: 2.2; }
.lighten-card .series.faint path { stroke-width: 1; opacity: .35; }
.lighten-card .series circle { fill: var(--ink); }
.lighten-card .series line, .lighten-card .legend line { stroke: var(--ink); stroke-width: 1.6; }
.lighten-card .legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; }
.lighten-card .legend li { margin-right: 14px; }
.lighten-card .legend svg { width: 28px; height: 8px; }
.lighten-card td, .lighten-card th { text-align: left; padding: 3px 12px 3px 0; }
</style>"""
_INKS = ("#0b8f7a", "#d06a1c", "#6d7be0", "#b8479a", "#8d931d", "#4b8ab3", "#cf4460", "#3a9c3a",
         "#8566d6", "#a06a35", "#1398b3", "#cc45aa")  # fmt: skip


def _card(sentences: Sequence[str], *parts: str) -> str:
    inks = ";".join(f"--series-{place + 1}:{ink}" for place, ink in enumerate(_INKS))
    paragraphs = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    return f'<div class="lighten-card" style="{inks}">{_STYLE}{paragraphs}{"".join(parts)}</div>'


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def run_html(run: Run) -> str:
    """A run: what training changed, its figures, and the loss over its steps."""
    from lighten.reporting import page, text

    info, evaluation = run.info(), run.evaluation()
    rows = [
        [tile["label"], " → ".join(filter(None, (tile["before"], tile["after"]))), tile["note"]]
        for tile in page.tiles(info, evaluation)
    ]
    status = f"{run.folder}, {info.get('status', 'not started')}"
    notes = [*text.held_out_notes(info, evaluation), *text.watched_notes(info, evaluation)]
    return _card(
        [status, *text.headline(info, evaluation), *notes],
        _table(["", "", ""], rows) if rows else "",
        page.loss_chart([(run.name, run.metrics())], named=False),
    )


def evaluation_html(evaluation: Evaluation) -> str:
    """An evaluation: the headline, and every metric of every model with its verdict."""
    from lighten.evaluation.metrics import METRICS
    from lighten.evaluation.registry import described
    from lighten.reporting import text
    from lighten.reporting.charts import number

    rows = []
    extras = evaluation.settings.get("extra_metrics", [])
    for metric in (*METRICS, *map(described, extras)):
        if not all(metric.name in model["metrics"] for model in evaluation.models):
            continue
        cells = []
        for model in evaluation.models:
            estimate = model["metrics"][metric.name]
            verdict = text.verdict_of(evaluation.differences, model["name"], metric.name)
            interval = (
                ""
                if estimate["low"] is None
                else f" [{number(estimate['low'])}, {number(estimate['high'])}]"
            )
            cells.append(f"{number(estimate['value'])}{interval} {verdict}")
        rows.append([metric.label, *cells])
    names = [model["name"] for model in evaluation.models]
    values = evaluation.to_dict()
    sentences = [*text.headline({}, values), *text.held_out_notes({}, values)]
    return _card(sentences, _table(["", *names], rows))


def quantized_html(result: Mapping[str, Any]) -> str:
    """Smaller copies of a model: what each costs and keeps, size against quality."""
    from lighten.reporting import quantized

    drawn = quantized.section(result)
    assert drawn is not None
    rows = [[row["name"], *row["cells"]] for row in drawn["rows"]]
    return _card(
        [f"{result['model']}, written under {result['folder']}", *drawn["notes"]],
        _table(["", *drawn["columns"]], rows), drawn["chart"],
    )  # fmt: skip


def sweep_html(sweep: SweepResult) -> str:
    """A sweep: what it recommends and why, and every arm."""
    from lighten.reporting import sweep_page, sweep_table

    metric = sweep_table.metric_of(sweep.folder)
    return _card(
        [*sweep.data["recommendation"]["reasons"], *sweep.data.get("notes", [])],
        _table(*sweep_table.table(sweep.data, metric)),
        sweep_page.held_out_chart(sweep_table.ordered(sweep.data)),
    )
