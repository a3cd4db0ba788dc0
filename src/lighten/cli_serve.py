"""The command `lighten serve`: parse, call the API, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

_Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapters", "--lora-modules", "--adapter",
        help="NAME=PATH, a run, an adapter or a folder of adapters; several after one flag.",
    ),
]  # fmt: skip


def serve(
    ctx: typer.Context,
    base: Annotated[str, typer.Argument(metavar="BASE", help="A model; or a run that is one.")],
    adapters: _Adapters = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the base; default as given.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address; others than loopback need --api-key.")]
    = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    storage: Annotated[
        str, typer.Option(help="Format of the base: q8_0, f16, bf16, f32.")
    ] = "q8_0",
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of a prompt with its answer.")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Answers made at the same time.")] = 8,
    max_cpu_loras: Annotated[int, typer.Option(help="Adapters at most.")] = 64,
    max_waiting: Annotated[int, typer.Option(help="Answers under way and waiting at most.")] = 512,
    threads: Annotated[int | None, typer.Option(help="Of the processor.")] = None,
    gpu_layers: Annotated[int, typer.Option(help="Layers on a GPU; -1 for all.")] = -1,
    adapter_dir: Annotated[
        Path | None, typer.Option(help="Folder that adapters may be loaded from at run time.")
    ] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(help="Key of clients; better in LIGHTEN_API_KEY.")
    ] = None,
    admin_key: Annotated[
        list[str] | None,
        typer.Option(help="Key for loading adapters; better in LIGHTEN_ADMIN_KEY."),
    ] = None,
    engine_flag: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE of llama.cpp's own settings.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a model of the hub.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what memory it will take, and end.")
    ] = False,
) -> None:  # fmt: skip
    """Serve a base and many adapters behind one OpenAI-compatible address."""
    from lighten import api

    given = _adapters([*(adapters or ()), *ctx.args])
    if plan:
        _plan(base, given, max_model_len, max_num_seqs, storage)
        return
    api.serve(
        base, adapters=given, served_name=served_model_name, host=host, port=port,
        storage=storage, context=max_model_len, slots=max_num_seqs, threads=threads,
        gpu_layers=gpu_layers, adapter_dir=adapter_dir, most_adapters=max_cpu_loras,
        api_keys=api_key or (), admin_keys=admin_key or (), waiting=max_waiting,
        engine_flags=_flags(engine_flag or []), revision=revision,
        told=lambda line: typer.echo(line, err=True),
    )  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    # Words after `--adapters A` that are no flags are more adapters.
    app.command(context_settings={"allow_extra_args": True})(serve)


def _adapters(words: list[str]) -> list[str]:
    from lighten.errors import UserError

    for word in words:
        if word.startswith("-"):
            raise UserError(f"{word} is not known; see: lighten serve --help")
    return words


def _flags(words: list[str]) -> dict[str, Any]:
    import yaml

    from lighten.errors import UserError

    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--engine-flag {word!r}: write NAME=VALUE")
        found[name.replace("-", "_")] = yaml.safe_load(value)
    return found


def _plan(base: str, adapters: list[str], context: int | None, slots: int, storage: str) -> None:
    from lighten import api
    from lighten.cli_plan import exit_code
    from lighten.console import console, print_table
    from lighten.plan import words as said

    stored = {"q8_0": "int8", "f16": "fp16", "bf16": "bf16", "f32": "fp32"}
    options: dict[str, Any] = {"concurrency": slots, "storage": stored.get(storage, storage)}
    if adapters:
        options["adapters"] = len(adapters)
    if context is not None:
        options["context"] = context
    found = api.plan_serve(base, **options)
    console().print(said.serving_verdict(found), highlight=False, markup=False, soft_wrap=True)
    print_table(["memory by part", "GiB", ""], said.serving_rows(found))
    raise typer.Exit(exit_code(found.fits()))
