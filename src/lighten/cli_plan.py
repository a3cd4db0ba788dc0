"""The command `lighten plan`: parse, call the API, print."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lighten.console import OPEN, Json, Settings, console, is_assignment, overrides, print_table

if TYPE_CHECKING:
    from lighten.plan.result import Plan

FITS, DOES_NOT, CANNOT_TELL = 0, 1, 2
_Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="RECIPE | MODEL [DATA]", help=Settings),
]
_Device = Annotated[
    str | None,
    typer.Option(help="t4, l4, a10, rtx3060, rtx3090, rtx4090, a100-40, a100-80, h100, h200, cpu; "
                      "default this machine."),
]  # fmt: skip


def plan(
    ctx: typer.Context, words: _Words = None, device: _Device = None, as_json: Json = False
) -> None:
    """Predict memory and time before anything is downloaded: exit 0 fits, 1 does not, 2 unsure."""
    from lighten import api

    recipe, settings = _what([*(words or []), *ctx.args])
    made = api.plan(recipe, device=device, **settings)
    if as_json:
        typer.echo(json.dumps(made.to_dict()))
    else:
        print_plan(made)
    raise typer.Exit(exit_code(made.fits()))


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(context_settings=OPEN)(plan)


def exit_code(fits: bool | None) -> int:
    """0 fits, 1 does not, 2 cannot tell: it can guard a job."""
    return CANNOT_TELL if fits is None else FITS if fits else DOES_NOT


def _what(words: list[str]) -> tuple[str | None, dict[str, Any]]:
    """A recipe file, or a model and perhaps its data, and the settings after them."""
    from lighten.errors import UserError

    named: list[str] = []
    while words and not words[0].startswith("--") and not is_assignment(words[0]):
        named.append(words.pop(0))
    settings = overrides(words)
    if len(named) == 1 and named[0].endswith((".yaml", ".yml")):
        return named[0], settings
    if len(named) > 2 or not (named or settings):
        raise UserError("give a recipe (recipe.yaml) or a model: lighten plan MODEL --device t4")
    return None, {**dict(zip(("model_name_or_path", "dataset"), named, strict=False)), **settings}


def print_plan(made: Plan) -> None:
    """The plan as tables: by part, what else is needed, what would need less."""
    from lighten.plan import words

    screen = console()
    style = {True: "bold green", False: "bold red", None: "bold yellow"}[made.fits()]
    screen.print(words.verdict(made), style=style, highlight=False, markup=False)
    print_table(["peak memory by part", "GiB", ""], words.part_rows(made))
    print_table(["", ""], words.fact_rows(made))
    if made.changes:
        print_table(
            ["what would need less", "saves", "time", "fits", "settings"], words.change_rows(made)
        )
    for note in (*made.notes, *made.outside):
        screen.print(f"note: {note}", highlight=False, markup=False)
