"""The command `lighten audit`: parse, call the API, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lighten.cli.console import OPEN, Json, console, overrides, print_json, print_table


def audit(
    ctx: typer.Context,
    model: str,
    data: Annotated[str, typer.Option("--data", help="Training examples.")],
    budget: Annotated[str, typer.Option(help="Time for all of it: 90s, 30m, 2h.")] = "30m",
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Where; default runs/audit-MODEL."),
    ] = None,
    memory: Annotated[str | None, typer.Option(help="A process may hold: 8GiB.")] = None,
    examples: Annotated[int, typer.Option(help="Held-out examples for the loss.")] = 100,
    steps: Annotated[int | None, typer.Option(help="Of each training; default: by budget.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 32,
    long_tokens: Annotated[
        int | None,
        typer.Option(help="Of a long row; 0: none."),
    ] = None,
    resume: Annotated[  # noqa: ARG001  # it always goes on; people look for the word
        bool, typer.Option("--resume", help="Go on where it stopped (it does so by itself).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Before and after, in one command: the plain way beside each technique, on your data."""
    from lighten import api

    result = api.audit(
        model, data=data, budget=budget, output_dir=output_dir, memory=memory, examples=examples,
        steps=steps, new_tokens=new_tokens, long_tokens=long_tokens,
        log=lambda line: typer.echo(line, err=True), **overrides(ctx.args),
    )  # fmt: skip
    if as_json:
        print_json(result.to_dict())
        return
    from lighten.reporting import audit_table

    for columns, rows in audit_table.tables(result.to_dict()):
        print_table(columns, rows, fold_last=(0,))
    for line in (
        *audit_table.reasons(result.to_dict()),
        f"report: {result.folder / 'report.html'}",
    ):
        console().print(line, highlight=False, markup=False, soft_wrap=True)


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(context_settings=OPEN)(audit)
