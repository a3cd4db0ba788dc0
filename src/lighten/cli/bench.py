"""The commands `lighten bench`: parse, call the API, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lighten.cli import serve as cli_serve
from lighten.cli.console import (
    OPEN,
    Json,
    console,
    overrides,
    print_json,
    print_table,
    take_positionals,
)

# What stands for itself, and is no name of a model.
_MODEL = "model"


class _ModelOrCommand(TyperGroup):
    """A group whose first word may be a model or a run: then the command `model` is meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command in front where none is named."""
        if args and args[0] not in (*self.commands, "--help", "-h"):
            args = [_MODEL, *args]
        return super().parse_args(ctx, args)


bench_app = typer.Typer(
    cls=_ModelOrCommand, no_args_is_help=True,
    help="Measure how fast a model or a server answers and trains: lighten bench MODEL|RUN "
    "[PART ...], or lighten bench serve URL.",
)  # fmt: skip


def _numbers(text: str | None, name: str) -> list[int] | None:
    from lighten.errors import UserError

    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--{name} {text!r}: give whole numbers, such as 128,512") from None


@bench_app.command(_MODEL, context_settings=OPEN)
def bench(
    ctx: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL|RUN [PART ...]",
            help="Parts: size, generate, attention, train, max-batch; none: all. Any setting of "
            "the recipe too, for the steps of training: --max_length 512.",
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare two files: before.json after.json.")
    ] = False,
    adapter: Annotated[str | None, typer.Option(help="Which adapter of the run.")] = None,
    memory: Annotated[str | None, typer.Option(help="A process may hold: 8GiB.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where the file goes; default bench.json in a run.")
    ] = None,
    prompt_tokens: Annotated[
        str | None, typer.Option(help="Prompt lengths of generate: 32,128,512.")
    ] = None,
    batch_sizes: Annotated[str | None, typer.Option(help="Prompts answered together: 1,4.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer.")] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Row lengths of attention: 1024,2048,4096.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="For the repeats of each figure.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a model or a run here: size, answers, attention, training, the largest batch."""
    from lighten import api
    from lighten.errors import UserError

    remaining = [*(words or []), *ctx.args]
    targets = take_positionals(remaining)
    if compare:
        if len(targets) != 2 or remaining:
            raise UserError("give two files: lighten bench --compare before.json after.json")
        _print_comparison(api.bench_compare(*targets), as_json)
        return
    if not targets:
        raise UserError("give a model or a run: lighten bench smollm2-135m size")
    result = api.bench(
        targets[0], targets[1:], adapter=adapter, memory=memory, output=output,
        prompt_tokens=_numbers(prompt_tokens, "prompt-tokens"),
        batch_sizes=_numbers(batch_sizes, "batch-sizes"), new_tokens=new_tokens,
        lengths=_numbers(lengths, "lengths"), seconds=seconds,
        log=lambda line: typer.echo(line, err=True), **overrides(remaining),
    )  # fmt: skip
    if as_json:
        print_json(result)
        return
    from lighten.benchmarking import text

    for columns, rows in text.tables(result):
        print_table(columns, rows, fold_last=(0,))
    loose = text.unsettled(result["records"])
    stored, earlier = result.get("path"), result.get("earlier_parts")
    for line in (
        *text.reasons(result["records"]),
        loose,
        f"{', '.join(earlier)}: of an earlier command" if earlier else None,
        f"written to {stored}" if stored else "not stored; --output FILE does",
    ):
        if line:
            console().print(line, highlight=False, markup=False, soft_wrap=True)


def _print_comparison(comparison: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(comparison)
        return
    from lighten.benchmarking import text

    columns, rows = text.comparison(comparison)
    print_table(columns, rows, fold_last=(0, 5))
    for note in comparison["notes"]:
        console().print(note, highlight=False, markup=False, soft_wrap=True)


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    bench_app.command("serve")(cli_serve.bench_serve)
    app.add_typer(bench_app, name="bench")
