"""The verbs `runs list` and `runs compare`: read run folders, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lighten.cli.console import Json, console, print_table

runs_app = typer.Typer(no_args_is_help=True, help="List runs, or compare them side by side.")


@runs_app.command("list")
def runs_list(
    folder: Annotated[Path, typer.Argument(help="Where the runs are.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List the runs of a folder, oldest first."""
    from lighten import runs
    from lighten.reporting import text

    folder = folder.expanduser()
    run_infos = [(run, run.info()) for run in runs.find(folder)]
    if as_json:
        typer.echo(json.dumps([{"folder": str(r.folder), **info} for r, info in run_infos]))
        return
    if not run_infos:
        console().print(f"no runs in {folder}", highlight=False, markup=False, soft_wrap=True)
        return
    rows, notes = [], dict[str, list[str]]()
    for run, info in run_infos:
        losses = [f"{adapter['eval_loss']:.3f}" for adapter in info.get("adapters", [])
                  if adapter.get("eval_loss") is not None]  # fmt: skip
        steps = info.get("training", {}).get("steps")
        started = str(info.get("started", "?"))[:16].replace("T", " ")
        base = str(info.get("base", {}).get("name", "?")).rstrip("/").rpartition("/")[2]
        # `lighten evaluate NAME` looks for the name under runs/.
        name = run.name if folder == Path("runs") else str(run.folder)
        for note in text.held_out_notes(info, None) if losses else ():
            notes.setdefault(note, []).append(name)
        rows.append([name, started, info.get("status", "?"), base,
                     "–" if steps is None else str(steps), ", ".join(losses) or "–"])  # fmt: skip
    columns = ["run", "started (UTC)", "status", "base", "steps", "held-out"]
    print_table(columns, rows, fold_last=(0, 1, 2))
    for note, names in notes.items():
        console().print(f"{', '.join(names)}: {note}", highlight=False, markup=False)


@runs_app.command("compare")
def runs_compare(names: list[str], as_json: Json = False) -> None:
    """Compare two or more runs: settings that differ, then measurements."""
    from lighten import path_checks, runs
    from lighten.reporting import comparison

    chosen = [path_checks.run_of(name) for name in names]
    result = comparison.compare(chosen)
    if as_json:
        verdict = {"what": "verdict", "kind": "verdict", "values": result.sentences}
        typer.echo(json.dumps([*runs.compare(chosen), verdict]))
        return
    screen = console()
    for sentence in result.sentences:
        screen.print(sentence, style="bold", highlight=False, markup=False)
    print_table(*comparison.table(result))
    for run, differs in {
        entry.run: entry.differs for entry in result.entries if entry.differs
    }.items():
        screen.print(f"{run}: {differs}", highlight=False, markup=False)
