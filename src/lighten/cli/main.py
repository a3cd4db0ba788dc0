"""The command line: parse, call the API, print."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import lighten
from lighten import streams
from lighten.cli import audit as cli_audit
from lighten.cli import bench as cli_bench
from lighten.cli import plan as cli_plan
from lighten.cli import serve as cli_serve
from lighten.cli.adapter import adapter_app
from lighten.cli.console import (
    OPEN,
    Json,
    Settings,
    console,
    overrides,
    print_json,
    print_table,
    progress_bar,
    require_model_and_data,
    take_positionals,
    with_positionals,
)
from lighten.cli.evaluate import print_evaluation
from lighten.cli.export import export, push, verify
from lighten.cli.quantize import quantize
from lighten.cli.runs import runs_app
from lighten.cli.settings import TakesSettings, TakesSweep, show_settings
from lighten.cli.steps import print_report, print_step
from lighten.parallel import launch
from lighten.wording import counted, typed

if TYPE_CHECKING:
    from lighten.api import RecipeLike


class OnOff(StrEnum):
    """Of a switch that has a third state: not given."""

    ON = "on"
    OFF = "off"


class SystemRole(StrEnum):
    """What happens to system messages."""

    KEEP = "keep"
    FOLD = "fold"
    DROP = "drop"


class Thoughts(StrEnum):
    """What happens to thoughts in answers."""

    KEEP = "keep"
    DROP = "drop"


app = typer.Typer(
    name="lighten",
    no_args_is_help=True,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # As settings are, options are known by either spelling: --max_length and --max-length.
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Make a large language model lighter, faster and cheaper, and prove it.",
)
data_app = typer.Typer(no_args_is_help=True, help="Look at data before training on it.")
app.add_typer(runs_app, name="runs")
app.add_typer(data_app, name="data")
app.add_typer(adapter_app, name="adapter")
app.command("export")(export)
app.command("push")(push)
app.command("merge", hidden=True)(export)
app.command("verify")(verify)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"lighten {lighten.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[  # noqa: ARG001  # acts by its callback
        bool, typer.Option("--version", callback=_print_version, is_eager=True,
                           help="Print the version and exit.")
    ] = False,
    local_rank: Annotated[  # noqa: ARG001  # DeepSpeed's launcher says it here and in variables
        int, typer.Option(hidden=True)
    ] = 0,
) -> None:  # fmt: skip
    """Make a large language model lighter, faster and cheaper, and prove it."""
    streams.prepare()


def main() -> None:
    """Run the command line and turn a user's mistake into one clean line."""
    from lighten.errors import UserError

    streams.prepare()
    streams.quieten_libraries()
    try:
        app(prog_name="lighten")  # the name under which its completion is installed
    except UserError as error:
        if not launch.leave_word(error):
            print(f"error: {error}", file=sys.stderr)  # noqa: T201  # before rich is worth loading
        sys.exit(2)


def _recipe_arguments(words: list[str]) -> tuple[RecipeLike | None, dict[str, Any]]:
    """A recipe's file or folder, a run's folder, or MODEL DATA, and the settings after them.

    Data may be named among the settings too: MODEL --dataset DATA.
    """
    from lighten import path_checks
    from lighten.errors import UserError
    from lighten.recipe import aliases

    positionals, settings = take_positionals(words), overrides(words)
    if len(positionals) == 1 and positionals[0].endswith((".yaml", ".yml")):
        return positionals[0], settings
    if len(positionals) == 1:
        in_folder = path_checks.recipe_in(path_checks.run_folder(positionals[0]))
        if in_folder is not None:
            recipe, place = in_folder
            return recipe, {**place, **settings}
        if any(aliases.RENAMED.get(name, name) == "dataset" for name in settings):
            return None, with_positionals(positionals, settings)
        raise UserError(
            f"{positionals[0]} is neither a run's folder nor a recipe (recipe.yaml); a model needs "
            f"a data set beside it: lighten train {typed(positionals[0])} DATA"
        )
    if not positionals and settings:
        return None, settings
    require_model_and_data(positionals)
    return None, with_positionals(positionals, settings)


@contextmanager
def _stopped_cleanly() -> Iterator[None]:
    """A training or sweep that was told to stop ends the command with its words and exit code."""
    from lighten.training.interrupt import Interrupted

    try:
        yield
    except Interrupted as stopped:
        if not launch.leave_word(stopped):
            typer.echo(str(stopped), err=True)
        raise typer.Exit(stopped.exit_code) from None


_Words = Annotated[list[str] | None, typer.Argument(metavar="RECIPE | MODEL DATA", help=Settings)]
_Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")]
_Force = Annotated[bool, typer.Option("--force", help="Train although the plan says no.")]
_Processes = Annotated[
    int | None, typer.Option("--processes", help="Train as so many ranks on this processor.")
]
_Gpus = Annotated[int | None, typer.Option("--gpus", help="Train as one rank on each of N GPUs.")]
_NoPlan = Annotated[bool, typer.Option("--no-plan", help="Do not predict memory and time first.")]


@app.command(cls=TakesSettings, context_settings=OPEN)
def run(
    ctx: typer.Context, words: _Words = None, resume: _Resume = False, force: _Force = False,
    no_plan: _NoPlan = False, processes: _Processes = None, gpus: _Gpus = None,
) -> None:  # fmt: skip
    """Train, evaluate, quantise where the recipe says so, and report, one after another."""
    from lighten import api

    recipe, settings = _recipe_arguments([*(words or []), *ctx.args])
    with _stopped_cleanly(), progress_bar() as progress:
        api.run(
            recipe, resume=resume, force=force, planned=not no_plan, processes=processes,
            gpus=gpus, evaluation_progress=progress, log=lambda line: typer.echo(line, err=True),
            done=print_step, **settings,
        )  # fmt: skip


@app.command(cls=TakesSettings, context_settings=OPEN)
def train(
    ctx: typer.Context, words: _Words = None, resume: _Resume = False, force: _Force = False,
    no_plan: _NoPlan = False, processes: _Processes = None, gpus: _Gpus = None,
) -> None:  # fmt: skip
    """Train adapters, or a base's own weights, from a recipe or from a model and a data set."""
    from lighten import api

    recipe, settings = _recipe_arguments([*(words or []), *ctx.args])
    with _stopped_cleanly():
        trained_run = api.train(
            recipe, resume=resume, force=force, planned=not no_plan, processes=processes,
            gpus=gpus, **settings,
        )  # fmt: skip
    if launch.recognise().main:
        console().print(f"run: {trained_run.folder}", soft_wrap=True, highlight=False)


app.command("sft", context_settings=OPEN, hidden=True)(train)
cli_plan.register(app)
app.command()(quantize)
cli_bench.register(app)
cli_audit.register(app)
cli_serve.register(app)


@app.command(cls=TakesSweep, context_settings=OPEN)
def sweep(
    ctx: typer.Context, words: _Words = None, resume: _Resume = False, as_json: Json = False
) -> None:
    """Train many settings in one pass, compare them, and say which to take: --lora_r 8,32,128."""
    from lighten import api
    from lighten.reporting.sweep_table import shown

    recipe, settings = _recipe_arguments([*(words or []), *ctx.args])
    with _stopped_cleanly(), progress_bar() as progress:
        result = api.sweep(recipe, resume=resume, measuring_progress=progress, **settings)
    if as_json:
        print_json(result.to_dict())
        return
    columns, rows, sentences = shown(result.folder)
    print_table(columns, rows)
    screen = console()
    for sentence in sentences:  # what is piped is wrapped by whoever shows it
        screen.print(sentence, highlight=False, markup=False, soft_wrap=not screen.is_terminal)
    print_report(result.folder / "report.html")


@app.command(context_settings=OPEN)
def evaluate(
    ctx: typer.Context, run: Annotated[str, typer.Argument(metavar="RUN | MODEL | ADAPTER")],
    against: Annotated[
        str | None, typer.Option(help="Another evaluated run: compare with its models too.")
    ] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure the base and what a run trained, a model, or an adapter, on held-out examples."""
    from lighten import api

    launch.require_alone("an evaluation", f"lighten evaluate {typed(run)}")
    with progress_bar() as progress:
        evaluation = api.evaluate(
            run, against=against, progress=progress, **overrides(ctx.args)
        ).to_dict()
    if as_json:
        print_json(evaluation)
    else:
        print_evaluation(evaluation)


app.command("eval", context_settings=OPEN, hidden=True)(evaluate)


@app.command()
def report(
    runs: list[str],
    output: Annotated[Path | None, typer.Option(help="Where to write the page.")] = None,
) -> None:
    """Write the HTML page of a run, of several side by side, of a sweep or of an audit."""
    from lighten import api

    print_report(api.report(*runs, output=output))


@app.command()
def chat(
    target: Annotated[str | None, typer.Argument(metavar="RUN | MODEL | ADAPTER")] = None,
    url: Annotated[str | None, typer.Option(help="Talk to a server instead.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Which adapter of the run.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Answer with base too.")] = False,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    thinking: Annotated[
        OnOff | None, typer.Option(help="Answers begin with a thought; default: as trained.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 answers greedily.")] = 0.0,
) -> None:
    """Talk to a base or an adapter in the terminal."""
    from lighten import path_checks

    if url is not None or target is None:
        cli_serve.chat(target, url, adapter, compare, system, max_new_tokens, temperature, thinking)
        return
    path_checks.source_of(target)
    from lighten.evaluation.chat import chat as talk

    with progress_bar():  # shows how the model is loaded
        talk(
            target, adapter=adapter, compare=compare, system=system,
            thinking=None if thinking is None else thinking is OnOff.ON,
            max_new_tokens=max_new_tokens, temperature=temperature,
            log=lambda line: typer.echo(line, err=True),
        )  # fmt: skip


@app.command()
def models(as_json: Json = False) -> None:
    """Which models can be loaded by name, and which are on this machine."""
    from lighten.models import available

    entries = available()
    if as_json:
        typer.echo(json.dumps([{**vars(e), "path": e.path and str(e.path)} for e in entries]))
        return
    rows = [
        [e.name, e.source, f"{(e.size_bytes or 0) / 1e6:,.0f} MB" if e.cached else "no", e.note]
        for e in entries
    ]
    print_table(["model", "source", "on this machine", "what it is"], rows)
    console().print("Any hub id, model folder or GGUF file loads too, by its name or path.")


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine has, what it computes in, and which extras are installed."""
    from lighten import cpu
    from lighten.machine.hardware import cache_folder
    from lighten.machine.hardware import doctor as examine
    from lighten.parallel.tried import operations, strategies

    switched_off = None if cpu.enabled() else cpu.OFF
    facts = {**examine(), "strategies": strategies(), "switched_off": switched_off}
    tried = operations(Path.cwd(), cache_folder())
    if as_json:
        outcomes = {name: vars(outcome) for name, outcome in tried.items()}
        typer.echo(json.dumps({**facts, "operations": outcomes}))
        return
    machine = facts["machine"]
    gpus = [f"{g['name']}, {g['memory_bytes'] / 2**30:.0f} GiB" for g in machine["gpus"]]
    rows = [
        ["processor", f"{machine['processor']}, {counted(machine['cores'], 'core')}"],
        ["memory", f"{machine['memory_bytes'] / 2**30:.1f} GiB, "
                   f"{facts['free_memory_bytes'] / 2**30:.1f} free"],
        ["disk", f"{facts['free_disk_bytes'] / 2**30:.0f} GiB free"],
        ["GPUs", "; ".join(gpus) or "none"],
        ["device", f"{facts['device']['value']}: {facts['device']['reason']}"],
        ["base format", f"{facts['dtype']['value']}: {facts['dtype']['reason']}"],
        ["computes in", ", ".join(f"{k}: {v}" for k, v in facts["formats"].items())],
        *([["kernels", f"none: {switched_off}"]] if switched_off else []),
        ["versions", ", ".join(f"{k} {v}" for k, v in facts["versions"].items())],
    ]  # fmt: skip
    print_table(["this machine", ""], rows)
    print_table(["several ranks", ""], [list(item) for item in facts["strategies"].items()])
    print_table(["tried here", ""], [[name, what.sentence()] for name, what in tried.items()])
    extras = [
        [name, ", ".join(f"{k} {v}" for k, v in extra["installed"].items()) or "–",
         extra["install"] if extra["missing"] else "complete"]
        for name, extra in facts["extras"].items()
    ]  # fmt: skip
    print_table(["extra", "installed", "to get the rest"], extras)


app.command("env", hidden=True)(doctor)


app.command("settings")(show_settings)


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe."""
    from lighten.recipe import Recipe

    typer.echo(json.dumps(Recipe.json_schema(), indent=2))


app.command("config-schema", hidden=True)(schema)


@data_app.command("check")
def data_check(
    file: str,
    model: Annotated[str, typer.Option("--model", help="Whose tokenizer and template to use.")],
    eval_dataset: Annotated[str | None, typer.Option(help="Look for overlap with this.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens a row may have.")] = 1024,
    chat_template: Annotated[str | None, typer.Option(help="As in the recipe.")] = None,
    system_role: Annotated[SystemRole | None, typer.Option(help="As in the recipe.")] = None,
    thinking: Annotated[Thoughts | None, typer.Option(help="As in the recipe.")] = None,
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows")] = False,
    dataset_columns: Annotated[str | None, typer.Option(help="As in the recipe.")] = None,
    row: Annotated[int, typer.Option(min=0, help="Which example to show token by token.")] = 0,
    as_json: Json = False,
) -> None:
    """Lengths, truncation, supervised tokens, duplicates, overlap, and one example's mask."""
    from lighten import data, path_checks
    from lighten.data.sources import sources
    from lighten.errors import UserError
    from lighten.paths import several
    from lighten.training.progress import TrainingProgress

    # Paths are looked at before anything heavy is loaded.
    path_checks.require_model(model)
    training = several(file)
    sources(training, "train")
    from lighten.models import limits, load_tokenizer

    of_model = limits(model)
    longest, limit = of_model.longest(max_length)
    tokenizer = load_tokenizer(model)
    template = data.choose_template(tokenizer, chat_template)
    options: dict[str, Any] = {"skip_bad_rows": skip_bad_rows}
    if dataset_columns is not None:
        options["columns"] = overrides(["--dataset_columns", dataset_columns])["dataset_columns"]
    dataset = data.read(training, **options)
    if row >= len(dataset.examples):
        raise UserError(
            f"--row {row}: {file} has {counted(len(dataset.examples), 'row')}; the first is 0"
        )
    held_out = None
    watched = several(eval_dataset) if eval_dataset else data.with_split(training, "valid")
    if watched:
        held_out = data.read(watched, split="valid", **options)
    with TrainingProgress() as progress:
        summary = data.check(
            dataset, tokenizer, max_length=longest, sample=row, verify=of_model.check_ids,
            evaluation=None if held_out is None else held_out.examples,
            template=f"{template.name}: {template.reason}", limit=limit,
            skip_bad_rows=skip_bad_rows, system_role=system_role and system_role.value,
            thinking=thinking and thinking.value, progress=progress.encoding,
        )  # fmt: skip
    if as_json:
        print_json(summary.to_dict())
    else:
        held_out_notes: list[str] = []
        if held_out is not None:
            held_out_notes = [*data.left_out("held-out", held_out), *held_out.findings]
        _print_check(summary.to_dict(), held_out_notes)


def _print_check(summary: dict[str, Any], held_out_notes: list[str]) -> None:
    from rich.text import Text

    counts, lengths = summary["counts"], summary["lengths"]
    overlap = summary["overlap"]
    lost = counted(counts["lost_supervised_tokens"], "supervised token")
    rows = [
        ["rows", f"{summary['rows']} ({summary['format']}), {len(summary['bad_rows'])} broken"],
        ["chat template", summary["template"]],
        ["tokens per row", ", ".join(f"{k} {v:,.0f}" for k, v in lengths.items())],
        ["supervised", f"{counts['supervised_tokens']:,} of {counts['tokens']:,} tokens"],
        [f"over {summary['max_length']}", f"{counted(counts['truncated'], 'row')} cut, "
                                        f"{counts['dropped']} left out, {lost} lost"],
        ["duplicates", f"{counted(summary['duplicates'], 'row')} asking what an earlier row asked"],
        ["overlap", "no evaluation data given" if overlap is None else
                    f"{counted(overlap, 'row')} also in the evaluation data"],
    ]  # fmt: skip
    print_table(["data", ""], rows)
    largest_count = max((rows for _, rows in summary["histogram"]), default=1)
    bars = [
        [f"up to {edge}" if edge else "longer", str(count), "█" * round(30 * count / largest_count)]
        for edge, count in summary["histogram"]
    ]
    print_table(["tokens", "rows", ""], bars)
    screen = console()
    for sentence in (*summary["left_out"], *held_out_notes, *summary["problems"]):
        screen.print(sentence, highlight=False, markup=False)
    example = Text("one example, supervised tokens in ⟦brackets⟧:\n")
    inside = False
    for token, supervised in summary["sample"]:
        if supervised != inside:
            example.append("⟦" if supervised else "⟧", style="bold green")
        example.append(token, style="green" if supervised else "dim")
        inside = supervised
    example.append("⟧" if inside else "", style="bold green")
    screen.print(example)
