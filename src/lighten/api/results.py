"""What a run came to: the verbs `evaluate` and `report`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten.errors import UserError
from lighten.folders import AUDIT
from lighten.path_checks import RunLike, is_run, run_of, source_of
from lighten.runs import Run

if TYPE_CHECKING:
    from lighten.evaluation.result import Evaluation

Progress = Callable[[str, int, int], None]


def evaluate(
    run: RunLike, *, against: RunLike | None = None, progress: Progress | None = None,
    **options: Any,
) -> Evaluation:  # fmt: skip
    """Measure base and adapters on the same held-out examples; writes `evaluation.json`.

    A model is measured as it is, on the examples that a run on the same data holds out, and an
    adapter's folder beside the base that it names; `evaluation.json` is in a run's folder of its
    own, with which others can be compared.

    Args:
        run: The run, a model as a recipe names one, or an adapter's folder.
        against: Another run, evaluated already: its models are compared with those of this one,
            paired over the examples (`comparisons`).
        progress: Log what is being done, how far it is, and of how much.
        options: Settings of the recipe's `evaluate` section, and `eval_dataset` for other data than
            a run held out; of a model or an adapter any of a recipe's, `dataset` among them.

    Raises:
        UserError: No held-out examples, no adapter in the run, or `against` was measured
            differently.
    """
    source = source_of(run)
    other = None if against is None else run_of(against)
    if isinstance(source, Run) or is_run(source):
        from lighten.evaluation.evaluation import evaluate_run

        return evaluate_run(run_of(source), against=other, progress=progress, **options)
    from lighten.evaluation import model_alone

    recipe, adapter, settings = model_alone.recipe_of(source, options)
    from lighten.evaluation.evaluation import evaluate_run

    with model_alone.run_of(recipe, adapter) as measured:
        return evaluate_run(measured, against=other, progress=progress, **settings)


def report(
    *runs: RunLike | Sequence[RunLike], output: str | os.PathLike[str] | None = None
) -> Path:
    """Write the HTML page of a run, of several side by side, of a sweep or an audit; its path.

    Args:
        runs: One or more, or a list of them.
        output: Where; default `report.html` in the run's folder, of several `comparison.html` in
            the first one's.

    Raises:
        UserError: No run, or one that does not exist.
    """
    named: list[RunLike] = []
    for run in runs:
        named += [run] if isinstance(run, str | os.PathLike | Run) else run
    if not named:
        raise UserError("report needs at least one run (see: lighten runs list)")
    target = None if output is None else Path(output).expanduser()
    if len(named) == 1 and not isinstance(named[0], Run):
        folder = Path(named[0]).expanduser()
        if (folder / AUDIT).is_file():
            from lighten.reporting.audit_page import write_audit_page

            return write_audit_page(folder, target)
    chosen = [run_of(run) for run in named]
    from lighten.reporting.page import write_page
    from lighten.reporting.sweep_page import is_sweep, write_sweep_page

    if len(chosen) == 1 and is_sweep(chosen[0].folder):
        return write_sweep_page(chosen[0].folder, target)
    return write_page(chosen, target)
