"""The command `lighten plan`: parse, call the API, print."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from lighten.cli.console import (
    OPEN,
    Json,
    Settings,
    console,
    overrides,
    print_table,
    take_positionals,
)
from lighten.errors import UserError
from lighten.machine.datasheets import DEVICES
from lighten.wording import typed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lighten.planning.result import Plan

FITS, DOES_NOT, CANNOT_TELL, ERROR = 0, 1, 2, 3
_Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="RECIPE | MODEL [DATA] | serve BASE | quantize BASE", help=Settings),
]
_Device = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(DEVICES)}, cpu; default this machine. Laptops, mi300x and apple: memory "
        "alone, no time."
    ),
]
_Probe = Annotated[
    bool, typer.Option("--probe", help="Make one true step of the planned shape, and compare.")
]
_Search = Annotated[bool, typer.Option("--search", help="The fastest configuration that fits.")]
_Largest = Annotated[
    bool, typer.Option("--largest", help="Which of the models given is the largest that fits.")
]
_Limits = Annotated[bool, typer.Option("--limits", help="The longest context, the most rows.")]
_Write = Annotated[Path | None, typer.Option(help="Write what --search found as a recipe.")]
_Gpus = Annotated[int | None, typer.Option(help="GPUs per node.")]
_Processes = Annotated[
    int | None, typer.Option(help="Ranks on this machine's processor, which share its memory.")
]
_Nodes = Annotated[int | None, typer.Option(help="Nodes; default 1.")]
_Zero = Annotated[
    int | None,
    typer.Option(
        help="ZeRO stage, 1 to 3; without it: the recipe's strategy, or the cheapest that fits."
    ),
]
_Fsdp = Annotated[
    str | None, typer.Option(help="full (as ZeRO 3) or hybrid (sharded within each node).")
]
_Offload = Annotated[str | None, typer.Option(help="optimizer:cpu, param:cpu, or both.")]


def plan(
    ctx: typer.Context,
    words: _Words = None,
    device: _Device = None,
    probe: _Probe = False,
    search: _Search = False,
    largest: _Largest = False,
    limits: _Limits = False,
    write: _Write = None,
    gpus: _Gpus = None,
    processes: _Processes = None,
    nodes: _Nodes = None,
    zero: _Zero = None,
    fsdp: _Fsdp = None,
    offload: _Offload = None,
    as_json: Json = False,
) -> None:
    """Predict memory and time before anything is downloaded.

    Exit codes: 0 it fits, 1 it does not, 2 cannot tell, 3 an error: there is no answer.
    """
    arguments = [*(words or []), *ctx.args]
    with _error_exit_code():
        fits = _answer(
            arguments, device, as_json, probe=probe, search=search, largest=largest, limits=limits,
            write=write, spread={"gpus": gpus, "processes": processes, "nodes": nodes,
                                 "zero": zero, "fsdp": fsdp, "offload": offload},
        )  # fmt: skip
    raise typer.Exit(exit_code(fits))


def _answer(
    arguments: list[str],
    device: str | None,
    as_json: bool,
    *,
    probe: bool,
    search: bool,
    largest: bool,
    limits: bool,
    write: Path | None,
    spread: dict[str, int | str | None],
) -> bool | None:
    """Print the answer to whichever question was asked, and say whether it fits."""
    spread = {name: value for name, value in spread.items() if value is not None}
    questions = {
        "probe": probe, "largest": largest, "limits": limits, "search": search or write is not None,
        **dict.fromkeys([*spread][:1], True),
    }  # fmt: skip
    asked = [f"--{name}" for name, is_asked in questions.items() if is_asked]
    if arguments[:1] in (["serve"], ["quantize"]):
        if asked:
            raise UserError(f"plan {arguments[0]} is of one device: it has no {asked[0]}")
        return (_serve if arguments[0] == "serve" else _quantize)(arguments[1:], device, as_json)
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} are different questions; ask one at a time")
    if largest:
        return _largest(arguments, device, as_json)
    recipe, settings = _recipe_and_settings(arguments)
    if questions["search"]:
        return _search(recipe, settings, device, write, as_json)
    if limits:
        return _limits(recipe, settings, device, as_json)
    if spread:
        return _spread(recipe, settings, device, spread, as_json)
    return _plan(recipe, settings, device, as_json, probe=probe)


class _Command(TyperCommand):
    """A flag that is not understood is an error, too, and no "cannot tell"."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, and give the error its own exit code."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if getattr(error, "exit_code", 0):
                error.exit_code = ERROR  # type: ignore[attr-defined]
            raise


@contextmanager
def _error_exit_code() -> Iterator[None]:
    """Any error ends with a code of its own: a job's guard must not take it for an answer."""
    try:
        yield
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
    except Exception as error:  # Python's own exit code would mean that it does not fit
        message = str(error).strip() or "no message"
        typer.echo(f"error: the plan failed by a fault of lighten's own, "
                   f"{type(error).__name__}: {message}", err=True)  # fmt: skip
    else:
        return
    raise typer.Exit(ERROR)


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(cls=_Command, context_settings=OPEN)(plan)


def exit_code(fits: bool | None) -> int:
    """0 fits, 1 does not, 2 cannot tell: it can guard a job."""
    return CANNOT_TELL if fits is None else FITS if fits else DOES_NOT


def _recipe_and_settings(words: list[str]) -> tuple[str | None, dict[str, Any]]:
    """A recipe file, or a model and perhaps its data, and the settings after them."""
    positionals, settings = take_positionals(words), overrides(words)
    from lighten import path_checks

    if len(positionals) == 1 and path_checks.is_recipe(positionals[0]):
        return positionals[0], settings
    if len(positionals) > 2 or not (positionals or settings):
        raise UserError("give a recipe (recipe.yaml) or a model: lighten plan MODEL --device t4")
    named_settings = dict(zip(("model_name_or_path", "dataset"), positionals, strict=False))
    return None, {**named_settings, **settings}


def _plan(
    recipe: str | None, settings: dict[str, Any], device: str | None, as_json: bool, *, probe: bool
) -> bool | None:
    from lighten import api
    from lighten.planning import text

    probed = None
    early: list[Plan] = []

    def print_first(first: Plan) -> None:
        early.append(first)
        print_plan(first)

    if probe:
        prediction, probed = api.plan_probe(recipe, device=device, **settings)
    else:
        # What a plan says is printed while changes are looked for, each of them a plan of its own.
        prediction = api.plan(
            recipe, device=device, on_plan=None if as_json else print_first, **settings
        )
    if as_json:
        probe_result = {} if probed is None else {"probe": probed.to_dict()}
        typer.echo(json.dumps({**prediction.to_dict(), **probe_result}))
        return prediction.fits()
    if probed is not None:
        print_first(prediction)
    print_changes(prediction)
    _print_notes(note for note in prediction.notes if note not in early[0].notes)
    if probed is not None:
        print_table(["a true step", "predicted", "measured", "error"], text.probe_rows(probed))
        if probed.error is not None:
            _headline(f"memory ran out: {probed.error}", False)
    return prediction.fits()


def print_plan(prediction: Plan) -> None:
    """The plan as tables: by part, and what else is needed."""
    from lighten.planning import text

    _headline(text.verdict(prediction), prediction.fits())
    print_table(["peak memory by part", "GiB", ""], text.part_rows(prediction))
    print_table(["", ""], text.fact_rows(prediction))
    _print_notes((*prediction.notes, *prediction.outside))


def _print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        console().print(f"note: {note}", highlight=False, markup=False)


def print_changes(prediction: Plan) -> None:
    """What would need less, as a table, the flags of each, and whether one of them is enough."""
    from lighten.planning import text

    if not prediction.changes:
        return
    print_table(["", "what would need less", "saves", "time", "fits"], text.change_rows(prediction))
    # Flags are copied: whole, whatever the width of the terminal.
    for line in text.change_flags(prediction):
        console().print(line, highlight=False, markup=False, soft_wrap=True)
    if (sentence := text.with_change(prediction)) is not None:
        _headline(sentence, prediction.fits())


def _search(
    recipe: str | None,
    settings: dict[str, Any],
    device: str | None,
    write: Path | None,
    as_json: bool,
) -> bool | None:
    from lighten import api, runs
    from lighten.planning import text
    from lighten.planning.changes import differing
    from lighten.planning.search import recipe_text

    with _planning_status() as show_status:
        result, best = api.plan_search(recipe, device=device, log=show_status, **settings)
    if write is not None and best is not None and result.best is not None:
        why = f"{text.best_of(result.best)}: {result.best.what}, on {device or 'this machine'}"
        runs.write_text(write, recipe_text(best, f"lighten plan --search found {why}"))
    if as_json:
        typer.echo(json.dumps({**result.to_dict(), "recipe": best and best.completed()}))
    else:
        print_table(
            ["configuration", "micro-batch", "peak", "tokens/s", "why"],
            [text.candidate_row(candidate, candidate is result.best) for candidate in result.tried],
        )
        if result.best is None:
            _headline("nothing surely fits" if result.fits is None else "nothing fits", result.fits)
        else:
            _headline(f"{text.best_of(result.best)}: {result.best.what}", True)
            requested = api.plannable(recipe, **settings)
            flags = text.flags(differing(requested, result.best.settings)) or "as it is"
            console().print(flags, highlight=False, markup=False, soft_wrap=True)
            if write is not None:
                console().print(f"recipe: {write}", soft_wrap=True, highlight=False)
    return result.fits


def _largest(words: list[str], device: str | None, as_json: bool) -> bool | None:
    from lighten import api
    from lighten.planning.text import sized_row

    models = take_positionals(words)
    if not models:
        raise UserError("name the models: lighten plan --largest MODEL MODEL … --device t4")
    with _planning_status() as show_status:
        candidates = api.plan_largest(models, device=device, log=show_status, **overrides(words))
    if as_json:
        typer.echo(json.dumps([candidate.to_dict() for candidate in candidates]))
    else:
        print_table(
            ["model", "parameters", "fastest that fits", "peak", "tokens/s", ""],
            [sized_row(candidate) for candidate in candidates],
        )
    verdicts = [candidate.fits for candidate in candidates]
    return True if True in verdicts else None if None in verdicts else False


def _limits(
    recipe: str | None, settings: dict[str, Any], device: str | None, as_json: bool
) -> bool:
    from lighten import api

    limits = api.plan_limits(recipe, device=device, **settings)
    if as_json:
        typer.echo(json.dumps(limits.to_dict()))
    else:
        rows = [
            ["longest context, one row", _tokens(limits.context), limits.context_limited_by],
            ["most rows in a micro-batch", _count(limits.rows), limits.rows_limited_by],
        ]
        print_table(["", "", "limited by"], rows)
    return limits.context is not None


def _spread(
    recipe: str | None,
    settings: dict[str, Any],
    device: str | None,
    spread: dict[str, Any],
    as_json: bool,
) -> bool | None:
    from lighten import api
    from lighten.planning import text

    how = {name: value for name, value in spread.items() if name in ("gpus", "nodes", "processes")}
    how |= {"strategy": _strategy(spread.get("zero"), spread.get("fsdp")),
            "offload": _places(spread.get("offload"))}  # fmt: skip
    # A strategy among the settings is the recipe's; `how` has that of --zero and --fsdp.
    chosen = api.plannable(recipe, **settings)
    spread_plan = api.plan_spread(chosen, device=device, **how)
    if as_json:
        typer.echo(json.dumps(spread_plan.to_dict()))
    else:
        _headline(text.spread_verdict(spread_plan), spread_plan.fits())
        print_table(["", "per rank"], text.spread_rows(spread_plan))
        if chosen.strategy == "auto" and spread_plan.strategy in (
            "zero1",
            "zero2",
            "zero3",
            "fsdp",
        ):
            typer.echo(f"to train so: --strategy {spread_plan.strategy} (without it: ddp)")
    return spread_plan.fits()


def _serve(words: list[str], device: str | None, as_json: bool) -> bool | None:
    from lighten import api
    from lighten.planning import text

    model, options = _base(words, "serve")
    forecast = api.plan_serve(model, device=device, **options)
    if as_json:
        typer.echo(json.dumps(forecast.to_dict()))
    else:
        _headline(text.serving_verdict(forecast), forecast.fits())
        print_table(["memory by part", "GiB", ""], text.serving_rows(forecast))
    return forecast.fits()


def _quantize(words: list[str], device: str | None, as_json: bool) -> bool | None:
    from lighten import api
    from lighten.planning.text import quantizing_rows

    if device not in (None, "cpu", "this"):
        raise UserError("plan quantize is of this machine's main memory; leave --device out")
    model, options = _base(words, "quantize")
    if "to" in options:
        return _formats(model, options, as_json)
    for name in ("adapter", "output_dir"):
        if name in options:
            raise UserError(
                f"--{name} goes with --to FORMATS: "
                f"lighten plan quantize {typed(model)} --to FORMATS"
            )
    forecast = api.plan_quantize(model, **options)
    if as_json:
        typer.echo(json.dumps(forecast.to_dict()))
    else:
        print_table([forecast.model, forecast.storage], quantizing_rows(forecast))
    return forecast.fits()


def _formats(source: str, options: dict[str, Any], as_json: bool) -> bool | None:
    from lighten import api

    if conflicting := sorted({"storage", "double", "revision"} & options.keys()):
        raise UserError(f"--{conflicting[0]} is of loading a base quantised; leave it or --to out")
    forecast = api.plan_formats(source, **options)
    if as_json:
        typer.echo(json.dumps(forecast.to_dict()))
        return forecast.fits()
    _headline(forecast.sentence(), forecast.fits())
    header = ["format", "file MB", "of bfloat16", "MB at the peak", "rounding, s"]
    print_table(header, forecast.rows())
    for line in forecast.notes():
        console().print(line, highlight=False)
    return forecast.fits()


_OPTIONS = {
    "serve": ("adapters", "rank", "context", "concurrency", "storage", "cache_bytes", "revision"),
    "quantize": ("to", "adapter", "output_dir", "storage", "double", "revision"),
}


def _base(words: list[str], verb: str) -> tuple[str, dict[str, Any]]:
    positionals, options = take_positionals(words), overrides(words)
    if len(positionals) != 1:
        raise UserError(f"give one base: lighten plan {verb} MODEL")
    if unknown := sorted(options.keys() - set(_OPTIONS[verb])):
        raise UserError(
            f"plan {verb} has no --{unknown[0]}; it has --{', --'.join(_OPTIONS[verb])}"
        )
    return positionals[0], options


def _strategy(zero: int | None, fsdp: str | None) -> str | None:
    if zero is not None and fsdp is not None:
        raise UserError("--zero and --fsdp exclude each other; keep one")
    if zero is not None:
        if zero not in (1, 2, 3):
            raise UserError(f"--zero: {zero} is no stage; use 1, 2 or 3")
        return f"zero{zero}"
    if fsdp is None:
        return None
    if fsdp not in ("full", "hybrid"):
        raise UserError(f"--fsdp: {fsdp!r} is not known; use full or hybrid")
    return "fsdp" if fsdp == "full" else "fsdp_hybrid"


def _places(offload: str | None) -> tuple[str, ...]:
    """What is offloaded: `optimizer:cpu,param:cpu` gives both names."""
    offloaded = []
    for word in (offload or "").split(","):
        name, _, place = word.strip().partition(":")
        if not name:
            continue
        if name not in ("optimizer", "param") or place not in ("", "cpu"):
            raise UserError(f"--offload: {word!r} is not known; use optimizer:cpu or param:cpu")
        offloaded.append(name)
    return tuple(offloaded)


def _headline(text: str, fits: bool | None) -> None:
    style = {True: "bold green", False: "bold red", None: "bold yellow"}[fits]
    console().print(text, style=style, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _planning_status() -> Iterator[Callable[[str], None] | None]:
    """Says on a terminal what is being planned."""
    from rich.console import Console

    screen = Console(stderr=True)
    if not screen.is_terminal:
        yield None
        return
    with screen.status("planning") as status:
        yield lambda what: status.update(f"planning {what}")


def _tokens(value: int | None) -> str:
    return "none" if value is None else f"{value:,} tokens"


def _count(value: int | None) -> str:
    return "none" if value is None else f"{value:,}"
